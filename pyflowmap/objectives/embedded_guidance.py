"""Guidance as an input of the network: the scale is chosen at sampling, still with one evaluation per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate, lazy
from ..guidance import cfg, without
from ..times import uniform
from .baked_guidance import dropped_condition
from .batch import Batch

__all__ = ["embedded_guidance"]


@dataclass(frozen=True)
class embedded_guidance:
    """The guided velocity of a network that is told the scale omega, drawn anew for each row:

        b_g = b + (1 - 1/omega) (v_s(x | condition, omega) - v_s(x | null, omega)),    density of omega ~ omega^-beta

    Geng et al. 2025 (improved MeanFlow). Where the network has learned v(x | condition, omega) = E[b_g], this is
    classifier-free guidance of scale omega: v_null + omega (E[b] - v_null); omega = 1 is none.

    null      the condition that means "none", e.g. {"label": 10}; as for `pfm.guidance.cfg`
    scale     the keyword under which the network is given omega, (B,); embed 1 - 1/omega
    interval  two keywords, e.g. ("start", "stop"): the network is also given an interval of times, (B,) each, outside
              of which rows are not guided: start ~ U(0, 1/2), stop ~ U(1/2, 1). None: guided at all times
    largest   omega lies in [1, largest]
    beta      how fast large omega become rare; 1: omega = largest^U
    drop      share of rows that get the null condition and b_g = b, so that the network learns v(x | null). Where the
              training loop drops conditions already, a dropped row would be guided: let one of the two do it

    Sample with condition={"label": y, "omega": torch.full((B,), 3.0)} and no guidance. Two evaluations without
    gradient.

    >>> omega = embedded_guidance(null={"label": 10}).law(torch.tensor([0.0, 0.5, 1.0]))
    >>> [round(each, 3) for each in omega.tolist()]
    [1.0, 2.828, 8.0]
    """

    null: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "omega"
    interval: tuple[str, str] | None = None
    largest: float = 8.0
    beta: float = 1.0
    drop: float = 0.1

    def __post_init__(self):
        cfg(2.0, null=self.null)  # checks it
        if not 1.0 <= self.largest < math.inf or not math.isfinite(self.beta):
            raise ValueError(
                f"largest = {self.largest}, beta = {self.beta}; omega lies in [1, largest] with density omega^-beta, "
                "e.g. 8.0 and 1.0"
            )
        if not 0.0 <= self.drop <= 1.0:
            raise ValueError(f"drop = {self.drop}; it is a share of the batch, e.g. 0.1")
        names = (self.scale, *(self.interval or ()))
        if len(names) not in (1, 3) or len(set(names)) < len(names) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"scale = {self.scale!r}, interval = {self.interval!r}; they are one and two keywords of the network, "
                'e.g. "omega" and ("start", "stop")'
            )

    def law(self, share: Tensor) -> Tensor:
        """omega below which this share of the draws lies: the inverse of its distribution function."""
        power = 1.0 - self.beta
        width = math.log(self.largest)
        if abs(power * width) < 1e-6:  # of omega^power the limit
            return torch.exp(share * width)
        return torch.exp(torch.log1p(share * math.expm1(power * width)) / power)

    def inputs(self, x: Tensor, seed: int | None, sample_ids: Tensor | None) -> dict[str, Tensor]:
        """What the network is told beside its condition, (B,) each."""

        def draw(k: int) -> Tensor:
            return uniform(x, seed=None if seed is None else seed + k, sample_ids=sample_ids)

        told = {self.scale: self.law(draw(3))}
        if self.interval is not None:
            told |= {self.interval[0]: 0.5 * draw(4), self.interval[1]: 0.5 + 0.5 * draw(5)}
        return told

    def __call__(self, batch: Batch, predict: Callable[[Batch], Lazy], seed: int | None) -> tuple[Batch, Tensor]:
        """(the batch with b_g and all that the network is told, the network's own v_s(x) for it)."""
        x, s = batch.x, batch.s
        told = self.inputs(x, seed, batch.sample_ids)
        taken = [name for name in told if name in batch.condition]
        if taken:
            raise ValueError(
                f"condition {taken[0]!r} is given, but embedded_guidance draws it; leave it out, or rename it there"
            )
        null = without(batch.condition, self.null)
        dropped = uniform(x, seed=None if seed is None else seed + 2, sample_ids=batch.sample_ids) < self.drop
        kept = batch.condition if self.drop == 0.0 else dropped_condition(batch.condition, null, self.null, dropped)

        share = 1.0 - 1.0 / told[self.scale]
        if self.interval is not None:
            start, stop = (told[name] for name in self.interval)
            share = share * ((s >= start) & (s <= stop)).to(s.dtype)
        # A dropped row is asked twice under the null condition: the difference is 0, and b_g = b.
        with torch.no_grad():
            conditional = predict(replace(batch, condition={**kept, **told}))
            alone = predict(replace(batch, condition={**null, **told}))
            velocity, own = evaluate(
                lazy(batch.velocity) + share * (conditional - alone), conditional, dtype=batch.velocity.dtype
            )
        return replace(batch, velocity=velocity, condition={**kept, **told}), own
