"""Noise put back between Heun steps: EDM's churn at every step, Restart over whole intervals.

Both plan their times: where the next time lies before the last one the step is the exact forward kernel back towards
noise, without a network evaluation, else a step of Heun in the noise level S = (1-t)/t. So callbacks and trajectories
have one entry for each of these moves too.
"""

import math
from functools import lru_cache
from itertools import pairwise

from .solver import solver
from .stochastic import require_noise_to_data

__all__ = ["edm_heun_churn", "restart"]


@lru_cache(maxsize=4096)
def renoise_coefficients(s: float, t: float) -> tuple[float, float]:
    """(a, n) of x' = a x + n z from s back to t < s: t/s and t sqrt(S_t^2 - S_s^2), finite at t = 0 and at s = 1."""
    ratio = t / s
    return ratio, math.sqrt((s - t) / s * ((1.0 - t) + ratio * (1.0 - s)))


def _step(velocity, x, s, t, memory, s_noise):
    if t < s:
        scale, deviation = renoise_coefficients(s, t)
        return scale * x + s_noise * deviation * velocity.noise(), memory
    h = t - s
    k1 = velocity(x, s)
    if t == 1.0 or t in velocity.singular:  # S = 0
        return x + h * k1, memory
    k2 = velocity(x + h * k1, t)
    # Heun in S, x' = t (x/s + (S_t - S_s)(eps1 + eps2)/2), is this in x; from s = 0, where S is infinite, Heun in x.
    share = t / (2.0 * s) if s else 0.5
    return x + h * ((1.0 - share) * k1 + share * k2), memory


def _check_noise(s_noise: float) -> None:
    if not (math.isfinite(s_noise) and s_noise >= 0.0):
        raise ValueError(f"s_noise = {s_noise}; it is at least 0, and 1 keeps the marginals")


def _check_rising(name: str, times: list[float]) -> None:
    for s, t in pairwise(times):
        require_noise_to_data(name, s, t)


# ---- churn -----------------------------------------------------------------------------------------------------------


def churned_time(t: float, gamma: float) -> float:
    """The time of noise level (1 + gamma) S."""
    return t / (1.0 + gamma * (1.0 - t))


def _churned(times: list[float], *, churn: float, s_min: float, s_max: float, s_noise: float) -> list[float]:
    _check_rising("edm_heun_churn", times)
    gamma = min(churn / (len(times) - 1), math.sqrt(2.0) - 1.0)
    visited = []
    for t in times[:-1]:
        visited.append(t)
        if gamma and t and s_min * t <= 1.0 - t <= s_max * t:  # at t = 0 the noise is fresh already
            visited.append(churned_time(t, gamma))
    return [*visited, times[-1]]


def _check_churn(churn: float, s_min: float, s_max: float, s_noise: float) -> None:
    _check_noise(s_noise)
    if not (math.isfinite(churn) and churn >= 0.0):
        raise ValueError(f"churn = {churn}; it is at least 0, where 0 adds no noise")
    if not 0.0 <= s_min <= s_max:
        raise ValueError(f"s_min = {s_min}, s_max = {s_max}; noise levels S = (1-t)/t with 0 <= s_min <= s_max")


@solver(order=None, nfe=2, stochastic=True, plan=_churned, check=_check_churn)
def edm_heun_churn(velocity, x, s, t, memory, *, churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.0):
    """EDM's stochastic sampler: at each of the N times noise is added, S^ = S (1 + gamma), then Heun in S. 2 NFE.

        gamma = min(churn/N, sqrt(2) - 1) where s_min <= S <= s_max, else 0
        x^    = (t^/t) x + t^ sqrt(S^^2 - S^2) s_noise z,    t^ = 1/(1 + S^)

    Karras et al. 2022, alg. 2. The last step, to t = 1, is one of Euler. The defaults are theirs for ImageNet-64 but
    for s_noise, there 1.003, which makes up for a network that removes too much noise; 1 keeps the marginals.
    churn = 0 is Heun in S, not to be confused with `heun`, the trapezoidal rule in t.
    """
    return _step(velocity, x, s, t, memory, s_noise)


