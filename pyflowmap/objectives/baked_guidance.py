"""Guidance that is trained into the network, so that sampling needs one evaluation per step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algebra import evaluate, lazy
from ..flow_map import FlowMap
from ..guidance import cfg, without
from ..times import uniform
from .loss import frozen_teacher

__all__ = ["baked_guidance", "dropped_condition"]


@dataclass(frozen=True)
class baked_guidance:
    """The guided velocity that a flow map is trained on in place of the path's velocity b:

        b_g = omega b + (1 - omega - kappa) v_s(x | null) + kappa v_s(x | condition)

    Geng et al. 2025 (MeanFlow), eq. 21. In expectation it is classifier-free guidance of scale omega / (1 - kappa), and
    such a network is sampled *without* guidance.

    omega     weight of the path's own velocity; 1 with kappa = 0 is no guidance
    kappa     in [0, 1): how much of the conditional velocity is the network's own
    null      the condition that means "none", e.g. {"label": 10}; as for `pfm.guidance.cfg`
    interval  (lo, hi): only rows with lo <= s <= hi are guided
    drop      share of rows that get the null condition and b_g = b, so that the network learns v(x | null). Where the
              training loop drops conditions already, a dropped row would be guided: let one of the two do it

    One network evaluation without gradient, two where kappa > 0.
    """

    omega: float
    kappa: float = 0.0
    null: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    drop: float = 0.1

    def __post_init__(self):
        if not math.isfinite(self.omega) or not 0.0 <= self.kappa < 1.0:
            raise ValueError(
                f"omega = {self.omega}, kappa = {self.kappa}; omega is finite and kappa in [0, 1), e.g. 1.0 and 0.5"
            )
        if not 0.0 <= self.drop <= 1.0:
            raise ValueError(f"drop = {self.drop}; it is a share of the batch, e.g. 0.1")
        cfg(self.omega, null=self.null, interval=self.interval)  # checks them

    def __call__(
        self,
        flow_map: FlowMap,
        x: Tensor,
        s: Tensor,
        velocity: Tensor,
        condition: dict[str, Any],
        seed: int | None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(b_g, the condition with rows dropped)."""
        null = without(condition, self.null)
        dropped = uniform(s, seed=None if seed is None else seed + 2, sample_ids=sample_ids) < self.drop
        kept = dropped_condition(condition, null, self.null, dropped) if self.drop > 0.0 else condition
        guided = ~dropped
        if self.interval is not None:
            guided = guided & (s >= self.interval[0]) & (s <= self.interval[1])
        share = guided.to(s.dtype)

        result = (1.0 + (self.omega - 1.0) * share) * lazy(velocity)
        with frozen_teacher(flow_map.network):
            for weight, given in ((1.0 - self.omega - self.kappa, null), (self.kappa, condition)):
                if weight != 0.0:
                    output = flow_map.output(x, s, s, given)
                    result = result + (weight * share) * flow_map.as_velocity(output, x, s)
            return evaluate(result, dtype=velocity.dtype), kept


def dropped_condition(
    condition: Mapping[str, Any], null: Mapping[str, Any], names: Iterable[str], dropped: Tensor
) -> dict[str, Any]:
    """The condition, and in the rows that are `dropped` (B,) the null condition in its place."""
    result = dict(condition)
    for key in names:
        value, none = condition[key], null.get(key)
        if not isinstance(value, Tensor) or value.shape[:1] != dropped.shape or not isinstance(none, Tensor):
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"condition {key!r} ({shown}) cannot be dropped for {len(dropped)} rows one by one; pass a tensor "
                "with a row each and a number or tensor as its null, or drop=0"
            )
        result[key] = torch.where(dropped.reshape(-1, *[1] * (value.dim() - 1)), none, value)
    return result
