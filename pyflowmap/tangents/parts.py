"""Taking arguments apart: the primal and the tangent of what may be a Dual."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

__all__ = [
    "DUALS",
    "any_tangent",
    "check_fresh",
    "first_dual",
    "is_dual",
    "primal",
    "primals",
    "recording",
    "tangent",
    "tangents",
    "unpack",
]

DUALS: list[type] = []  # Dual and TensorDual


def is_dual(x: Any) -> bool:
    return type(x) in DUALS


def primal(x: Any) -> Any:
    """The value of a Dual; anything else is its own value."""
    return x.primal if type(x) in DUALS else x


def tangent(x: Any) -> Any:
    """The tangent of a Dual; None, which is zero, for anything else."""
    return x.tangent if type(x) in DUALS else None


def primals(tree: Any) -> Any:
    """`primal` of everything in lists, tuples and dicts."""
    if type(tree) in DUALS:
        return tree.primal
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        parts = [primals(x) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return {k: primals(x) for k, x in tree.items()} if type(tree) is dict else tree


def tangents(xs: Any) -> list[Any] | None:
    """The tangents of a list of tensors, zeros where one has none; None where none has one."""
    found = [tangent(x) for x in xs]
    if all(dx is None for dx in found):
        return None
    return [torch.zeros_like(primal(x)) if dx is None else dx for x, dx in zip(xs, found, strict=True)]


def first_dual(tree: Any) -> Any:
    """The first Dual in nested lists, tuples and dicts; None without one."""
    if type(tree) in DUALS:
        return tree
    if isinstance(tree, (list, tuple)):
        for x in tree:
            found = first_dual(x)
            if found is not None:
                return found
    elif type(tree) is dict:
        return first_dual(list(tree.values()))
    return None


def unpack(tree: Any) -> tuple[Any, Any]:
    """(the leading Dual in a list or tuple, a list of the same with primals in place of Duals), in one pass.

    The leading Dual, the first tracked one or else the first, says how the result is recorded. None without a Dual.
    A Dual that is a view of one that was written to since raises.
    """
    lead = None
    plain = []
    for x in tree:
        kind = type(x)
        if kind in DUALS:
            if x.owner is not None:
                check_fresh(x)
            if lead is None or (x.tracked and not lead.tracked):
                lead = x
            x = x.primal
        elif isinstance(x, (list, tuple)) and kind is not torch.Size:
            inner, parts = unpack(x)
            if inner is not None and (lead is None or (inner.tracked and not lead.tracked)):
                lead = inner
            x = type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        elif kind is dict:
            inner, parts = unpack(x.values())
            if inner is not None and (lead is None or (inner.tracked and not lead.tracked)):
                lead = inner
            x = dict(zip(x, parts, strict=True))
        plain.append(x)
    return lead, plain


def any_tangent(tree: Any) -> bool:
    """Whether a Dual in nested lists, tuples and dicts has a tangent."""
    if isinstance(tree, (list, tuple)):
        return any(any_tangent(x) for x in tree)
    return any_tangent(list(tree.values())) if isinstance(tree, dict) else tangent(tree) is not None


def check_fresh(x: Any) -> None:
    """Raises where a Dual is a view of one that was written to since."""
    if x.owner is not None and x.owner[0].generation != x.owner[1]:
        if type(x.owner[0]) not in DUALS and not x.is_view:
            raise RuntimeError(
                f"a Dual {tuple(x.primal.shape)} is used after what x.detach() gave was written to in place, which the "
                "Dual does not show; write to x.detach().clone(), or to the Dual itself"
            )
        raise RuntimeError(
            f"a view {tuple(x.primal.shape)} of a Dual is used after its owner was written to in place, which the view "
            "does not show; take the view after the write"
        )


def recording(*xs: Any) -> Any:
    """The context in which a JOINT rule computes tangents of `xs`: without autograd, unless they are tracked.

    >>> with recording(torch.zeros(2)):
    ...     torch.is_grad_enabled()
    False
    """
    return nullcontext() if any(x.tracked for x in xs if type(x) in DUALS) else torch.no_grad()
