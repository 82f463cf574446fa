"""CONTRIBUTING.md is kept true: what it names exists, and its lists stay short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

SPANS = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))
PATH = re.compile(r"\.?[\w.-]+(/[\w.-]+)+|[A-Z][\w.-]+\.(txt|md|toml)|csrc|tests|bench|tools")
PATHS = [span for span in SPANS if PATH.fullmatch(span)]
LISTS = {part.splitlines()[0]: part for part in TEXT.split("\n## ") if part.startswith("Adding")}


def test_the_pattern_finds_paths():
    assert {"CMakeLists.txt", "csrc/combine/combine.cu", "pyflowmap/ops/combine.py", "tests"} <= set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    if path == "pyflowmap/_C":
        path += ".pyi"  # the compiled module lies where it is installed
    assert (ROOT / path).exists(), f"CONTRIBUTING.md names {path}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", TEXT))))
def test_every_make_target_exists(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"CONTRIBUTING.md names make {target}"


def test_scripts_named_are_there():
    for script in re.findall(r"`bash (\S+)`", TEXT):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("title", LISTS)
def test_a_list_has_at_most_six_steps_in_order(title):
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", LISTS[title], re.MULTILINE)]
    assert 2 <= len(steps) <= 6
    assert steps == list(range(1, len(steps) + 1))


def test_every_kernel_variable_and_marker_named_is_used():
    assert "PYFLOWMAP_KERNELS" in (ROOT / "CMakeLists.txt").read_text()
    assert "sanitizer:" in (ROOT / "pyproject.toml").read_text()
