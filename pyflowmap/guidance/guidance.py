"""What a guidance is: a subclass of `Guidance`, an object that a run asks

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
    """What every guidance has; the defaults are those of one that asks for the caller's condition alone.

    One of one's own is a subclass with `__call__(ask, x, s, t)`. `ask(0, 1)` returns a list, one lazy velocity for each
    condition that `conditions` names, so `v, = ask(0)` for one; `ask(0, model=other)` asks another network. It returns
    one lazy. One that names more than the caller's condition defines `conditions`; `slots` where they share a call:

    >>> class rising(pfm.guidance.Guidance):
    ...     def __init__(self, scale, null):
    ...         self.scale, self.null = scale, null
    ...     def conditions(self, condition):
    ...         return condition, pfm.guidance.without(condition, self.null)
    ...     def __call__(self, ask, x, s, t):
    ...         conditional, null = ask(0, 1)
    ...         return null + (1.0 + (self.scale - 1.0) * s) * (conditional - null)
    >>> fm = pfm.FlowMap(lambda x, s, label: label[:, None].expand_as(x), prediction="velocity")
    >>> options = {"condition": {"label": torch.ones(1)}, "guidance": rising(3.0, null={"label": 0.0})}
    >>> pfm.sample(fm, torch.zeros(1, 2), 2, solver="euler", **options)  # 1/2 + 2/2
    tensor([[1.5000, 1.5000]])
    """

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
        elif isinstance(given, Tensor):
            result[key] = _filled(key, value, given)
        else:
            result[key] = value
    return result


def _filled(key: str, value: Any, given: Tensor) -> Tensor:
    """The null value in the shape and dtype of the condition's tensor, and nothing else than was said."""
    whole = not given.is_floating_point() and not given.is_complex()
    if isinstance(value, Tensor):
        if whole and (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"null[{key!r}] has dtype {value.dtype} but the condition {given.dtype}, which would cut it off; pass "
                f"it in that dtype"
            )
        try:
            return value.to(given).expand_as(given)
        except RuntimeError:
            raise ValueError(
                f"null[{key!r}] has shape {tuple(value.shape)} but the condition {tuple(given.shape)}; give one "
                "number, or a tensor of that shape"
            ) from None
    if not isinstance(value, (bool, int, float)):
        raise ValueError(
            f"null[{key!r}] is {type(value).__name__} but the condition is a tensor; give one number, or a tensor of "
            f"shape {tuple(given.shape)}"
        )
    if whole and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"null[{key!r}] = {value} but the condition has dtype {given.dtype}; give a whole number")
    return torch.full_like(given, value)


# ---- what a run does with one --------------------------------------------------------------------------------------


def guided(guidance: Guidance, ask: Ask, x: Lazy, s: Any, t: Any, count: int) -> Lazy:
    """guidance(ask, x, s, t) of `count` conditions; what one of one's own gets wrong is said in its words."""
    name = type(guidance).__name__

    def asked(*which: int, model: Any = None) -> list[Lazy]:
        for i in which:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count:
                raise ValueError(
                    f"{name} asks for condition {i!r} but names {count}; let conditions(condition) return a tuple of "
                    "them, the caller's own first"
                )
        return ask(*which) if model is None else ask(*which, model=model)

    found = guidance(asked, x, s, t)
    if type(found) is not Lazy:
        cure = "unpack what ask returns, `v, = ask(0)`" if isinstance(found, (list, tuple)) else "return one Lazy"
        raise TypeError(f"{name} returned {type(found).__name__}, not a combination of what it asked for; {cure}")
    return found


# ---- checks, at construction ---------------------------------------------------------------------------------------


def finite(name: str, value: Any, example: str, *, at_least: float = -math.inf) -> None:
    """Raise unless `value` is a finite number, at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; it is a number, e.g. {example}")
    if not math.isfinite(value) or value < at_least:
        least = f", at least {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} = {value}; it is a finite number{least}, e.g. {example}")


def check_interval(interval: tuple[float, float] | None) -> None:
    if interval is None:
        return
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise ValueError(f"interval = {interval!r}; it is a pair of linear times, e.g. (0.1, 0.8)")
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) or not 0.0 <= end <= 1.0 for end in interval):
        raise ValueError(
            f"interval = {interval!r}; its ends are linear times in [0, 1], 0 = noise to 1 = data, e.g. (0.1, 0.8)"
        )
    if interval[0] >= interval[1]:
        raise ValueError(f"interval = {interval!r}; the lower time comes first, e.g. (0.1, 0.8)")


def outside(interval: tuple[float, float] | None, s: float) -> bool:
    return interval is not None and not interval[0] <= s <= interval[1]
