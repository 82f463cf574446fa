"""The tangent of one function without a rule, by a central difference. Only where the caller asked for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parts import is_dual, primals

__all__ = ["difference", "moved", "scale"]


def difference(function: Any, args: Any, kwargs: Any, dual: Any) -> tuple[Any, Any]:
    """(f(x), (f(x + h dx) - f(x - h dx)) / 2h), the error being of order h^2 |f'''| + eps |f| / h.

    h dx is a third power of eps of the values' size: 5e-3 for float32, 6e-6 for float64. A random function is
    differenced with one state of the generator.
    """
    value = function(*primals(args), **primals(kwargs))
    h = scale([args, kwargs])
    if h is None:
        return value, _map(value, torch.zeros_like)
    with torch.set_grad_enabled(torch.is_grad_enabled() and dual.tracked):
        state = torch.get_rng_state()
        ends = []
        for step in (h, -h):
            torch.set_rng_state(state)
            ends.append(function(*moved(args, step), **moved(kwargs, step)))
    return value, _map(ends[0], lambda a, b: (a - b) / (2.0 * h), ends[1])


def scale(tree: Any) -> float | None:
    """h for all Duals in a tree; None where no tangent differs from zero."""
    size, span, eps = 0.0, 0.0, 0.0
    for x in _duals(tree):
        if x.tangent is not None and x.primal.numel():
            size = max(size, float(x.primal.detach().abs().amax()))
            span = max(span, float(x.tangent.detach().abs().amax()))
            eps = max(eps, torch.finfo(x.primal.dtype).eps)
    return None if span == 0.0 else eps ** (1 / 3) * max(size, 1.0) / span


def _duals(tree: Any) -> list[Any]:
    if is_dual(tree):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [x for part in tree for x in _duals(part)]
    return _duals(list(tree.values())) if isinstance(tree, dict) else []


def moved(tree: Any, step: float) -> Any:
    """Every Dual in a tree as its primal + step tangent."""
    if is_dual(tree):
        return tree.primal if tree.tangent is None else torch.add(tree.primal, tree.tangent, alpha=step)
    if isinstance(tree, (list, tuple)):
        parts = [moved(x, step) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return {k: moved(x, step) for k, x in tree.items()} if isinstance(tree, dict) else tree


def _map(value: Any, function: Any, other: Any = None) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_map(x, function, None if other is None else other[i]) for i, x in enumerate(value)])
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    return function(value) if other is None else function(value, other)
