"""Every Python block of the README and docs/ runs as written, and so does every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import pyflowmap

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
OPTIONAL = {"diffusers", "matplotlib", "mlxtend", "sklearn", "ot"}


def modules() -> list[str]:
    names = (m.name for m in pkgutil.walk_packages(pyflowmap.__path__, "pyflowmap."))
    return ["pyflowmap", *(n for n in names if n.rsplit(".", 1)[-1] not in ("_C", "_simt", "__main__"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page_runs_as_written(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {missing.name}")
    torch.manual_seed(0)
    found = doctest.testmod(
        module, extraglobs={"torch": torch, "pfm": pyflowmap, "pyflowmap": pyflowmap}, optionflags=doctest.ELLIPSIS
    )
    assert found.failed == 0
