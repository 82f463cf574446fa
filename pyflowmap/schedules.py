"""Grids of times to sample along: lists of steps + 1 increasing times, 0 = noise to 1 = data, in float64.

    >>> import pyflowmap as pfm
    >>> fm = pfm.FlowMap(lambda x, s: -x, prediction="velocity")
    >>> x = pfm.sample(fm, torch.ones(2, 3), grid=pfm.schedules.shifted(4, 3.0), solver="heun")

The times are those of the linear path, x_t = t x1 + (1-t) x0; u = k/steps below. The noise level of Karras et al. is
S = (1-t)/t, t = 1/(1+S), and 1 - t is the "sigma" of flow matching codes whose time falls from 1 = noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

__all__ = [
    "uniform",
    "shifted",
    "flux_shift",
    "sd3_shift",
    "cosine",
    "power",
    "logit_uniform",
    "logit_normal",
    "karras",
    "align_your_steps",
]


def uniform(steps: int) -> list[float]:
    """t = u: equal steps.

    >>> uniform(4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return _grid(steps, lambda u: u)


def shifted(steps: int, shift: float) -> list[float]:
    """t = u / (shift + (1 - shift) u), that is logit t = logit u - log shift. Esser et al. 2024 (SD3), eq. 23.

    shift > 1 puts more steps near the noise, for larger pictures; shifts compose by multiplication. `flux_shift` and
    `sd3_shift` compute it; 3 is what SD3 ships with.

    >>> shifted(2, 3.0)
    [0.0, 0.25, 1.0]
    """
    _positive("shift", shift)
    return _grid(steps, lambda u: u / (shift + (1.0 - shift) * u))


def flux_shift(tokens: int) -> float:
    """The shift of FLUX.1 for so many image tokens: exp(mu), mu linear with 256 -> 0.5 and 4096 -> 1.15.

    Black Forest Labs 2024, reference code. A picture of 1024 x 1024 has 4096 tokens: 16 x 16 pixels each.

    >>> round(flux_shift(4096), 4)
    3.1582
    """
    _positive("tokens", tokens)
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def sd3_shift(dims: float, base_dims: float) -> float:
    """sqrt(dims / base_dims): what keeps the uncertainty that a noise level leaves, for pictures of `dims` pixels in
    place of the `base_dims` that the schedule was made for. Esser et al. 2024 (SD3), eq. 23.

    >>> sd3_shift(1024 * 1024, 512 * 512)
    2.0
    """
    _positive("dims", dims)
    _positive("base_dims", base_dims)
    return math.sqrt(dims / base_dims)


def cosine(steps: int) -> list[float]:
    """t = (1 - cos(pi u)) / 2: short steps at both ends, the Chebyshev spacing.

    >>> [round(t, 4) for t in cosine(4)]
    [0.0, 0.1464, 0.5, 0.8536, 1.0]
    """
    return _grid(steps, lambda u: math.sin(0.5 * math.pi * u) ** 2)


def power(steps: int, exponent: float = 2.0) -> list[float]:
    """t = u^exponent: above 1 the shorter steps lie near the noise, below 1 near the data. RiT's "power2" is 2.

    >>> power(4)
    [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """
    _positive("exponent", exponent)
    return _grid(steps, lambda u: u**exponent)


def logit_uniform(steps: int, eps: float = 1e-3) -> list[float]:
    """logit t linear in u between logit eps and logit (1 - eps), the ends then moved to 0 and 1.

    Equal steps of half the log signal-to-noise ratio, log(t/(1-t)): the grid for solvers that are polynomial in it
    (the DPM-Solver family). The two outermost steps span what lies beyond eps. Lu et al. 2022 (DPM-Solver).

    >>> [round(t, 4) for t in logit_uniform(4, eps=0.01)]
    [0.0, 0.0913, 0.5, 0.9087, 1.0]
    """
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps = {eps}; it lies strictly between 0 and 0.5, e.g. 1e-3")
    span = math.log(eps) - math.log1p(-eps)
    return _grid(steps, lambda u: _sigmoid((1.0 - 2.0 * u) * span))


def logit_normal(steps: int, mean: float = 0.0, std: float = 1.0) -> list[float]:
    """t = sigmoid(mean + std z_u), z_u the quantile u of the standard normal law: steps as dense as the training times
    of Esser et al. 2024 (SD3), eq. 19. A negative mean puts more of them near the noise.

    >>> [round(t, 4) for t in logit_normal(4)]
    [0.0, 0.3375, 0.5, 0.6625, 1.0]
    """
    _positive("std", std)
    if not math.isfinite(mean):
        raise ValueError(f"mean = {mean}; it is a finite number, of the logit of t")
    quantile = NormalDist().inv_cdf
    return _grid(steps, lambda u: _sigmoid(mean + std * quantile(u)))


def karras(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, *, from_zero: bool = True
) -> list[float]:
    """S_k = (S_max^(1/rho) + k/(steps-1) (S_min^(1/rho) - S_max^(1/rho)))^rho, k < steps, t = 1/(1+S); then t = 1.

    Karras et al. 2022, eq. 5. Its first time is 1/(1 + sigma_max), not 0: with `from_zero` it is moved to 0, where the
    noise that `sample` starts from belongs. from_zero=False keeps it, for a network that knows no higher noise level;
    the state there is nearly (1-t) x0, so scale the noise by 1 - t.

    >>> [round(t, 4) for t in karras(4)]
    [0.0, 0.0933, 0.6803, 0.998, 1.0]
    """
    _positive("sigma_min", sigma_min)
    _positive("sigma_max", sigma_max)
    _positive("rho", rho)
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min = {sigma_min} is not below sigma_max = {sigma_max}")
    high, low = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    levels = [(high + k / max(_whole(steps) - 1, 1) * (low - high)) ** rho for k in range(_whole(steps))]
    return _from_levels([*levels, 0.0], from_zero)


# Levels for ten steps; the last is replaced by 0, as in the code of their users.
_ALIGNED = {
    "sd1.5": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}


def align_your_steps(steps: int, name: str, *, from_zero: bool = True) -> list[float]:
    """Noise levels optimised for one model, "sd1.5", "sdxl", "svd" or "deepfloyd" (its first stage), t = 1/(1+S).

    Sabour et al. 2024, published for ten steps; for others log S is interpolated linearly over the step number. As in
    the code of their users the lowest level is then replaced by 0. from_zero as in `karras`.

    >>> [round(t, 3) for t in align_your_steps(10, "sdxl")]
    [0.0, 0.137, 0.21, 0.314, 0.427, 0.537, 0.643, 0.725, 0.81, 0.898, 1.0]
    """
    if name not in _ALIGNED:
        raise ValueError(f"name = {name!r}; there are levels for {', '.join(_ALIGNED)}")
    logs = [math.log(level) for level in _ALIGNED[name]]
    levels = []
    for k in range(_whole(steps)):
        place = k * (len(logs) - 1) / steps
        below = int(place)
        levels.append(math.exp(logs[below] + (place - below) * (logs[below + 1] - logs[below])))
    return _from_levels([*levels, 0.0], from_zero)


# ---- what they share -------------------------------------------------------------------------------------------------


def _whole(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; it is a whole number, at least 1")
    return steps


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} = {value}; it is a positive finite number")


def _grid(steps: int, law: Callable[[float], float]) -> list[float]:
    """0, the law at k/steps, 1."""
    return _increasing([0.0, *(law(k / steps) for k in range(1, _whole(steps))), 1.0])


def _from_levels(levels: list[float], from_zero: bool) -> list[float]:
    times = [1.0 / (1.0 + level) for level in levels]
    if from_zero:
        times[0] = 0.0
    return _increasing(times)


def _increasing(times: list[float]) -> list[float]:
    for k, (s, t) in enumerate(pairwise(times)):
        if not s < t:
            raise ValueError(
                f"times {k} and {k + 1} of {len(times)} are {s} and {t}: too close for float64; "
                "take fewer steps or a milder parameter"
            )
    return times


def _sigmoid(z: float) -> float:
    e = math.exp(-abs(z))
    return 1.0 / (1.0 + e) if z >= 0.0 else e / (1.0 + e)
