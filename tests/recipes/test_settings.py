"""field=value on a command line: every type, and errors that help."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pyflowmap.recipes import Recipe, changed


@dataclass
class Run(Recipe):
    note: str = "a"
    kind: Literal["x", "y"] = "x"
    size: int | tuple[int, int] = 4
    limit: float | None = 1.0
    name: str | None = None
    anything: Any = None


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("steps=100", "steps", 100),
        ("steps=1e5", "steps", 100_000),
        ("steps=1_000", "steps", 1000),
        ("lr=3e-4", "lr", 3e-4),
        ("lr = 1", "lr", 1.0),
        ("compile=true", "compile", True),
        ("compile=off", "compile", False),
        ("ema=0.9,0.99,", "ema", (0.9, 0.99)),
        ("ema=(0.5)", "ema", (0.5,)),
        ("ema=", "ema", ()),
        ("betas=0.9,0.95", "betas", (0.9, 0.95)),
        ("betas=none", "betas", None),
        ("note=a=b, c", "note", "a=b, c"),
        ("note=none", "note", "none"),
        ("name=none", "name", None),
        ("name=7", "name", "7"),
        ("kind=y", "kind", "y"),
        ("size=3", "size", 3),
        ("size=3,5", "size", (3, 5)),
        ("limit=none", "limit", None),
        ("limit=inf", "limit", float("inf")),
    ],
)
def test_values(text, field, value):
    before = Run()
    found = getattr(changed(before, [text]), field)
    assert found == value and type(found) is type(value)
    assert before == Run()  # the recipe itself stays


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps", "'steps' is not field=value, e.g. steps=1000"),
        ("stpes=3", "no field 'stpes'; the nearest are steps"),
        ("learning_rate=3", "no field 'learning_rate'; it has steps, batch, lr"),
        ("steps=many", "steps = 'many' is no int; e.g. 1000"),
        ("steps=1.5", "steps = '1.5' is no int"),
        ("steps=1e999", "steps = '1e999' is no int"),
        ("lr=fast", "lr = 'fast' is no float; e.g. 1e-3"),
        ("compile=2", "compile = '2' is no bool; e.g. true"),
        ("betas=0.9", r"betas = '0.9' is no .*tuple"),
        ("kind=z", "kind = 'z' is no Literal"),
        ("anything=3", "anything is .* cannot be typed here"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        changed(Run(), [text])


def test_the_last_setting_of_a_field_counts_and_fields_check_themselves():
    assert changed(Run(), ["steps=1", "steps=2"]).steps == 2
    from pyflowmap.recipes.checkerboard import Checkerboard

    with pytest.raises(ValueError, match="method = 'lsb'; it is one of lsd, psd_m, psd_u, esd"):
        changed(Checkerboard(), ["method=lsb"])
