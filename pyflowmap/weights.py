"""Weights turn the squared error of each sample into its loss. They are plain torch on (B,) numbers.

A weight is called as `weight(error, s=s, t=t, size=D)`: `error` (B,) is the *sum* of squares over a sample, `s`, `t`
its times, `size` the number of elements of a sample. It returns the (B,) losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["constant", "adaptive", "power", "pseudo_huber", "given", "learned"]


def _normalised(error: Tensor, norm: str, size: int | None, name: str) -> Tensor:
    if norm == "sum":
        return error
    if size is None:
        raise ValueError(f'{name}: norm="mean" needs the number of elements of a sample; pass size=x[0].numel()')
    return error / size


def _check_norm(norm: str) -> None:
    if norm not in ("sum", "mean"):
        raise ValueError(f'norm = {norm!r}; it is "sum" or "mean"')


@dataclass(frozen=True)
class constant:
    """loss = value * error, of the sum or of the mean of the squares."""

    value: float = 1.0
    norm: str = "mean"

    def __post_init__(self):
        _check_norm(self.norm)

    def __call__(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        return self.value * _normalised(error, self.norm, size, "constant")


@dataclass(frozen=True)
class adaptive:
    """loss = e / sg(e + c)^p: every sample pulls about equally. Geng et al. 2025 (MeanFlow), eq. 22.

    p = 0 is the plain squared error, p = 0.5 like a pseudo-Huber loss, p = 1 the paper's default.

    >>> adaptive(p=1.0, c=0.0)(torch.tensor([4.0, 9.0]))
    tensor([1., 1.])
    """

    p: float = 1.0
    c: float = 0.01
    norm: str = "sum"

    def __post_init__(self):
        _check_norm(self.norm)
        if not self.c >= 0.0:
            raise ValueError(f"c = {self.c}; it must be >= 0, e.g. 0.01")

    def __call__(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        error = _normalised(error, self.norm, size, "adaptive")
        return error / (error.detach() + self.c) ** self.p


@dataclass(frozen=True)
class power:
    """loss = base^exponent * error with base "t", "1-t", "s" or "1-s".

    `power(-2, "1-s")` makes a data prediction count as a velocity: ||dv||^2 = ||dD||^2 / (1-s)^2.
    `floor` bounds the base from below, so that a negative exponent stays finite at the ends.
    """

    exponent: float
    base: str = "1-s"
    norm: str = "mean"
    floor: float = 1e-3

    def __post_init__(self):
        _check_norm(self.norm)
        if self.base not in ("s", "t", "1-s", "1-t"):
            raise ValueError(f'base = {self.base!r}; it is "s", "t", "1-s" or "1-t"')

    def __call__(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        time = s if self.base.endswith("s") else t
        if time is None:
            raise ValueError(
                f"power({self.exponent}, {self.base!r}) needs the time {self.base[-1]}; pass {self.base[-1]}="
            )
        base = 1.0 - time if self.base.startswith("1-") else time
        base = base.clamp(min=self.floor) if isinstance(base, Tensor) else max(base, self.floor)
        return _normalised(error, self.norm, size, "power") * base**self.exponent


@dataclass(frozen=True)
class pseudo_huber:
    """loss = (sqrt(e + c^2) - c) / (sigma_s - sigma_t), sigma = (1-t)/t: like ||.|| far off, like e / (2c) near 0.

    Song & Dhariwal 2024 (iCT), table 1; ECT is c = 0, the norm itself, *not squared*. `e` is the sum of
    squares by default: iCT's c = 0.00054 sqrt(D) is `pseudo_huber(0.00054, norm="mean")` times sqrt(D).

    per   "sigma_gap" divides by the difference of the two noise levels, in times of the linear path; a pair without
          one (s >= t) weighs nothing. None does not divide

    >>> pseudo_huber(c=3.0, per=None)(torch.tensor([0.0, 16.0]))
    tensor([0., 2.])
    """

    c: float = 0.0
    norm: str = "sum"
    per: str | None = "sigma_gap"

    def __post_init__(self):
        _check_norm(self.norm)
        if not 0.0 <= self.c < math.inf:
            raise ValueError(f"c = {self.c}; it is a number from 0 up, e.g. 0.00054")
        if self.per not in (None, "sigma_gap"):
            raise ValueError(f'per = {self.per!r}; it is "sigma_gap" or None')

    def __call__(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        error = _normalised(error, self.norm, size, "pseudo_huber")
        # Where both are 0 the root has no derivative, and the error's own is 0: the loss and its gradient are 0.
        still = error + self.c * self.c <= 0.0
        root = torch.sqrt(torch.where(still, torch.ones_like(error), error + self.c * self.c))
        loss = torch.where(still, torch.zeros_like(error), error / (root + self.c))  # the difference, not cancelled
        if self.per is None:
            return loss
        if s is None or t is None:
            raise ValueError("pseudo_huber divides by the gap of the noise levels; pass s= and t=, or per=None")
        gap = (t - s) / (s * t)  # (1-s)/s - (1-t)/t
        return torch.where(gap > 0.0, loss / torch.where(gap > 0.0, gap, torch.ones_like(gap)), torch.zeros_like(loss))


@dataclass(frozen=True)
class given:
    """loss = function(s, t) * error: a weight of one's own."""

    function: Callable[[Tensor, Tensor], Tensor]
    norm: str = "mean"

    def __post_init__(self):
        _check_norm(self.norm)

    def __call__(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        return self.function(s, t) * _normalised(error, self.norm, size, "given")


class learned(nn.Module):
    """loss = exp(-w) e + w with a small network w(s, t): each pair of times ends up counting equally.

    At the optimum w = log E[e]. Karras et al. 2024 (EDM2), eq. 14; Boffi et al. 2025 for two times.
    `w` is clamped to `bounds`: unbounded, the weighted loss can fall while the raw error explodes. `e` is the mean of
    squares by default, so that log e lies inside the bounds. Train its parameters with the network's.
    """

    frequency: Tensor

    def __init__(self, channels: int = 64, bounds: tuple[float, float] = (-4.0, 4.0), norm: str = "mean"):
        super().__init__()
        _check_norm(norm)
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds = {bounds}; the lower must be below the upper, e.g. (-4, 4)")
        self.bounds, self.norm = bounds, norm
        self.register_buffer("frequency", 2.0 ** torch.linspace(0, 4, channels) * math.pi, persistent=False)
        self.head = nn.Linear(4 * channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def log_error(self, s: Tensor, t: Tensor) -> Tensor:
        """w(s, t), shape (B,)."""
        angle = torch.cat([s.reshape(-1, 1) * self.frequency, t.reshape(-1, 1) * self.frequency], 1)
        w = self.head(torch.cat([angle.cos(), angle.sin()], 1)).reshape(s.shape)
        return w.clamp(*self.bounds)

    def forward(self, error: Tensor, *, s=None, t=None, size: int | None = None) -> Tensor:
        if s is None or t is None:
            raise ValueError("learned weight needs both times; pass s= and t=")
        w = self.log_error(s, t)
        return torch.exp(-w) * _normalised(error, self.norm, size, "learned") + w
