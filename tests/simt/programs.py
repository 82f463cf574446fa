"""Builds the programs of kernels/ three ways with the host compiler and runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = sorted((ROOT / "csrc" / "simt").glob("*.cpp"))
COMMON = ["-std=c++17", "-g", f"-I{ROOT / 'csrc'}", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
KERNEL = ["-x", "c++", "-DPYFLOWMAP_SIMT=1", "-O1"]
BUILDS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
# Exit code 66 is the sanitizers' own: a report cannot be mistaken for a failed launch (3) or a wrong result (4).
ENVIRONMENT = {
    "ASAN_OPTIONS": "exitcode=66:detect_leaks=0",
    "UBSAN_OPTIONS": "exitcode=66:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}


@dataclass
class Result:
    code: int
    output: str

    @property
    def bits(self) -> str:
        lines = [line for line in self.output.splitlines() if line.startswith("bits ")]
        assert lines, f"no result printed (exit code {self.code}):\n{self.output}"
        return lines[0]


def execute(command: list[str], timeout: float = 60.0) -> Result:
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout)


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler: set CXX or install g++")
    return found


def compile_or_fail(command: list[str]) -> None:
    done = execute(command, timeout=300.0)
    if done.code:
        pytest.fail(f"{' '.join(command)}\n{done.output}", pytrace=False)


class Programs:
    """`programs(build)(name, case, variant, **options)` runs kernels/<name>.cu as built for `build`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: dict[str, list[str]] = {}
        # The runtime is never instrumented (csrc/simt/sanitizer.h): the same objects serve all builds.
        self.objects = [str(folder / f"{source.stem}.o") for source in RUNTIME]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._compile_runtime, RUNTIME, self.objects))

    def _compile_runtime(self, source: Path, target: str) -> None:
        compile_or_fail([compiler(), *COMMON, "-O2", "-c", str(source), "-o", target])

    def _launcher(self, build: str) -> list[str]:
        """An empty command prefix, or the one that this machine needs for the sanitizer's memory layout."""
        source, target = self.folder / "probe.cpp", str(self.folder / f"probe.{build}")
        source.write_text("int main() { return 0; }\n")
        if execute([compiler(), *BUILDS[build], str(source), "-o", target]).code:
            pytest.skip(f"{compiler()} has no runtime library for {' '.join(BUILDS[build])}")
        for prefix in ([], ["setarch", os.uname().machine, "-R"]):
            if execute([*prefix, target]).code == 0:
                return prefix
        pytest.skip(f"a program built with {' '.join(BUILDS[build])} does not run on this machine")

    def _build(self, build: str) -> list[str]:
        if build not in self.built:
            prefix = self._launcher(build)
            sources = sorted((ROOT / "tests" / "simt" / "kernels").glob("*.cu"))
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda source: self._link(build, source), sources))
            self.built[build] = prefix
        return self.built[build]

    def _link(self, build: str, source: Path) -> None:
        command = [compiler(), *COMMON, *KERNEL, *BUILDS[build], str(source), "-x", "none", *self.objects]
        compile_or_fail([*command, "-pthread", "-o", str(self.folder / f"{source.stem}.{build}")])

    def run(self, build: str, name: str, case: str, variant: str = "correct", **options: object) -> Result:
        prefix = self._build(build)
        program = str(self.folder / f"{name}.{build}")
        return execute([*prefix, program, case, variant, *(f"{key}={value}" for key, value in options.items())])
