"""The space in which a guidance takes its norms: velocity, data or noise; and inner products of what lies there.

On the linear path a prediction is P = a x + k v, with the velocity v at time s:

    space       P                        a    k
    velocity    v                        0    1
    data        D   = x + (1-s) v        1    1-s
    noise       eps = x - s v            1    -s

Formulas below are arranged so that none divides by k, which is 0 for data at s = 1 and for noise at s = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, union
from ..ops.combine import combine

__all__ = ["SPACES", "check_space", "check_velocity", "prediction", "products", "slope"]

SPACES = ("velocity", "data", "noise")


def check_space(name: str, space: Any, allowed: tuple[str, ...] = SPACES) -> None:
    if space not in allowed:
        raise ValueError(f"{name}: space = {space!r}; it is {' or '.join(repr(each) for each in allowed)}")


def check_velocity(name: str, space: str, solver: Any) -> None:
    """Data and noise are predicted at a point in time: the mean velocity of a jump has neither."""
    if space != "velocity" and solver.takes == "jump":
        raise ValueError(
            f'{name} in space="{space}" needs a velocity, but {solver.name} takes jumps, and a mean velocity has no '
            f'{space}; use solver="euler" or another that takes velocities, or space="velocity"'
        )


def slope(name: str, space: str, s: Any, t: Any) -> Any:
    """k, with P = a x + k v. Raises for a jump (t is not s) outside the velocity space."""
    if space == "velocity":
        return 1.0
    if s is not t and (isinstance(s, Tensor) or isinstance(t, Tensor) or s != t):
        raise ValueError(
            f'{name} in space="{space}" was asked for the jump from {s} to {t}; a mean velocity predicts no {space}: '
            'use space="velocity"'
        )
    return 1.0 - s if space == "data" else -s


def prediction(space: str, x: Lazy, v: Lazy, k: Any) -> Lazy:
    return v if space == "velocity" else x + k * v


def products(
    *terms: Lazy,
    keep: int = 0,
    sums: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """One launch: the inner products of K combinations, (B, K, K), the first `keep` of them stored in `dtype`, and with
    `sums` the sum of each, (B, K), else nothing, (B, 0). Differentiable; the products are of the combined values,
    deterministic, and a sample's do not depend on its batch."""
    operands, matrix, field, leading = union(terms)
    result = combine(
        operands,
        matrix,
        leading=leading,
        noise=None if field is None else field.noise,
        store=tuple(i < keep for i in range(len(terms))),
        gram=True,
        sums=sums,
        dtype=dtype or terms[0].dtype,
        like=terms[0]._like,
    )
    gram = result.gram
    total = result.sums if sums else gram.new_empty((*gram.shape[:-2], 0))
    if leading > 1:  # coefficients per frame
        gram, total = gram.flatten(1, leading - 1).sum(1), total.flatten(1, leading - 1).sum(1)
    return gram, result.outputs, total
