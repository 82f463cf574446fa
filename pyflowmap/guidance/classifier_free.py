"""Classifier-free guidance, and CFG-Zero*: the network with and without its condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algebra import Lazy
from .guidance import Ask, Guidance, check_interval, finite, outside, without
from .space import check_space, check_velocity, prediction, products, slope

__all__ = ["Contrast", "cfg", "cfg_zero"]


@dataclass(frozen=True)
class Contrast(Guidance):
    """Guidance by two conditions, the caller's and the null."""

    scale: float
    null: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    batched: bool = True

    def __post_init__(self):
        finite("scale", self.scale, "2.0")
        if not isinstance(self.null, Mapping) or not self.null:
            raise ValueError(f'null = {self.null!r}; name the condition that means "none", e.g. null={{"label": 10}}')
        check_interval(self.interval)

    @property
    def single(self) -> bool:
        """Whether this is no guidance at all."""
        return self.scale == 1.0

    def evaluations(self, s: float) -> int:
        """Network evaluations at time s: 1 or 2."""
        return 1 if self.single or outside(self.interval, s) else 2

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return (condition, without(condition, self.null))

    def slots(self, condition: Mapping[str, Any]) -> int:
        return 2 if self.batched and not self.single else 1

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        if self.evaluations(s) == 1:
            return ask(0)[0]
        conditional, null = ask(0, 1)
        return self.contrast(conditional, null, x, s, t)

    def contrast(self, conditional: Lazy, null: Lazy, x: Lazy, s: Any, t: Any) -> Lazy:
        raise NotImplementedError


@dataclass(frozen=True)
class cfg(Contrast):
    """Classifier-free guidance, v = v_null + scale (v_cond - v_null). Ho & Salimans 2022, eq. 6.

    scale     1 is no guidance (and one network evaluation); larger leans on the condition. Not to be confused with the
              paper's own w, for which 0 is no guidance: scale = 1 + w
    null      the condition that means "none", e.g. {"label": 10}: numbers fill the shape of the condition's tensor,
              tensors are used as they are, None drops the key
    interval  (t_lo, t_hi): guide only while t_lo <= s <= t_hi; outside, one evaluation. Kynkaanniemi et al. 2024.
              Linear times; a noise-level interval [sigma_lo, sigma_hi] of a linear path is t = 1 - sigma
    batched   one network call of twice the batch, or two calls

    The same for velocity, data and noise: they are affine in each other. On a flow map's jump this guides the mean
    velocity, the usual practice; a long guided jump is not exactly the solution operator of the guided field.

    >>> cfg(2.0, null={"label": 10}).evaluations(0.5)
    2
    """

    def contrast(self, conditional: Lazy, null: Lazy, x: Lazy, s: Any, t: Any) -> Lazy:
        return null + self.scale * (conditional - null)


@dataclass(frozen=True)
class cfg_zero(Contrast):
    """CFG-Zero*: v = s* v_null + scale (v_cond - s* v_null), s* = <v_cond, v_null>/||v_null||^2 for each sample, and no
    motion in the first steps. Fan et al. 2025, eq. 10 and section 4.2.

    scale, null, interval, batched   as in `cfg`
    zero_init  how many of the first steps leave the state where it is, because a network's velocity is worst next to
               the noise: a number of steps, or below 1 a share of them, rounded down (the paper's 4 %: none of 4 steps,
               one of 25). These steps are not evaluated, and no multistep solver remembers them; the callback and the
               trajectory have them, with nfe = 0 and the state at rest
    space      in which s* is taken: the paper's "velocity", "data" or "noise"; they differ. A jump has "velocity" only

    1e-8 is added to ||v_null||^2. One reduction launch per guided evaluation.

    >>> cfg_zero(3.0, null={"label": 10}).idle([k / 25 for k in range(26)])
    1
    """

    zero_init: float = 0.04
    space: str = "velocity"

    def __post_init__(self):
        super().__post_init__()
        check_space("cfg_zero", self.space)
        finite("zero_init", self.zero_init, "1, or 0.04", at_least=0.0)
        if self.zero_init > 1 and self.zero_init != int(self.zero_init):
            raise ValueError(f"zero_init = {self.zero_init}; it is a whole number of steps, or a share of them below 1")

    def check(self, solver: Any, grad: bool | str = False) -> None:
        super().check(solver, grad)
        check_velocity("cfg_zero", self.space, solver)

    def idle(self, times: list[float]) -> int:
        steps = len(times) - 1
        # 0.29 * 100 is 28.999999999999996: a share that means a whole number is that number
        count = int(self.zero_init) if self.zero_init >= 1 else math.floor(self.zero_init * steps + 1e-9)
        if count and times[0] > times[-1]:
            raise ValueError(
                f"zero_init = {self.zero_init} on a grid that falls from {times[0]:g} to {times[-1]:g}; it belongs to "
                "the noise end of a rising one, pass zero_init=0"
            )
        if count >= steps:
            raise ValueError(f"zero_init = {self.zero_init} leaves none of {steps} steps; take more steps")
        return count

    def contrast(self, conditional: Lazy, null: Lazy, x: Lazy, s: Any, t: Any) -> Lazy:
        # s* - 1 = k q with q = <v_cond - v_null, P_null>/||P_null||^2: no quotient by k, which may be 0.
        k = slope("cfg_zero", self.space, s, t)
        gram, _, _ = products(conditional - null, prediction(self.space, x, null, k))
        _, overlap, _, length = gram.flatten(1).unbind(1)
        q = overlap / (length + 1e-8)
        rest = 1.0 - self.scale
        guided = self.scale * conditional + (rest + (rest * k) * q) * null
        return guided if self.space == "velocity" else guided + (rest * q) * x
