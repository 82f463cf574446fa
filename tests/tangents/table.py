"""Writes docs/tangent_rules.md: `python tests/tangents/table.py`.

The names come from the table of rules itself; the errors from the cases, in float32 against float64, beside those of
torch.func.jvp on the same numbers.
"""

# ruff: noqa: E402  a script finds the tests beside it first
from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from tangents.case import Case
from tangents.walk import all_cases, by_duals, by_torch, draw, norm

from pyflowmap.tangents import call
from pyflowmap.tangents.registry import RULES, Kind, Rule, find, name_of

PAGE = ROOT / "docs" / "tangent_rules.md"
DERIVED = (Kind.TANGENT, Kind.JOINT, Kind.LINEAR, Kind.COMPOSITE)
INTRODUCTION = """\
# Tangent rules

A `Dual` carries a value x and its tangent dx through a model. Each torch function that it meets has one rule in a
table, which gives the tangent of the result; a function that is not in the table raises `pfm.tangents.MissingRule`,
and says how to add a rule. This page lists the table. `python tests/tangents/table.py` writes it, and a test compares
it with the code.

A name stands for all that torch calls by it: `torch.add`, `Tensor.add`, `x + y`; `F.relu`, `F.relu(x, inplace=True)`.
In-place functions (`x.add_`, `x += y`, `x[i] = y`, `x.zero_()`) of a Dual that owns its data use the rule of the
function without the underscore. `out=` raises. `torch.compile(fullgraph=True)` does not ask an argument's class about
the few functions that `torch.overrides` does not list, and raises: `F.hardswish`, `F.hardsigmoid`, `torch.relu_`,
`F.elu_` and the like, `F.upsample`.
"""


class Row(NamedTuple):
    name: str
    kind: str
    error: float | None  # of float32, relative to the float64 tangent; the worst case
    of_torch: float | None  # the same of torch.func.jvp; None where it cannot


_OPERATORS = {
    "radd": "add", "rmul": "mul", "truediv": "div", "rtruediv": "div", "rdiv": "div", "floordiv": "floor_divide",
    "rfloordiv": "floor_divide", "mod": "remainder", "rmod": "remainder", "rpow": "pow", "rmatmul": "matmul",
}  # fmt: skip


def short(key: Any) -> str:
    """`add` for torch.add, Tensor.add, Tensor.__add__ and Tensor.__radd__."""
    name = name_of(key).removesuffix(".__get__").rpartition(".")[2].strip("_")
    if name == "fn":  # functional.max_pool2d and its like: two functions behind one
        name = next(each for each in dir(torch.nn.functional) if getattr(torch.nn.functional, each) is key)
    return _OPERATORS.get(name, name)


def of_torch(key: Any) -> bool:
    """Whether torch wrote it; checkpoint, which hands Duals on, is none of the functions of the table."""
    module = getattr(key, "__module__", None) or "torch"
    return module.split(".")[0] == "torch" and not isinstance(key, type) and not short(key).endswith("checkpoint")


def table() -> dict[str, set[Rule]]:
    """The rules of torch's functions by name."""
    rows: dict[str, set[Rule]] = defaultdict(set)
    for key, rule in RULES.items():
        if of_torch(key) and rule.kind is not Kind.WRITE:
            rows[short(key)].add(rule)
    return dict(rows)


def visited(case: Case) -> set[str]:
    """The names of the functions with rules that a case leads through."""
    seen: set[str] = set()

    def watch(function: Any) -> Any:
        rule = find(function)
        if rule is not None and rule.kind in DERIVED:
            seen.add(short(function))
        return rule

    # Without the table itself at hand, every function is looked up by `find`.
    with mock.patch.multiple(sys.modules[call.__module__], find=watch, RULES={}):
        by_duals(draw(case))
    return seen


def own_row(case: Case) -> str:
    return case.rule or case.name.partition(":")[0]


def errors(case: Case) -> tuple[float, float | None]:
    """(ours, torch.func.jvp's) in float32, relative to float64 on the same numbers."""
    single = draw(case, torch.float32)
    exact = by_duals(single.to(torch.float64))[1]
    size = max(norm(exact), 1e-30)

    def error(found: Any) -> float:
        return norm([a - b for a, b in zip(found, exact, strict=True)]) / size

    return error(by_duals(single)[1]), error(by_torch(single)) if case.func_jvp else None


# ---- the page ----


def groups() -> list[tuple[list[str], Kind]]:
    """The names that share a rule; those of linear functions by what they share memory with."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name, rules in sorted(table().items()):
        rule = min(rules, key=lambda r: (r.kind.value, name_of(r.function)))
        own = rule.function if rule.kind is not Kind.COMPOSITE else name
        found[rule.kind, own if rule.kind in DERIVED and own is not None else rule.view].append(name)
    return [(names, kind) for (kind, _), names in found.items()]


def rows() -> list[Row]:
    by_name: dict[str, list[Case]] = defaultdict(list)
    for case in all_cases():
        for name in {own_row(case)} if own_row(case) in table() else visited(case):
            by_name[name].append(case)
    measured: dict[str, tuple[float, float | None]] = {}
    found = []
    for names, kind in groups():
        if kind not in DERIVED:
            continue
        cases = [case for name in names for case in by_name[name]]
        for case in cases:
            if case.name not in measured:
                measured[case.name] = errors(case)
        ours = [measured[case.name][0] for case in cases]
        theirs = [e for case in cases if (e := measured[case.name][1]) is not None]
        title = ", ".join(f"`{name}`" for name in names)
        found.append(Row(title, kind.name.lower(), max(ours, default=None), max(theirs, default=None)))
    return sorted(found)


def page() -> str:
    def shown(error: float | None) -> str:
        return "–" if error is None else "0" if error == 0 else f"{error:.0e}"

    lines = [
        INTRODUCTION,
        "## With a tangent",
        "",
        "The error is that of the float32 tangent against the float64 one on the same numbers, relative in the",
        "Euclidean norm, the worst of the rule's test cases; 6e-08 is one rounding. Beside it that of",
        "`torch.func.jvp`, where it has a derivative.",
        "",
        "| functions | rule | error | torch.func.jvp |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.kind} | {shown(r.error)} | {shown(r.of_torch)} |" for r in rows()),
        "",
        "A rule is a formula for the tangent (`tangent`), or computes value and tangent together (`joint`), or is the "
        "function\nitself applied to the tangent (`linear`), or torch's own body run on the Dual (`composite`).",
        "",
    ]
    for kind, title, text in (
        (
            Kind.CONSTANT,
            "Without a tangent",
            "Comparisons, indices, steps, questions: the result is a plain tensor or value.",
        ),
        (Kind.FRESH, "New tensors", "The result is a Dual with tangent zero, so that it can be written to."),
    ):
        names = sorted(name for group, each in groups() if each is kind for name in group)
        lines += [f"## {title}", "", text, "", ", ".join(f"`{name}`" for name in names) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
