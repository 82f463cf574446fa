"""Adaptive projected guidance: what cond - null adds along the conditional prediction is weighted down."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..algebra import Lazy, lazy
from .classifier_free import Contrast
from .guidance import Guidance, finite
from .space import check_space, check_velocity, prediction, products, slope

__all__ = ["apg"]


@dataclass(frozen=True)
class apg(Contrast):
    """Adaptive projected guidance, in the data predictions D = x + (1-s) v. Sadat et al. 2024, alg. 1 (section 4).

        d  = D_cond - D_null + momentum d_before        (each evaluation; d_before is 0 at first)
        d *= min(1, threshold / ||d||)                  (each sample)
        d  = (d - d_par) + eta d_par,                   d_par = <d, D_cond>/||D_cond||^2 D_cond
        D  = D_cond + (scale - 1) d

    scale, null, interval, batched   as in `cfg`
    eta        of the part along D_cond, which saturates colours; 1 keeps it (with the other options off, this is `cfg`)
    momentum   the paper's beta, negative (-0.75 to -0.5); 0: off. Counts evaluations, so two per step of Heun; those
               outside the interval are left out
    threshold  on ||d||, the norm over all of a sample; None: off. The paper takes 2.5 to 15 for its latents
    base       "conditional", the paper's; or "null": D = D_null + scale d, which is another thing unless eta = 1, and
               what diffusers does by default (its eta is 1; its use_original_formulation=True is D_cond + scale d)
    space      the paper's "data", or "velocity" or "noise", with P in the place of D: directions and thresholds
               differ. A jump has "velocity" only

    One reduction launch per guided evaluation, which also stores d where there is momentum.

    >>> apg(4.0, null={"label": 10}, momentum=-0.5, threshold=10.0).remembers
    True
    """

    eta: float = 0.0
    momentum: float = 0.0
    threshold: float | None = None
    base: str = "conditional"
    space: str = "data"
    _before: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        check_space("apg", self.space)
        finite("eta", self.eta, "0.0")
        finite("momentum", self.momentum, "-0.5")
        if abs(self.momentum) >= 1.0:
            raise ValueError(f"momentum = {self.momentum}; it lies between -1 and 1, e.g. -0.5")
        if self.threshold is not None:
            finite("threshold", self.threshold, "10.0")
            if self.threshold <= 0.0:
                raise ValueError(f"threshold = {self.threshold}; it is above 0, and None for no threshold")
        if self.base not in ("conditional", "null"):
            raise ValueError(f'base = {self.base!r}; it is "conditional" (the paper) or "null"')

    @property
    def single(self) -> bool:
        return self.scale == 1.0 and self.base == "conditional"

    @property
    def remembers(self) -> bool:
        return self.momentum != 0.0 and not self.single

    @property
    def singular(self) -> frozenset[float]:
        # There the state is the prediction, so no velocity can make the remembered part of it.
        end = {"data": 1.0, "noise": 0.0}.get(self.space)
        return frozenset() if end is None or not self.remembers else frozenset((end,))

    def check(self, solver: Any, grad: bool | str = False) -> None:
        super().check(solver, grad)
        check_velocity("apg", self.space, solver)

    def begin(self) -> Guidance:
        return replace(self) if self.remembers else self

    def contrast(self, conditional: Lazy, null: Lazy, x: Lazy, s: Any, t: Any) -> Lazy:
        k = slope("apg", self.space, s, t)
        weight = self.scale - 1.0 if self.base == "conditional" else self.scale
        start = conditional if self.base == "conditional" else null
        d = conditional - null
        if not self.remembers and self.eta == 1.0 and self.threshold is None:
            return start + weight * d
        # The paper's d is unit * d below, and v = (D - x)/k has unit/k of it: 1 where nothing is remembered, even at
        # k = 0, where D is x.
        unit, share = k, 1.0
        if self._before:
            if isinstance(k, float) and k == 0.0:
                raise ValueError(
                    f'apg with momentum in space="{self.space}" has no velocity at t = {s:g}; end the grid before it, '
                    'or use space="velocity"'
                )
            before, size = self._before
            d, unit, share = k * d + (self.momentum * size) * before, 1.0, 1.0 / k
        along = prediction(self.space, x, conditional, k)
        gram, stored, _ = products(d, along, keep=int(self.remembers), dtype=x.dtype)
        square, overlap, _, length = gram.flatten(1).unbind(1)
        if self.remembers:
            d = lazy(stored[0])
            self._before[:] = d, unit
        factor: Any = share * weight
        if self.threshold is not None:
            limit = self.threshold * self.threshold  # min(1, r/||d||) = r/sqrt(max(||d||^2, r^2)), without 0/0
            factor = (factor * self.threshold) * (square * (unit * unit)).clamp_min(limit).rsqrt()
        guided = start + factor * d
        if self.eta == 1.0:
            return guided
        part = overlap / torch.where(length > 0.0, length, 1.0)  # none along a prediction of 0
        return guided - ((1.0 - self.eta) * factor * part) * along
