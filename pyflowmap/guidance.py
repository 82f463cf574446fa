"""Guidance: several evaluations of a network become one velocity, as an unevaluated combination.

A guidance is an object that a run asks three things:

    conditions(condition)   the conditions it will name, as a tuple; the first is the caller's own
    slots(condition)        how many of them share one network call (1: each has its own)
    begin()                 itself, or for a guidance that remembers, a fresh copy for one run

and then, for each evaluation of the field, `guidance(ask, x, s, t)`. x is the state on the linear path, lazy; s and t
are linear times (t = s where a velocity is asked for). `ask(0, 1)` evaluates the network under conditions 0 and 1 and
returns one lazy velocity (of a jump: mean velocity) each; `ask(0, model=other)` asks another flow map. The guidance
returns one lazy. It is folded into the solver's next update and so costs no pass over memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .algebra import Lazy

__all__ = ["Guidance", "cfg", "without"]

Ask = Callable[..., list[Lazy]]


class Guidance:
    """What every guidance has; the defaults are those of one that asks for the caller's condition alone."""

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return (condition,)

    def slots(self, condition: Mapping[str, Any]) -> int:
        return 1

    def begin(self) -> Guidance:
        return self

    def idle(self, times: list[float]) -> int:
        """How many of the first steps leave the state as it is (CFG-Zero*'s zero-init)."""
        return 0

    def __call__(self, ask: Ask, x: Lazy, s: float, t: float) -> Lazy:
        raise NotImplementedError


def without(condition: Mapping[str, Any], null: Mapping[str, Any]) -> dict[str, Any]:
    """`condition` with the null values in place: numbers fill the shape of the condition's tensor, tensors are used as
    they are, None drops the key."""
    unknown = [key for key in null if key not in condition]
    if unknown:
        raise ValueError(
            f"null names {unknown[0]!r} but the condition has {sorted(condition) or 'nothing'}; "
            f'pass condition={{"{unknown[0]}": ...}}'
        )
    result = dict(condition)
    for key, value in null.items():
        given = condition[key]
        if value is None:
            del result[key]
        elif isinstance(given, Tensor) and not isinstance(value, Tensor):
            result[key] = torch.full_like(given, value)
        elif isinstance(value, Tensor) and isinstance(given, Tensor):
            result[key] = value.to(given).expand_as(given)
        else:
            result[key] = value
    return result


@dataclass(frozen=True)
class cfg(Guidance):
    """Classifier-free guidance, v = v_null + scale (v_cond - v_null). Ho & Salimans 2022, eq. 6.

    scale     1 is no guidance (and one network evaluation); larger leans on the condition
    null      the condition that means "none", e.g. {"label": 10}: numbers fill the shape of the condition's tensor,
              tensors are used as they are, None drops the key
    interval  (t_lo, t_hi): guide only while t_lo <= s <= t_hi; outside, one evaluation. Kynkaanniemi et al. 2024
    batched   one network call of twice the batch, or two calls

    On a flow map's jump this guides the mean velocity, the usual practice; a long guided jump is not exactly the
    solution operator of the guided field.

    >>> cfg(2.0, null={"label": 10}).evaluations(0.5)
    2
    """

    scale: float
    null: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    batched: bool = True

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"scale = {self.scale}; it is a finite number, e.g. 2.0")
        if not isinstance(self.null, Mapping) or not self.null:
            raise ValueError(f'null = {self.null!r}; name the condition that means "none", e.g. null={{"label": 10}}')
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval = {self.interval}; the lower time comes first, e.g. (0.1, 0.8)")

    def evaluations(self, s: float) -> int:
        """Network evaluations at time s: 1 or 2."""
        outside = self.interval is not None and not self.interval[0] <= s <= self.interval[1]
        return 1 if self.scale == 1.0 or outside else 2

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return (condition, without(condition, self.null))

    def slots(self, condition: Mapping[str, Any]) -> int:
        return 2 if self.batched and self.scale != 1.0 else 1

    def __call__(self, ask: Ask, x: Lazy, s: float, t: float) -> Lazy:
        if self.evaluations(s) == 1:
            return ask(0)[0]
        conditional, null = ask(0, 1)
        return null + self.scale * (conditional - null)
