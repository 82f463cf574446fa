"""What the tests and docs/tangent_rules.md do with a `Case`: draw its arguments, run it in several ways."""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path
from typing import Any

import torch
from tangents.case import Case
from torch import Tensor

import pyflowmap as pfm

__all__ = ["Drawn", "all_cases", "by_differences", "by_duals", "by_torch", "draw", "norm", "outputs"]


def all_cases() -> list[Case]:
    """Those of every cases_*.py beside this file."""
    found: list[Case] = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        found += importlib.import_module(f"tangents.{path.stem}").CASES
    names = [case.name for case in found]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return found


class Drawn:
    """A case with arguments and directions, by the dtype that floating-point arguments are cast to."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, grad: bool = False) -> None:
        torch.manual_seed(zlib.crc32(case.name.encode()))
        self.case = case
        exact = case.arguments()
        self.moved = case.moves or tuple(i for i, x in enumerate(exact) if _floating(x))
        self.tangents = [torch.randn_like(x).to(dtype) if i in self.moved else None for i, x in enumerate(exact)]
        self.primals = [x.to(dtype) if _floating(x) else x for x in exact]
        if grad:
            for i in self.moved:
                self.primals[i].requires_grad_()

    def __call__(self, *primals: Any) -> Any:
        if self.case.random:
            torch.manual_seed(0)
        return self.case.function(*primals)

    def to(self, dtype: torch.dtype) -> Drawn:
        """The same numbers in another dtype: what a coarser one rounded away stays so."""
        other = object.__new__(Drawn)
        other.case, other.moved = self.case, self.moved
        other.primals = [x.to(dtype) if _floating(x) else x for x in self.primals]
        other.tangents = [None if dx is None else dx.to(dtype) for dx in self.tangents]
        return other


def draw(case: Case, dtype: torch.dtype = torch.float64, grad: bool = False) -> Drawn:
    return Drawn(case, dtype, grad)


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() or result.is_complex() else []
    return [x for part in result for x in outputs(part)] if isinstance(result, (tuple, list)) else []


def by_duals(drawn: Drawn, tangents: Any = None, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    y, dy = pfm.jvp(drawn, tuple(drawn.primals), tuple(drawn.tangents if tangents is None else tangents), **options)
    return outputs(y), outputs(dy)


def by_differences(drawn: Drawn, tangents: Any = None, h: float = 1e-5) -> list[Tensor]:
    """(f(x + h dx) - f(x - h dx)) / 2h, in float64: off by h^2 |f'''| / 6 + 1e-16 |f| / h."""
    ends = []
    with torch.no_grad():
        for step in (h, -h):
            moved = zip(drawn.primals, drawn.tangents if tangents is None else tangents, strict=True)
            ends.append(outputs(drawn(*[x if dx is None else x + step * dx for x, dx in moved])))
    return [(a - b) / (2 * h) for a, b in zip(*ends, strict=True)]


def by_torch(drawn: Drawn) -> list[Tensor]:
    """torch.func.jvp's tangents; its duals go where ours go."""
    moved = drawn.moved

    def function(*xs: Any) -> Any:
        args = list(drawn.primals)
        for i, x in zip(moved, xs, strict=True):
            args[i] = x
        return tuple(outputs(drawn(*args)))

    args = tuple(drawn.primals[i].detach() for i in moved)
    return list(torch.func.jvp(function, args, tuple(drawn.tangents[i] for i in moved))[1])


def norm(xs: list[Tensor]) -> float:
    return float(sum(x.detach().abs().double().square().sum() for x in xs) ** 0.5)
