"""Rescaling: guidance widens the prediction; this brings its standard deviation back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..algebra import Lazy
from .guidance import Around, Ask, Guidance, finite, remembering
from .space import check_space, check_velocity, prediction, products, slope

__all__ = ["rescale"]


@dataclass(frozen=True)
class rescale(Around):
    """P' = phi P std(P_cond)/std(P) + (1 - phi) P, std over all of a sample. Lin et al. 2024, eq. 15 and 16.

    of     the guidance whose result P is, e.g. cfg(7.5, null=...)
    phi    0 is none; 0.7 in the paper
    space  of P: the paper rescales what its network predicts, a velocity; or "data" or "noise". A jump has "velocity"
           only

    A P whose standard deviation is 0 up to rounding is left as it is. One reduction launch per evaluation, besides
    those of `of`.

    >>> from pyflowmap.guidance import cfg
    >>> rescale(cfg(7.5, null={"label": 10})).evaluations(0.5)
    2
    """

    of: Guidance
    phi: float = 0.7
    space: str = "velocity"

    def __post_init__(self):
        super().__post_init__()
        if self.of is None:
            raise TypeError("of = None; pass the guidance to rescale, e.g. pfm.guidance.cfg(7.5, null=...)")
        check_space("rescale", self.space)
        finite("phi", self.phi, "0.7", at_least=0.0)
        if self.phi > 1.0:
            raise ValueError(f"phi = {self.phi}; it lies between 0 and 1, e.g. 0.7")

    def check(self, solver: Any, grad: bool | str = False) -> None:
        super().check(solver, grad)
        check_velocity("rescale", self.space, solver)

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        if self.phi == 0.0:
            return self.inner(ask, x, s, t)
        k = slope("rescale", self.space, s, t)
        asked, seen = remembering(ask)
        guided = self.inner(asked, x, s, t)
        conditional = seen[0] if 0 in seen else ask(0)[0]
        if guided is conditional:  # outside an interval
            return guided
        count = x.shape[1:].numel()
        if count < 2:
            raise ValueError(f"rescale: a sample of shape {tuple(x.shape[1:])} has no standard deviation")
        # With r = std(P_cond)/std(P), v' = v + phi (r - 1)/k P. r - 1 = k e / (var(P) (1 + r)) has no quotient by k:
        # k e = var(P_cond) - var(P), e = 2 cov(d, P) + k var(d), d = v_cond - v.
        wide = prediction(self.space, x, guided, k)
        gram, _, sums = products(conditional - guided, wide, prediction(self.space, x, conditional, k), sums=True)
        covariance = gram - sums[:, :, None] * sums[:, None, :] / count
        spread = covariance[:, 1, 1]
        flat = spread <= 8.0 * torch.finfo(gram.dtype).eps * gram[:, 1, 1]
        safe = torch.where(flat, 1.0, spread)
        narrow = covariance[:, 2, 2]
        positive = narrow > 0.0
        ratio = torch.where(positive, (torch.where(positive, narrow, 1.0) / safe).sqrt(), 0.0)
        change = (2.0 * covariance[:, 0, 1] + k * covariance[:, 0, 0]) / (safe * (1.0 + ratio))
        return guided + (self.phi * torch.where(flat, 0.0, change)) * wide
