"""What the emulator computes: tables, closed forms and float64 products (kernels/correct.cu checks; here they run)."""

from __future__ import annotations

import shutil

import pytest
from simt.programs import ROOT, execute

CASES = [
    "reduction",
    "dimensions",
    "big_grid",
    "shuffles",
    "votes",
    "partial",
    "named_barriers",
    "shared_arrays",
    "atomics",
    "async_tail",
    "matrices",
    "intrinsics",
]
SCHEDULES = [
    {},
    {"order": "reverse", "fill": "ff"},
    {"order": "random", "seed": 1, "fill": "ff", "async": "issue"},
    {"order": "random", "seed": 2, "threads": 2},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(f"{v}" for v in s.values()) or "default")
@pytest.mark.parametrize("case", CASES)
def test_correct(programs, case, schedule):
    result = programs.run("plain", "correct", case, **schedule)
    assert result.code == 0 and "done" in result.output, result.output


@pytest.mark.sanitizer
@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("case", CASES)
def test_correct_kernels_are_clean_under_sanitizers(programs, build, case):
    result = programs.run(build, "correct", case)
    assert result.code == 0 and "done" in result.output, result.output


@pytest.mark.sanitizer
def test_blocks_in_parallel_are_clean_under_the_race_detector(programs):
    result = programs.run("tsan", "correct", "dimensions", threads=2, order="random")
    assert result.code == 0 and "done" in result.output, result.output


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc_accepts_what_the_emulator_runs(tmp_path, arch):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    command = [nvcc, "-std=c++17", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}", code, "-c"]
    source = ROOT / "tests" / "simt" / "kernels" / "correct.cu"
    result = execute([*command, str(source), "-o", str(tmp_path / "correct.o")], timeout=300.0)
    assert result.code == 0, result.output
