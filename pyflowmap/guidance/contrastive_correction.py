"""What contrastive flow matching added to a network's velocity, taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algebra import Lazy, lazy
from .guidance import Around, Ask, Guidance, check_interval, finite, outside

__all__ = ["contrastive_correction"]


@dataclass(frozen=True, eq=False)
class contrastive_correction(Around):
    """v' = (1 - strength) v + strength mean, for networks trained with `objectives.contrastive`, whose velocity is
    (v - strength mean)/(1 - strength). Stoica et al. 2025 (Delta FM), their sampler's "latent bias".

    strength  lambda of the training, over the share of rows that were contrasted
    mean      E[u], on the linear path the mean of the data: a tensor of the shape of one sample
    of        a guidance to correct, e.g. cfg(3.0, null=...); None: what the network returns. Exact with cfg where the
              null rows were contrasted in training too
    interval  (t_lo, t_hi): correct only while t_lo <= s <= t_hi

    Takes one network evaluation, or those of `of`.
    """

    strength: float
    mean: Tensor
    of: Guidance | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        finite("strength", self.strength, "0.05", at_least=0.0)
        if self.strength >= 1.0:
            raise ValueError(f"strength = {self.strength}; it lies in [0, 1), e.g. 0.05")
        if not isinstance(self.mean, Tensor):
            raise TypeError(
                f"mean is {type(self.mean).__name__}; it is the mean of the data, a tensor of one sample's shape"
            )
        check_interval(self.interval)

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        v = self.inner(ask, x, s, t)
        if outside(self.interval, s):
            return v
        if self.mean.shape != x.shape[1:]:
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)} but a sample has {tuple(x.shape[1:])}; give it that shape"
            )
        return (1.0 - self.strength) * v + self.strength * lazy(self.mean.expand(x.shape))
