"""Interpolants x_t = alpha(t) x1 + sigma(t) x0 between noise x0 (t = 0) and data x1 (t = 1).

Each is a frozen, stateless description: the two coefficients and their exact derivatives, of a float
(computed in float64 on the host) or of a tensor of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .algebra import Lazy, evaluate, lazy, noise

__all__ = ["Interpolant", "Linear", "Trigonometric", "VariancePreserving", "check_time"]


_SLACK = 1e-2  # beyond the ends, for rounded times and for differences


def _cure(t: float) -> str:
    return "; a network that wants 0 to 1000 gets it from call=" if t > 2.0 else ""


def check_time(t: float | Tensor, x: Tensor, name: str = "t") -> float | Tensor:
    """Return `t` as a float or as a tensor of the leading dimensions of `x`; raise where it is neither.

    NaN, and times outside [0, 1] by more than 0.01, are looked for in floats and in CPU tensors. A CUDA tensor is not
    read, because reading it would make the host wait for the device; a NaN time there shows as a NaN state, which
    `pfm.sample` reports.
    """
    if not isinstance(t, Tensor):
        value = float(t)
        if not math.isfinite(value):
            raise ValueError(f"{name} = {value} is not a time; pass a finite number, 0 = noise to 1 = data")
        if not -_SLACK <= value <= 1.0 + _SLACK:
            raise ValueError(f"{name} = {value:g}; times run from 0 = noise to 1 = data{_cure(value)}")
        return value
    if t.shape != x.shape[: t.dim()] or t.dim() > x.dim():
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} but the state has shape {tuple(x.shape)}; "
            f"times take the leading dimensions, e.g. ({x.shape[0] if x.dim() else ''},), or a float"
        )
    if not t.is_floating_point():
        raise TypeError(f"{name} has dtype {t.dtype}; times are floating point, use {name}.float()")
    if t.device != x.device and t.dim() > 0:
        raise ValueError(f"{name} is on {t.device} but the state is on {x.device}; use {name}.to({str(x.device)!r})")
    readable = type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling()
    # A value under functorch (vmap, jvp) cannot steer Python.
    if readable and not torch._C._functorch.is_functorch_wrapped_tensor(t) and t.numel() > 0:
        low, high = (end.item() for end in t.detach().aminmax())
        if not (low >= -_SLACK and high <= 1.0 + _SLACK):
            if math.isnan(low):
                raise ValueError(f"{name} contains NaN; times are finite, 0 = noise to 1 = data")
            bad = low if low < -_SLACK else high
            raise ValueError(f"{name} contains {bad:g}; times run from 0 = noise to 1 = data{_cure(bad)}")
    return t


class Interpolant:
    """The four coefficient functions, and `draw`. Subclasses are frozen dataclasses."""

    def alpha(self, t):
        """Coefficient of the data x1."""
        raise NotImplementedError

    def sigma(self, t):
        """Coefficient of the noise x0."""
        raise NotImplementedError

    def alpha_derivative(self, t):
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_derivative(self, t):
        """d sigma / dt."""
        raise NotImplementedError

    # ---- the linear path through the same points: x = X/(alpha + sigma), t = alpha/(alpha + sigma) -------------------

    def scale(self, r):
        """alpha + sigma: X on this path is scale(r) times its point on the linear path."""
        return self.alpha(r) + self.sigma(r)

    def linear_time(self, r):
        """t = alpha/(alpha + sigma): the linear path's time for this path's time r."""
        return self.alpha(r) / self.scale(r)

    def model_time(self, t):
        """The inverse of `linear_time`. Here by bisection, of a float; subclasses have closed forms."""
        if isinstance(t, Tensor):
            raise NotImplementedError(
                f"{type(self).__name__} has no model_time of a tensor; define it for per-sample times"
            )
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.linear_time(middle) < t else (low, middle)
        return 0.5 * (low + high)

    def draw(
        self,
        x1: Tensor,  # (B, ...) data
        t: float | Tensor,  # float, (B,) or any leading dimensions of x1
        x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,  # (B,)
    ) -> tuple[Tensor, Tensor]:
        """A point on the path and its velocity, in one launch.

            x_t = alpha(t) x1 + sigma(t) x0,      dx_t/dt = alpha'(t) x1 + sigma'(t) x0

        Both have the shape and dtype of `x1`. With `x0=None` the noise is drawn inside the kernel from
        (seed, sample id) and never stored; without a seed one is taken from torch's generator.

        Raises ValueError where `t` is NaN or has other than leading dimensions of `x1`, or `x0` another shape.

        >>> x, v = Linear().draw(torch.ones(2, 3), 0.25, x0=torch.zeros(2, 3))
        >>> x[0, 0].item(), v[0, 0].item()
        (0.25, 1.0)
        """
        t = check_time(t, x1)
        if x0 is not None and x0.shape != x1.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}; give them one shape")
        data = lazy(x1)
        start: Lazy = lazy(x0) if x0 is not None else noise(x1, seed=seed, sample_ids=sample_ids)
        return evaluate(
            self.alpha(t) * data + self.sigma(t) * start,
            self.alpha_derivative(t) * data + self.sigma_derivative(t) * start,
        )


@dataclass(frozen=True)
class Linear(Interpolant):
    """x_t = t x1 + (1 - t) x0: rectified flow, the library's default.

    Liu et al. 2023 (Rectified Flow), eq. 1; Lipman et al. 2023, eq. 22 with sigma_min = 0.
    """

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1.0 - t

    def alpha_derivative(self, t):
        return torch.ones_like(t) if isinstance(t, Tensor) else 1.0

    def sigma_derivative(self, t):
        return -torch.ones_like(t) if isinstance(t, Tensor) else -1.0

    def scale(self, r):
        return torch.ones_like(r) if isinstance(r, Tensor) else 1.0

    def linear_time(self, r):
        return r

    def model_time(self, t):
        return t


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0, so alpha^2 + sigma^2 = 1.

    Albergo & Vanden-Eijnden 2023, eq. 15; with theta = pi (1 - t) / 2 it is TrigFlow (Lu & Song 2024).
    """

    def alpha(self, t):
        return torch.sin(0.5 * math.pi * t) if isinstance(t, Tensor) else math.sin(0.5 * math.pi * t)

    def sigma(self, t):
        # sin of the complement: exact 0 at t = 1, where cos(pi/2) leaves 6e-17.
        return self.alpha(1.0 - t)

    def alpha_derivative(self, t):
        return 0.5 * math.pi * self.sigma(t)

    def sigma_derivative(self, t):
        return -0.5 * math.pi * self.alpha(t)

    def model_time(self, t):
        angle = torch.atan2(t, 1.0 - t) if isinstance(t, Tensor) else math.atan2(t, 1.0 - t)
        return angle * (2.0 / math.pi)