# ---- restart ---------------------------------------------------------------------------------------------------------


def karras_levels(high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """steps + 1 noise levels from high to low, equidistant in S^(1/rho). Karras et al. 2022, eq. 5."""
    a, b = high ** (1.0 / rho), low ** (1.0 / rho)
    return [(a + k / steps * (b - a)) ** rho for k in range(steps + 1)]


def _restarted(times: list[float], *, intervals, repeats, inner, s_noise: float) -> list[float]:
    _check_rising("restart", times)
    visited = list(times)
    each = zip(intervals, _one_each(repeats, intervals), _one_each(inner, intervals))
    # From the last to the first, so that what is inserted lies behind what is still to be looked for.
    for (low, high), count, steps in sorted(each, key=lambda one: one[0][0]):
        upper, lower = 1.0 / (1.0 + low), 1.0 / (1.0 + high)
        if not times[0] <= lower < upper <= times[-1]:
            reach = [(1.0 - t) / t if t else math.inf for t in (times[-1], times[0])]
            raise ValueError(
                f"restart interval ({low:g}, {high:g}) leaves the grid, whose noise levels S = (1-t)/t are "
                f"{reach[0]:g} to {reach[1]:g}; change intervals or the grid"
            )
        at = next(i for i, t in enumerate(visited) if t >= upper - 1e-9)
        if visited[at] > upper + 1e-9:  # not a time of the grid: it becomes one
            visited.insert(at, upper)
        upper = visited[at]
        inside = [lower, *(1.0 / (1.0 + level) for level in karras_levels(high, low, steps)[1:-1]), upper]
        visited[at + 1 : at + 1] = inside * count
    return visited


def _one_each(value, intervals) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(intervals)


def _check_restart(intervals, repeats, inner, s_noise: float) -> None:
    _check_noise(s_noise)
    for each in intervals:
        pair = isinstance(each, (tuple, list)) and len(each) == 2
        if not pair or not (0.0 <= each[0] < each[1] and math.isfinite(each[1])):
            raise ValueError(
                f"restart interval {each}; it is (low, high) in noise levels S = (1-t)/t, e.g. (0.05, 1.0)"
            )
    for name, value in (("repeats", repeats), ("inner", inner)):
        counts = _one_each(value, intervals)
        if len(counts) != len(intervals) or any(type(n) is not int or n < 1 for n in counts):
            raise ValueError(f"{name} = {value}; it is a whole number, at least 1, or one for each interval")


@solver(order=None, nfe=2, stochastic=True, plan=_restarted, check=_check_restart)
def restart(velocity, x, s, t, memory, *, intervals=((0.01, 1.0),), repeats=1, inner=8, s_noise=1.0):
    """Heun, which goes back by a jump of fresh noise, from S_low to S_high, and down again, `repeats` times.

        x' = (t_high/t_low) x + t_high sqrt(S_high^2 - S_low^2) s_noise z,    t = 1/(1 + S)

    intervals   (S_low, S_high) each, in noise levels S = (1-t)/t; S_low becomes a time of the grid if it is none
    repeats     K: how often, one number or one per interval
    inner       Heun steps on the way down again, on Karras's grid with rho = 7; one number or one per interval
    s_noise     1 keeps the marginals; 1.003 in the authors' run on ImageNet-64

    2 NFE per Heun step, 1 for a last step to t = 1, none for the jumps: 2 repeats inner more than `heun` for an
    interval. What the jump adds contracts earlier errors, which no deterministic step does. Xu et al. 2023
    (Restart). Not to be confused with churn (`edm_heun_churn`), a little noise at every step.
    """
    return _step(velocity, x, s, t, memory, s_noise)
