"""What the exponential integrators in the data prediction share: half log-SNR, phi functions, starts, ends.

On the linear path, with D = E[x1 | x_t] = x + (1-t) b and lambda = log(t / (1-t)), half the log of the signal-to-noise
ratio,

    d(x / (1-t)) / dlambda = e^lambda D,    so    x' = (1-t')/(1-s) x + (1-t') int_lambda^lambda' e^l D dl

exactly; a solver is a choice of polynomial for D. lambda is -inf at the noise end and +inf at the data end, so D there
is no history for a polynomial in lambda, and steps that touch an end are of order 1: x + (t-s) b, which is D at t = 1.

The orders are those of grids whose steps shrink in lambda. The first steps of a grid that is uniform in t from 0 do
not, however many there are: they leave an error c h^2, with a small c that orders above 2 come to see.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

__all__ = [
    "between", "check", "middle", "midpoint", "nodes", "phi_rest", "refuse_backward_noise", "remaining", "rk4",
]  # fmt: skip


def between(s: float, t: float) -> float:
    """lambda(t) - lambda(s); infinite where one of them is an end."""
    if s == 0.0 or t == 1.0:
        return math.inf
    if s == 1.0 or t == 0.0:
        return -math.inf
    return math.log1p((t - s) / s) - math.log1p((s - t) / (1.0 - s))


def phi_rest(z: float, k: int) -> float:
    """phi_k(z) - phi_k(0) = phi_k(z) - 1/k!, with phi_0 = exp, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z. z may be -inf.

    Near 0 by its series, sum_{n>=1} z^n / (n+k)!: the recurrence loses all digits there.
    """
    if abs(z) < 1.0:
        term = total = z / math.factorial(k + 1)
        for n in range(2, 20):
            term *= z / (n + k)
            total += term
        return total
    value = math.expm1(z)
    for j in range(1, k + 1):
        value = value / z - 1.0 / math.factorial(j)
    return value


@lru_cache(maxsize=4096)
def middle(s: float, t: float) -> float:
    """The time half way between s and t in lambda; half way in t where one of them is an end."""
    if min(s, t) <= 0.0 or max(s, t) >= 1.0:
        return 0.5 * (s + t)
    odds = math.sqrt(s / (1.0 - s) * (t / (1.0 - t)))
    return odds / (1.0 + odds)


def midpoint(velocity: Any, x: Any, b: Any, s: float, t: float) -> Any:
    """The midpoint rule in t, from b = velocity(x, s): one evaluation more."""
    return x + (t - s) * velocity(x + 0.5 * (t - s) * b, 0.5 * (s + t))


def rk4(velocity: Any, x: Any, b: Any, s: float, t: float) -> Any:
    """The classical Runge-Kutta step in t, from b = velocity(x, s): three evaluations more."""
    h, m = t - s, 0.5 * (s + t)
    k2 = velocity(x + 0.5 * h * b, m)
    k3 = velocity(x + 0.5 * h * k2, m)
    k4 = velocity(x + h * k3, t)
    return x + h / 6.0 * b + h / 3.0 * (k2 + k3) + h / 6.0 * k4


def nodes(s: float, t: float, *, start: str = "full", eta: float = 0.0, **_: Any) -> tuple[float, ...]:
    """Where a Runge-Kutta start may ask the network."""
    return (0.5 * (s + t),) if start == "full" and not eta and t != 1.0 else ()


def remaining(velocity: Any, t: float) -> int:
    """How many steps are left, this one (to t) included; 3 stands for more than two."""
    times = velocity.times
    return 1 if t == times[-1] else 2 if t == times[-2] else 3


def refuse_backward_noise(eta: float, s: float, t: float) -> None:
    """Raise where noise is asked for on the way from data to noise."""
    if t < s:
        raise ValueError(
            f"eta = {eta:g} on a falling grid (from {s:g} to {t:g}); noise is added on the way to data only, use eta=0"
        )


def check(**options: Any) -> None:
    """The ranges of the options that these solvers have in common."""
    eta = options.get("eta", 0.0)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta!r}; it lies in [0, 1], 0 = no noise")
    for name, known in (
        ("variant", ("bh1", "bh2") if "corrector" in options else ("midpoint", "heun")),
        ("coefficients", ("exact", "published")),
        ("start", ("full", "low")),
        ("corrector", (True, False)),
        ("lower_order_final", (False, True)),
    ):
        if name in options and not any(options[name] is each or options[name] == each for each in known):
            shown = " or ".join(map(repr, known))
            raise ValueError(f"{name} = {options[name]!r}; it is {shown}")