@dataclass(frozen=True)
class VariancePreserving(Interpolant):
    """The diffusion path of a linear noise rate, T = 1 - t:

        alpha = exp(-(b1 - b0) T^2 / 4 - b0 T / 2),      sigma^2 = 1 - alpha^2

    Song et al. 2021, eq. 33, in time running from noise to data. `sigma` meets the data end with an infinite slope:
    `sigma_derivative` is finite for t < 1 only, and alpha(0) = exp(-(b0 + b1) / 4) is small but not 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"beta_min = {self.beta_min}, beta_max = {self.beta_max}; need 0 < beta_min <= beta_max, e.g. 0.1, 20"
            )

    def _log_alpha(self, t):
        remaining = 1.0 - t
        return -0.25 * (self.beta_max - self.beta_min) * remaining * remaining - 0.5 * self.beta_min * remaining

    def alpha(self, t):
        return torch.exp(self._log_alpha(t)) if isinstance(t, Tensor) else math.exp(self._log_alpha(t))

    def sigma(self, t):
        # expm1 keeps the digits of 1 - alpha^2 near the data end.
        if isinstance(t, Tensor):
            return torch.sqrt(-torch.expm1(2.0 * self._log_alpha(t)))
        return math.sqrt(-math.expm1(2.0 * self._log_alpha(t)))

    def alpha_derivative(self, t):
        return self.alpha(t) * (0.5 * (self.beta_max - self.beta_min) * (1.0 - t) + 0.5 * self.beta_min)

    def sigma_derivative(self, t):
        if not isinstance(t, Tensor) and t >= 1.0:
            raise ValueError(
                f"sigma_derivative is infinite at t = {t} on the variance-preserving path; stop below 1, e.g. 0.9999"
            )
        return -self.alpha(t) * self.alpha_derivative(t) / self.sigma(t)

    def model_time(self, t):
        # sigma/alpha = (1-t)/t = S, alpha^2 = 1/(1 + S^2); -log alpha is a quadratic of the remaining time.
        numbers: Any = torch if isinstance(t, Tensor) else math
        ratio = (1.0 - t) / t if isinstance(t, Tensor) or t > 0.0 else math.inf
        rate = 0.5 * numbers.log1p(ratio * ratio)
        half, slope = 0.5 * self.beta_min, 0.25 * (self.beta_max - self.beta_min)
        return 1.0 - 2.0 * rate / (half + numbers.sqrt(half * half + 4.0 * slope * rate))
