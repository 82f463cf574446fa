"""What a network predicts, and what that makes of its velocity and its jumps.

On the path x = a x1 + g x0 (a = alpha, g = sigma, ' = d/dt) every prediction P gives velocity and jump as
c_x x + c_p P with coefficients of the times alone, so each costs nothing until the next update evaluates it:

    prediction       velocity v                                    jump X_{s,t}, P frozen on the way
    velocity         P                                             x + (t-s) P
    data  P = x1     (g'/g) x + (a' - a g'/g) P                    (g_t/g_s) x + (a_t - a_s g_t/g_s) P
    noise P = x0     (a'/a) x + (g' - g a'/a) P                    (a_t/a_s) x + (g_t - g_s a_t/a_s) P
    score P = -x0/g  as noise with x0 = -g P
    ddpm_v           x1 = (a x - g P)/n, x0 = (g x + a P)/n, n = a^2 + g^2; v = a' x1 + g' x0; X = a_t x1 + g_t x0

The jump of a single-time prediction is DDIM, that is exponential Euler in P: exact where P is constant on the way.
Sources: Song et al. 2021 (DDIM), eq. 12; Salimans & Ho 2022, app. D (v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .interpolants import Interpolant, Linear

__all__ = [
    "PREDICTIONS",
    "velocity_coefficients",
    "linear_velocity_coefficients",
    "jump_coefficients",
    "mean_velocity_coefficients",
]

PREDICTIONS = ("mean_velocity", "velocity", "data", "noise", "ddpm_v", "score")
Pair = tuple[Any, Any]  # (c_x, c_p): floats or tensors of the times' shape


def _divide(numerator, denominator, prediction: str, t):
    """numerator / denominator, with a useful error where a float time makes it 0/0."""
    if not isinstance(denominator, Tensor) and denominator == 0.0:
        end = "data" if prediction == "data" else "noise"
        cure = (
            "end the grid below 1, or take the last step as a jump"
            if end == "data"
            else "start the grid above 0, e.g. 0.001"
        )
        raise ValueError(f'prediction="{prediction}" has no velocity or jump from t = {t}, the {end} end (0/0); {cure}')
    return numerator / denominator


def leading(s, t) -> Pair:
    """Two times of leading dimensions, (B,) and (B, F), say, brought to one number of dimensions: torch itself would
    align the last ones, and be silently wrong where B = F."""
    if isinstance(s, Tensor) and isinstance(t, Tensor) and s.dim() != t.dim() and min(s.dim(), t.dim()) > 0:
        dims = max(s.dim(), t.dim())
        s, t = (each.reshape(*each.shape, *(1,) * (dims - each.dim())) for each in (s, t))
        return tuple(torch.broadcast_tensors(s, t))
    return s, t


def velocity_coefficients(prediction: str, path: Interpolant, t) -> Pair:
    """(c_x, c_p) with v = c_x x + c_p P at time t."""
    if prediction in ("velocity", "mean_velocity"):
        return 0.0, 1.0
    if prediction == "data" and isinstance(path, Linear):
        inverse = _divide(1.0, 1.0 - t, prediction, t)  # a' - a g'/g = 1 + t/(1-t), without the cancellation
        return -inverse, inverse
    a, g = path.alpha(t), path.sigma(t)
    if prediction == "data":
        ratio = _divide(1.0, g, prediction, t) * path.sigma_derivative(t)
        return ratio, path.alpha_derivative(t) - a * ratio
    da, dg = path.alpha_derivative(t), path.sigma_derivative(t)
    if prediction == "ddpm_v":
        n = a * a + g * g
        return (a * da + g * dg) / n, (a * dg - g * da) / n
    ratio = _divide(da, a, prediction, t)
    c_noise = dg - g * ratio
    return (ratio, c_noise) if prediction == "noise" else (ratio, -g * c_noise)


def linear_velocity_coefficients(prediction: str, path: Interpolant, t) -> Pair:
    """(c_x, c_p) with b = x1 - x0 = c_x x + c_p P at time t: the velocity of the linear path through the same point.

    x1 and x0 are the data and noise predictions at (x, t). On the linear path this is `velocity_coefficients`. From a
    velocity v = a' x1 + g' x0, with w = a g' - a' g:  b = ((a' + g') x - (a + g) v) / w.
    """
    if isinstance(path, Linear):
        return velocity_coefficients(prediction, path, t)
    a, g = path.alpha(t), path.sigma(t)
    if prediction in ("velocity", "mean_velocity"):
        da, dg = path.alpha_derivative(t), path.sigma_derivative(t)
        w = a * dg - da * g
        return (da + dg) / w, -(a + g) / w
    if prediction == "data":
        inverse = _divide(1.0, g, prediction, t)
        return -inverse, 1.0 + a * inverse
    if prediction == "ddpm_v":
        n = a * a + g * g
        return (a - g) / n, -(a + g) / n
    inverse = _divide(1.0, a, prediction, t)
    c_noise = -1.0 - g * inverse
    return (inverse, c_noise) if prediction == "noise" else (inverse, -g * c_noise)


def jump_coefficients(prediction: str, path: Interpolant, s, t) -> Pair:
    """(c_x, c_p) with X_{s,t}(x) = c_x x + c_p P."""
    s, t = leading(s, t)
    if prediction in ("velocity", "mean_velocity"):
        return 1.0, t - s
    if prediction == "data" and isinstance(path, Linear):
        inverse = _divide(1.0, 1.0 - s, prediction, s)
        return (1.0 - t) * inverse, (t - s) * inverse
    a_s, g_s, a_t, g_t = path.alpha(s), path.sigma(s), path.alpha(t), path.sigma(t)
    if prediction == "data":
        ratio = _divide(g_t, g_s, prediction, s)
        return ratio, a_t - a_s * ratio
    if prediction == "ddpm_v":
        n = a_s * a_s + g_s * g_s
        return (a_t * a_s + g_t * g_s) / n, (g_t * a_s - a_t * g_s) / n
    ratio = _divide(a_t, a_s, prediction, s)
    c_noise = g_t - g_s * ratio
    return (ratio, c_noise) if prediction == "noise" else (ratio, -g_s * c_noise)


def mean_velocity_coefficients(prediction: str, path: Interpolant, s, t) -> Pair:
    """(c_x, c_p) with u_{s,t} = (X_{s,t}(x) - x) / (t - s), and its limit, the velocity, where t = s."""
    if prediction in ("velocity", "mean_velocity"):
        return 0.0, 1.0
    if prediction == "data" and isinstance(path, Linear):
        return velocity_coefficients(prediction, path, s)  # (D - x)/(1-s), whatever t
    if not isinstance(s, Tensor) and not isinstance(t, Tensor):
        if s == t:
            return velocity_coefficients(prediction, path, s)
        c_x, c_p = jump_coefficients(prediction, path, s, t)
        return (c_x - 1.0) / (t - s), c_p / (t - s)
    s, t = torch.broadcast_tensors(*leading(torch.as_tensor(s), torch.as_tensor(t)))
    dtype = torch.promote_types(s.dtype, t.dtype)
    s, t = s.double(), t.double()  # c_x - 1 cancels: in float32 a short span would lose its digits
    still = s == t
    span = torch.where(still, torch.ones_like(s), t - s)  # where's gradient is NaN if the unused branch divides by 0
    c_x, c_p = jump_coefficients(prediction, path, s, t)
    v_x, v_p = velocity_coefficients(prediction, path, s)
    pick: Callable = lambda v, u: torch.where(still, torch.as_tensor(v, dtype=u.dtype), u)  # noqa: E731
    return pick(v_x, (c_x - 1.0) / span).to(dtype), pick(v_p, c_p / span).to(dtype)
