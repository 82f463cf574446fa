"""What the emulator computes: tables, closed forms and float64 products (kernels/correct.cu checks; here they run)."""

from __future__ import annotations

import pytest

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
