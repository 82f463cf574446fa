"""The flow map itself as a step, and the jumps that put noise back after it."""

import math
from functools import lru_cache

from .solver import solver
from .stochastic import require_noise_to_data

__all__ = ["consistency", "ctm_gamma", "flow_map"]


@solver(order=None, nfe=1, takes="jump")
def flow_map(jump, x, s, t, memory):
    """x' = X_{s,t}(x): 1 NFE per step, exact at any step size for an exact flow map. Boffi et al. 2025, eq. 5."""
    return jump(x, s, t), memory


@solver(order=None, nfe=1, takes="jump", stochastic=True, nodes=lambda s, t: (1.0,))
def consistency(jump, x, s, t, memory):
    """x' = t X_{s,1}(x) + (1-t) z: multistep consistency sampling, 1 NFE; no noise at t = 1. Song et al. 2023, alg. 1.

    For an exact flow map every state has the right marginal, in any number of steps; only the jump to t = 1 is asked
    of the network. It is `ctm_gamma` with gamma = 1.
    """
    require_noise_to_data("consistency", s, t)
    data = jump(x, s, 1.0)
    return (data if t == 1.0 else t * data + (1.0 - t) * jump.noise()), memory


@lru_cache(maxsize=4096)
def ctm_coefficients(s: float, t: float, gamma: float, published: bool) -> tuple[float, float, float]:
    """(t~, a, n) of x' = a X_{s,t~}(x) + n z, with S~ = sqrt(1 - gamma^2) S_t and t~ = 1/(1 + S~)."""
    require_noise_to_data("ctm_gamma", s, t)
    if gamma == 0.0 or t == 1.0:
        return t, 1.0, 0.0
    kept = math.sqrt((1.0 - gamma) * (1.0 + gamma))
    if not published:
        scale = t + kept * (1.0 - t)
        return t / scale, scale, gamma * (1.0 - t)
    least, level = 0.002, (1.0 - t) / t
    if level <= least:
        return t, 1.0, 0.0
    inner = kept * (level - least) + least
    return 1.0 / (1.0 + inner), t * (1.0 + inner), t * math.sqrt((level - inner) * (level + inner))


def _check_ctm(gamma: float, published: bool) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma = {gamma}; it lies in [0, 1], 0 = deterministic to 1 = multistep consistency")


@solver(
    order=None,
    nfe=1,
    takes="jump",
    stochastic=True,
    check=_check_ctm,
    nodes=lambda s, t, **options: ctm_coefficients(s, t, **options)[:1],
)
def ctm_gamma(jump, x, s, t, memory, *, gamma=0.5, published=False):
    """x' = (t/t~) X_{s,t~}(x) + gamma (1-t) z: beyond t to t~ = 1/(1 + sqrt(1-gamma^2) S_t), and back by noise. 1 NFE.

    gamma      0: `flow_map`; 1: `consistency`; between, part of the noise is fresh. Kim et al. 2024 (CTM)
    published  the authors' S~ = sqrt(1-gamma^2) (S_t - 0.002) + 0.002, with noise t sqrt(S_t^2 - S~^2): as exact, but
               gamma = 1 jumps to S = 0.002 only. (Their code also ends there; here a step to t = 1 is X_{s,1}.)

    For an exact flow map every state has the right marginal, in any number of steps and for any gamma. No noise at
    t = 1.
    """
    between, a, n = ctm_coefficients(s, t, gamma, published)
    there = jump(x, s, between)
    return (a * there + n * jump.noise() if n else there), memory
