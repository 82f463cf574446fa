"""Steps that draw noise and keep the marginals p_t: ancestral, and Euler-Maruyama on the family of SDEs.

Symbols: h = t - s; on the linear path D = x + (1-s) b and eps = x - s b, S = (1-t)/t is the noise level, z a standard
normal field drawn inside the launch of the update. The coefficients are formed so that nothing is 0/0 at either end.
Noise to data only: going back, the same draws would not undo anything.
"""

import math
from functools import lru_cache

from .solver import solver

__all__ = ["DIFFUSIONS", "ancestral", "euler_maruyama", "require_noise_to_data"]


def require_noise_to_data(name: str, s: float, t: float) -> None:
    """Raise unless a step from s to t goes from noise to data."""
    if not 0.0 <= s < t <= 1.0:
        raise ValueError(
            f"{name} draws noise, so its grid rises within [0, 1], from noise to data; it got a step from {s:g} to "
            f"{t:g} (a deterministic solver, e.g. heun, runs backward)"
        )


# ---- ancestral -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def ancestral_coefficients(s: float, t: float, eta: float) -> tuple[float, float, float]:
    """(a, c, n) of x' = a x + c b + n z.

    With rho = S_t/S_s and m = min(1, eta sqrt(1 - rho^2)):  S_up = S_t m,  S_down = S_t sqrt(1 - m^2), where
    1 - rho = h/(t (1-s)) has no cancellation, and t S_t = 1 - t is finite at both ends (rho = 0 where S_s is infinite).
    """
    require_noise_to_data("ancestral", s, t)
    rho = (1.0 - t) / t * (s / (1.0 - s))
    fresh = eta * eta * ((t - s) / (t * (1.0 - s))) * (1.0 + rho)  # m^2, before the minimum
    if fresh >= 1.0:
        m, kept = 1.0, 0.0
    else:  # 1 - m^2 = (1 - eta^2) + eta^2 rho^2
        m, kept = math.sqrt(fresh), math.sqrt(max(0.0, (1.0 - eta * eta) + (eta * rho) ** 2))
    lost = (1.0 - t) * (1.0 - kept)  # 0 for eta = 0: the Euler step, bit for bit
    return 1.0 - lost, (t - s) + s * lost, (1.0 - t) * m


def _check_ancestral(eta: float) -> None:
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(f"eta = {eta}; it is at least 0 (deterministic), 1 is DDPM's own posterior")


@solver(order=None, nfe=1, stochastic=True, check=_check_ancestral)
def ancestral(velocity, x, s, t, memory, *, eta=1.0):
    """x' = t (D + S_down eps + S_up z): the ancestral step, 1 NFE.

        S_up = min(S_t, eta sqrt(S_t^2 (S_s^2 - S_t^2) / S_s^2)),    S_down = sqrt(S_t^2 - S_up^2)

    eta   0: DDIM, which is Euler here; 1: the posterior of DDPM; between, DDIM's own eta. Song et al. 2021, eq. 16

    Converges in distribution, not along paths. From t = 0 with eta = 1 all noise is fresh; the last step, to t = 1, is
    x' = D without noise. Not to be confused with coefficient-preserving sampling (CPS), x' = t D + (1-t)(cos(a) eps +
    sin(a) z): at a finite angle a that does not keep the marginals, and is left out for it.
    """
    a, c, n = ancestral_coefficients(s, t, eta)
    mean = a * x + c * velocity(x, s)
    return (mean + n * velocity.noise() if n else mean), memory


# ---- Euler-Maruyama --------------------------------------------------------------------------------------------------

DIFFUSIONS = {
    "linear": lambda t, c: c,
    "constant": lambda t, c: c / (1.0 - t),
    "sbdm": lambda t, c: c / t if t else 0.0,  # infinite at t = 0: see the docstring of euler_maruyama
    "decreasing": lambda t, c: 0.25 * (c * math.cos(math.pi * t) + 1.0) ** 2 / (1.0 - t),
    "increasing_decreasing": lambda t, c: c * math.sin(math.pi * t) ** 2 / (1.0 - t),
}
"""w(t)/(1-t), the factor of (t b - x) in the drift. At t = 1, where some have none, no step begins."""


@lru_cache(maxsize=4096)
def euler_maruyama_coefficients(s: float, t: float, diffusion: str, scale: float) -> tuple[float, float, float]:
    """(a, c, n) of x' = a x + c b + n z: 1 - h q, h (1 + s q), sqrt(2 h w) with q = w/(1-s)."""
    require_noise_to_data("euler_maruyama", s, t)
    h, q = t - s, DIFFUSIONS[diffusion](s, scale)
    return 1.0 - h * q, h * (1.0 + s * q), math.sqrt(2.0 * h * q * (1.0 - s))


def _check_euler_maruyama(diffusion: str, scale: float, final: float | None) -> None:
    if diffusion not in DIFFUSIONS:
        raise ValueError(f"diffusion = {diffusion!r}; it is one of {', '.join(DIFFUSIONS)}")
    if not (math.isfinite(scale) and scale >= 0.0):
        raise ValueError(f"scale = {scale}; it is at least 0, where 0 draws no noise")
    if final is not None and not 0.0 < final < 1.0:
        raise ValueError(f"final = {final}; it is a noise level 1 - t between 0 and 1, e.g. 0.04, or None")


def _final_step(times: list[float], *, diffusion: str, scale: float, final: float | None) -> list[float]:
    """The grid with its last step beginning at noise level `final`, the others spread in proportion."""
    if final is None or times[-1] != 1.0 or len(times) < 3 or times[0] >= 1.0 - final:
        return times
    start, last = times[0], 1.0 - final
    ratio = (last - start) / (times[-2] - start)
    return [*(start + ratio * (t - start) for t in times[:-2]), last, 1.0]


@solver(order=None, nfe=1, stochastic=True, plan=_final_step, check=_check_euler_maruyama)
def euler_maruyama(velocity, x, s, t, memory, *, diffusion="linear", scale=1.0, final=0.04):
    """x' = x + h (b + w score) + sqrt(2 h w) z, score = (s b - x)/(1-s): Euler-Maruyama, 1 NFE.

    Any w(t) >= 0 has the marginals of the ODE; g^2 = 2 w in the notation of Song et al. With c = scale:

        linear       c (1-t)               1 for REPA and SiT's "sigma" and "linear": no singularity at either end
        constant     c
        sbdm         c (1-t)/t             infinite at t = 0, where the step is Euler's: the noise is fresh there anyhow
        decreasing   (c cos(pi t) + 1)^2 / 4
        increasing_decreasing    c sin^2(pi t)

    final   noise level 1 - t at which the last step to t = 1 begins; the other times of the grid are moved in
            proportion, and the last step takes the mean, without noise. From a grid that begins below that level, or
            has one step, nothing is moved. None: the grid as it is, and noise in the last step too

    Ma et al. 2024 (SiT), whose "diffusion" is this w; Yu et al. 2025 (REPA) for `final`. The explicit step is stable
    where h w < 2 (1-s).
    """
    a, c, n = euler_maruyama_coefficients(s, t, diffusion, scale)
    mean = a * x + c * velocity(x, s)
    return (mean + n * velocity.noise() if n and not (t == 1.0 and final is not None) else mean), memory
