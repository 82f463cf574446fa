"""DPM-Solver++ and SDE-DPM-Solver++: exponential integrators in D = E[x1 | x_t] (Lu et al. 2022b, arXiv 2211.01095).

One formula for all of them. With h = lambda' - lambda, H = (1 + eta) h and D = x + (1-s) b,

    x' = (1-t)/(1-s) e^{-eta h} x + t (psi_1 D + psi_2 D1 + psi_3 D2) + (1-t) sqrt(1 - e^{-2 eta h}) z
    psi_1 = 1 - e^{-H},    psi_2 = 1 - psi_1/H,    psi_3 = 1 - 2 psi_2/H

where D1 ~ h dD/dlambda and D2 ~ h^2/2 d^2D/dlambda^2 are differences of the last data predictions. eta = 0 is the ODE,
eta = 1 the reverse diffusion; all have the same marginals.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ..algebra import evaluate, lazy, weighted
from .exponential import between, check, middle, midpoint, nodes, phi_rest, refuse_backward_noise, remaining
from .solver import solver

__all__ = ["dpm_solver_pp_1", "dpm_solver_pp_2m", "dpm_solver_pp_2s", "dpm_solver_pp_3m", "dpm_solver_pp_sde"]


@lru_cache(maxsize=4096)
def multistep_coefficients(
    s: float, t: float, s1: float | None = None, s2: float | None = None, eta: float = 0.0, kind: str = "exact"
) -> tuple[float, float, float, float, float]:
    """(a, c0, c1, c2, n) of x' = a x + c0 D(s) + c1 D(s1) + c2 D(s2) + n z; order 1 without s1, order 2 without s2.

    kind    of order 2: "midpoint" has psi_1/2 for psi_2; of order 3: "published" has psi_3/2 for psi_3
    """
    h = between(s, t)
    step = (1.0 - t) / (1.0 - s)
    if eta == 0.0:
        a, c, n = step, (t - s) / (1.0 - s), 0.0  # t psi_1, without the cancellation
    else:
        a = step * math.exp(-eta * h)
        c = -t * math.expm1(-(1.0 + eta) * h)
        n = (1.0 - t) * math.sqrt(-math.expm1(-2.0 * eta * h))
    if s1 is None:
        return a, c, 0.0, 0.0, n
    H = (1.0 + eta) * h
    psi2 = 0.5 * c if kind == "midpoint" else -t * phi_rest(-H, 1)
    r0 = between(s1, s) / h
    if s2 is None:
        return a, c + psi2 / r0, -psi2 / r0, 0.0, n
    psi3 = -t * phi_rest(-H, 2) * (1.0 if kind == "published" else 2.0)
    r1 = between(s2, s1) / h
    share = r0 / (r0 + r1)
    e0 = (psi2 * (1.0 + share) + psi3 / (r0 + r1)) / r0  # of D(s) - D(s1)
    e1 = -(psi2 * share + psi3 / (r0 + r1)) / r1  # of D(s1) - D(s2)
    return a, c + e0, e1 - e0, -e1, n


def _multistep(velocity, x, s, t, memory, order, eta, kind, start, lower_order_final):
    """One step of order `order`, or of what its history (D(s1), s1, D(s2), s2), None where missing, allows."""
    if eta != 0.0:
        refuse_backward_noise(eta, s, t)
    b = velocity(x, s)
    if t == 1.0 or t == 0.0:
        return x + (t - s) * b, None
    old, s1, older, s2 = memory or (None, None, None, None)
    ended, reached = t == velocity.end, 1 if old is None else 2 if older is None else 3
    wanted = min(order, remaining(velocity, t)) if lower_order_final else order
    infinite = s == 0.0 or s == 1.0  # D there is no history
    if start == "full" and eta == 0.0 and wanted > reached:
        D = x + (1.0 - s) * b
        return midpoint(velocity, x, b, s, t), None if ended or infinite else (D, s, old, s1)
    if infinite:
        if eta == 0.0:
            return x + (t - s) * b, None
        a, c0, _, _, n = multistep_coefficients(s, t, None, None, eta)
        return a * x + c0 * (x + (1.0 - s) * b) + n * velocity.noise(), None
    if wanted < 3:
        older = s2 = None
        if wanted < 2:
            old = s1 = None
    a, c0, c1, c2, n = multistep_coefficients(s, t, s1, s2, eta, kind)
    D = weighted(1.0, x, 1.0 - s, b)
    if older is not None:
        after = weighted(a, x, c0, D, c1, old, c2, older)
    elif old is not None:
        after = weighted(a, x, c0, D, c1, old)
    else:
        after = weighted(a, x, c0, D)
    if n != 0.0:
        after = after + n * velocity.noise()
    return after, None if ended or order == 1 else (D, s, old if order == 3 else None, s1 if order == 3 else None)


@solver(order=1, nfe=1, stochastic=True, check=check)
def dpm_solver_pp_1(velocity, x, s, t, memory, *, eta=0.0):
    """DPM-Solver++(1): x' = (1-t)/(1-s) e^{-eta h} x + t (1 - e^{-(1+eta) h}) D + (1-t) sqrt(1 - e^{-2 eta h}) z.

    Order 1, 1 NFE per step. With eta = 0 it is Euler, that is DDIM. From t = 0 with eta > 0 the noise is all new.
    Lu et al. 2022b.

    eta     0: the ODE, no noise drawn; 1: SDE-DPM-Solver++(1)

    >>> import torch
    >>> dpm_solver_pp_1(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.2500]])
    """
    return _multistep(velocity, x, s, t, None, 1, eta, "exact", "low", False)


@solver(order=2, nfe=1, starting=2, stochastic=True, nodes=nodes, check=check)
def dpm_solver_pp_2m(velocity, x, s, t, memory, *, eta=0.0, variant="midpoint", start="full", lower_order_final=False):
    """DPM-Solver++(2M): D extrapolated linearly in lambda through its last two values. Order 2, 1 NFE per step.

        x' = a x + t (psi_1 D + psi_2 (D - D_{-1}) / r) + n z,    r = h_{-1}/h

    A step to t = 1 is x' = D, whatever `start`. D at t = 0, where lambda = -inf, is no history: the first two steps
    from there are starting steps, from elsewhere the first. Lu et al. 2022b, alg. 2. Not to be confused with 2S.

    eta                 0: the ODE; 1: SDE-DPM-Solver++(2M)
    variant             "midpoint": psi_1/2 in place of psi_2, as published; "heun": psi_2
    start               "full": starting steps by the midpoint rule, 2 NFE each; "low": of order 1, x + (t-s) b. With
                        eta > 0 it is always "low", by the formula of the SDE
    lower_order_final   take the last step in order 1 wherever it ends

    >>> import torch
    >>> dpm_solver_pp_2m(lambda x, t: (1 - x) / (1 - t), torch.zeros(1, 1), [0.1, 0.4, 0.7, 1.0])
    tensor([[1.]])
    """
    return _multistep(velocity, x, s, t, memory, 2, eta, variant, start, lower_order_final)


@solver(order=3, nfe=1, starting=3, stochastic=True, nodes=nodes, check=check)
def dpm_solver_pp_3m(
    velocity, x, s, t, memory, *, eta=0.0, coefficients="exact", start="full", lower_order_final=False
):
    """DPM-Solver++(3M): D extrapolated by a parabola in lambda through its last three values. Order 3, 1 NFE per step.

        x' = a x + t (psi_1 D + psi_2 D1 + psi_3 D2) + n z
        d0 = (D - D_{-1})/r0,  d1 = (D_{-1} - D_{-2})/r1,  D1 = d0 + r0/(r0+r1) (d0 - d1),  D2 = (d0 - d1)/(r0+r1)

    with r0 = h_{-1}/h, r1 = h_{-2}/h. A step to t = 1 is x' = D, whatever `start`. D at t = 0 is no history: from there
    three steps are starting steps, from elsewhere two. Lu et al. 2022b; the multistep form is in their code only.

    eta                 0: the ODE; 1: the SDE
    coefficients        "exact"; "published": half of psi_3, as in the authors' and other common code. That is of order
                        2 only, which `order` above does not say
    start               "full": starting steps by the midpoint rule, 2 NFE each (their local error is of order 3, which
                        is enough for a few steps); "low": orders 1 and 2 (with psi_2), which leaves order 2 in all.
                        With eta > 0 it is always "low", by the formula of the SDE
    lower_order_final   take the last two steps in orders 2 and 1
    """
    return _multistep(velocity, x, s, t, memory, 3, eta, coefficients, start, lower_order_final)


@lru_cache(maxsize=4096)
def singlestep_coefficients(s: float, t: float, eta: float = 0.0) -> tuple[float, float, float]:
    """(a, c, n) of one ancestral transition x' = a x + c D + n z, with S = (1-t)/t:

        S_up = eta sqrt(S'^2 (S^2 - S'^2)) / S,    S_down = sqrt(S'^2 - S_up^2)
        x' = t (S_down/S x/s + (1 - S_down/S) D + S_up z)

    which is x' = t D + t S_down eps + t S_up z. eta = 0 is Euler. Karras et al. 2022's notation; DDIM's eta.
    """
    if eta == 0.0:
        return (1.0 - t) / (1.0 - s), (t - s) / (1.0 - s), 0.0
    ratio = 0.0 if s == 0.0 else (1.0 - t) / t * s / (1.0 - s)  # S'/S
    fall = (1.0 - ratio) * (1.0 + ratio)  # 1 - (S'/S)^2
    down = math.sqrt(1.0 - eta * eta * fall)  # S_down/S'
    a = (1.0 - t) / (1.0 - s) * down
    return a, t - s * a, (1.0 - t) * eta * math.sqrt(fall)


@lru_cache(maxsize=4096)
def _split_noise(s: float, m: float, t: float) -> tuple[float, float]:
    """sqrt(w), sqrt(1-w), w the share of [S(t), S(s)] that lies before S(m): the noise of the whole step is Brownian in
    S = (1-t)/t, so the part up to m is a part of it."""
    S, M, T = (1.0 - s) / s, (1.0 - m) / m, (1.0 - t) / t
    w = (S - M) / (S - T)
    return math.sqrt(w), math.sqrt(1.0 - w)


def _inner_node(s, t, *, eta=None):
    return () if t == 1.0 or t == 0.0 or (s == 0.0 and eta is not None) else (middle(s, t),)


def _singlestep(velocity, x, s, t, eta):
    b = velocity(x, s)
    D = x + (1.0 - s) * b
    m = middle(s, t)
    a, c, n = singlestep_coefficients(s, t, eta)
    a_m, c_m, n_m = singlestep_coefficients(s, m, eta)
    point = a_m * x + c_m * D
    if eta == 0.0:
        return a * x + c * (point + (1.0 - m) * velocity(point, m))
    # One launch draws one field, so the point is stored, and the noise in it read off as point - (a_m x + c_m D).
    inside = lazy(evaluate(point + n_m * velocity.noise()))
    before, beyond = _split_noise(s, m, t)
    D_m = inside + (1.0 - m) * velocity(inside, m)
    return a * x + c * D_m + (n * before / n_m) * (inside - point) + (n * beyond) * velocity.noise()


@solver(order=2, nfe=2, nodes=_inner_node)
def dpm_solver_pp_2s(velocity, x, s, t, memory):
    """DPM-Solver++(2S), r = 1/2: the midpoint rule in lambda, on the exponential integrator. Order 2, 2 NFE per step.

        m half way in lambda,  x_m = (1-m)/(1-s) x + (m-s)/(1-s) D(x, s),  x' = (1-t)/(1-s) x + (t-s)/(1-s) D(x_m, m)

    No history. From t = 0, where lambda has no middle, the midpoint rule in t; a step to t = 1 is x' = D, 1 NFE.
    Lu et al. 2022b, alg. 1 (the general r: (1 - 1/(2r)) D + 1/(2r) D_m). Not to be confused with 2M, or with the
    midpoint rule in t.
    """
    if t == 1.0 or t == 0.0:
        return x + (t - s) * velocity(x, s), None
    if s == 0.0 or s == 1.0:
        return midpoint(velocity, x, velocity(x, s), s, t), None
    return _singlestep(velocity, x, s, t, 0.0), None


@solver(
    order=None,
    nfe=2,
    stochastic=True,
    nodes=_inner_node,
    check=check,
)
def dpm_solver_pp_sde(velocity, x, s, t, memory, *, eta=1.0):
    """DPM-Solver++ (stochastic), r = 1/2: `dpm_solver_pp_2s` with ancestral transitions. 2 NFE per step.

        x_m = a_m x + c_m D(x, s) + n_m z_m,    x' = a x + c D(x_m, m) + n z

    each transition s -> m and s -> t with its own S_up and S_down (see `singlestep_coefficients`); z_m and z are parts
    of one Brownian motion in S = (1-t)/t. From t = 0 one transition of order 1, and a step to t = 1 is x' = D, 1 NFE
    each; elsewhere it is `dpm_solver_pp_2s` at eta = 0. After k-diffusion's sample_dpmpp_sde, on
    Lu et al. 2022b, alg. 1. Not to be confused with SDE-DPM-Solver++(2M), `dpm_solver_pp_2m.using(eta=1.0)`.

    eta     0: no noise; 1: the ancestral transitions of the reverse diffusion
    """
    if eta != 0.0:
        refuse_backward_noise(eta, s, t)
    if t == 1.0 or t == 0.0 or s == 1.0:
        return x + (t - s) * velocity(x, s), None
    if s == 0.0:
        a, c, n = singlestep_coefficients(s, t, eta)
        after = a * x + c * (x + velocity(x, s))
        return after if n == 0.0 else after + n * velocity.noise(), None
    return _singlestep(velocity, x, s, t, eta), None
