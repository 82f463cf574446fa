"""What a guidance is: an object that a run asks

    check(solver, grad)     raises where it cannot work with them
    conditions(condition)   the conditions it will name, as a tuple; the first is the caller's own
    slots(condition)        how many of them share one network call (1: each has its own)
    begin()                 itself, or for a guidance that remembers, a fresh copy for one run
    idle(times)             how many of the first steps leave the state as it is

and then, for each evaluation of the field, `guidance(ask, x, s, t)`. x is the state on the linear path, lazy; s and t
are linear times (t = s where a velocity is asked for). `ask(0, 1)` evaluates the network under conditions 0 and 1 and
returns one lazy velocity (of a jump: mean velocity) each; `ask(0, model=other)` asks another flow map, or another
network in the place of the flow map's own. The guidance returns one lazy. It is folded into the solver's next update
and so costs no pass over memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy

__all__ = ["Around", "Ask", "Guidance", "check_interval", "finite", "outside", "remembering", "unguided", "without"]

Ask = Callable[..., list[Lazy]]


class Guidance:
    """What every guidance has; the defaults are those of one that asks for the caller's condition alone."""

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on those before it."""
        return False

    @property
    def singular(self) -> frozenset[float]:
        """Linear times at which the guided field has no velocity."""
        return frozenset()

    def check(self, solver: Any, grad: bool | str = False) -> None:
        """Raise ValueError where this guidance cannot go with that solver (a `Solver`) and kind of gradient."""
        if not self.remembers:
            return
        name = type(self).__name__
        if grad == "checkpoint":
            raise ValueError(
                f'{name} remembers earlier evaluations, and grad="checkpoint" runs each step twice; use grad=True'
            )
        if solver.loop is not None:
            raise ValueError(
                f"{name} remembers earlier evaluations, and {solver.name} has a loop of its own that may repeat or "
                "reject them; use a solver on a fixed grid"
            )

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return (condition,)

    def slots(self, condition: Mapping[str, Any]) -> int:
        return 1

    def begin(self) -> Guidance:
        return self

    def idle(self, times: list[float]) -> int:
        """How many of the first steps leave the state as it is (CFG-Zero*'s zero-init). They are not run at all."""
        return 0

    def evaluations(self, s: float) -> int:
        """Network evaluations at time s."""
        return 1

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(ask, x, s, t)")


class _Unguided(Guidance):
    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        return ask(0)[0]


unguided = _Unguided()


class Around(Guidance):
    """One that changes what another guidance returns: dataclasses with a field `of`; None: what the network returns."""

    of: Guidance | None

    def __post_init__(self):
        if self.of is not None and not isinstance(self.of, Guidance):
            raise TypeError(f"of = {self.of!r}; pass another guidance, e.g. pfm.guidance.cfg(3.0, null=...)")

    @property
    def inner(self) -> Guidance:
        return unguided if self.of is None else self.of

    @property
    def remembers(self) -> bool:
        return self.inner.remembers

    @property
    def singular(self) -> frozenset[float]:
        return self.inner.singular

    def check(self, solver: Any, grad: bool | str = False) -> None:
        super().check(solver, grad)
        self.inner.check(solver, grad)

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return self.inner.conditions(condition)

    def slots(self, condition: Mapping[str, Any]) -> int:
        return self.inner.slots(condition)

    def begin(self) -> Guidance:
        return self if self.of is None else replace(self, of=self.of.begin())  # type: ignore[type-var]

    def idle(self, times: list[float]) -> int:
        return self.inner.idle(times)

    def evaluations(self, s: float) -> int:
        return self.inner.evaluations(s)


def remembering(ask: Ask) -> tuple[Ask, dict[int, Lazy]]:
    """`ask`, and a dictionary that fills with what the model itself answered: so that nothing is evaluated twice."""
    seen: dict[int, Lazy] = {}

    def asked(*which: int, model: Any = None) -> list[Lazy]:
        answers = ask(*which) if model is None else ask(*which, model=model)
        if model is None:
            seen.update(zip(which, answers))
        return answers

    return asked, seen


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


# ---- checks, at construction ---------------------------------------------------------------------------------------


def finite(name: str, value: Any, example: str, *, at_least: float = -math.inf) -> None:
    """Raise unless `value` is a finite number, at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; it is a number, e.g. {example}")
    if not math.isfinite(value) or value < at_least:
        least = f", at least {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} = {value}; it is a finite number{least}, e.g. {example}")


def check_interval(interval: tuple[float, float] | None) -> None:
    if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
        raise ValueError(f"interval = {interval}; the lower time comes first, e.g. (0.1, 0.8)")


def outside(interval: tuple[float, float] | None, s: float) -> bool:
    return interval is not None and not interval[0] <= s <= interval[1]
