"""DEIS: the noise prediction extrapolated as a polynomial in t, the rest of the linear path integrated exactly.

From d(x/t)/dt = -eps/t^2, eps = x - t b:

    x' = t (x/s + sum_j C_j eps_{-j}),      C_j = int_s^t -tau^-2 L_j(tau) dtau

with L_j the Lagrange basis on the times s, s_1, ... of the noise predictions. Zhang & Chen 2023, tAB-DEIS. In Newton's
form the sum needs t M_k, M_k = int_s^t -tau^-2 (tau - s)^k dtau, which are finite at both ends:

    t M_0 = -h/s,      t M_1 = h - l,      t M_2 = 2 s l - h (s + t),      l = t log(t/s) -> 0 at t = 0

Near the noise eps is nearly x itself, so rounding and start errors are amplified where times grow step after step by
more than a factor of 2.2 (`deis_3`: 1.4): not for grids that are geometric there. A few such steps do no harm.

Memory: (eps, its time, older eps, its time). An older prediction that is kept is not copied.
"""

import math
from functools import lru_cache

from ..algebra import weighted
from .adams_bashforth import check_start, start_nodes
from .runge_kutta import midpoint_from, rk4_from
from .solver import solver


def _logarithm(s, t):
    return t * math.log1p((t - s) / s) if t != 0.0 else 0.0


def weights_2(s, t, s1):
    """(w_0, w_1) = t C_j from the predictions at s and s1."""
    h = t - s
    w1 = (h - _logarithm(s, t)) / (s1 - s)
    return -h / s - w1, w1


def weights_3(s, t, s1, s2):
    """(w_0, w_1, w_2) = t C_j from the predictions at s, s1 and s2."""
    h, log = t - s, _logarithm(s, t)
    m1, m2 = h - log, 2.0 * s * log - h * (s + t)
    d1, d2 = s1 - s, s2 - s
    w1 = (m2 - d2 * m1) / (d1 * (d1 - d2))
    w2 = (m2 - d1 * m1) / (d2 * (d2 - d1))
    return -h / s - w1 - w2, w1, w2


@lru_cache(4096)
def _step_2(s, t, s1):
    """The coefficients of x, v and eps_{-1}: eps_0 = x - s v and t/s + w_0 = 1 - w_1, so nothing large cancels."""
    _, w1 = weights_2(s, t, s1)
    return 1.0 - w1, t - s + s * w1, w1


@lru_cache(4096)
def _step_3(s, t, s1, s2):
    _, w1, w2 = weights_3(s, t, s1, s2)
    return 1.0 - w1 - w2, t - s + s * (w1 + w2), w1, w2


def _noise(x, v, s):
    return weighted(1.0, x, -s, v) if s != 0.0 else x


@solver(order=2, nfe=1, starting=1, nodes=start_nodes, check=check_start)
def deis_2(velocity, x, s, t, memory, *, start="full"):
    """x' = t (x/s + C_0 eps_0 + C_1 eps_{-1}), eps linear in t: order 2, 1 NFE per step. Zhang & Chen 2023, tAB-DEIS.

    The paper's tAB1 (its number is the polynomial's degree); not its rhoAB. start="full": the first step is `midpoint`,
    1 NFE more. start="low": it is Euler's, which is the member of order 1 of this family. From t = 0, where x/s is 0/0,
    there is no other first step. A step to t = 0 ends at the noise that the polynomial extrapolates to.

    >>> import torch
    >>> deis_2(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.3366]])
    """
    v = velocity(x, s)
    if memory is None:
        return (midpoint_from(v, velocity, x, s, t) if start == "full" else x + (t - s) * v), (_noise(x, v, s), s)
    old, s1 = memory
    of_x, of_v, of_old = _step_2(s, t, s1)
    return weighted(of_x, x, of_v, v, of_old, old), (_noise(x, v, s), s)


@solver(order=3, nfe=1, starting=6, nodes=start_nodes, check=check_start)
def deis_3(velocity, x, s, t, memory, *, start="full"):
    """x' = t (x/s + sum_j C_j eps_{-j}), eps quadratic in t: order 3, 1 NFE per step. Zhang & Chen 2023, tAB-DEIS.

    The paper's tAB2. start="full": the first two steps are `rk4`, 3 NFE more each. start="low": Euler, then `deis_2`;
    the first step's error then limits the run to order 2. Ends of the path as in `deis_2`.

    >>> import torch
    >>> deis_3(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.25, 0.5, 0.75])
    tensor([[0.4752]])
    """
    v = velocity(x, s)
    eps = _noise(x, v, s)
    if memory is None:
        return (rk4_from(v, velocity, x, s, t) if start == "full" else x + (t - s) * v), (eps, s, None, 0.0)
    old, s1, older, s2 = memory
    if older is not None:
        of_x, of_v, of_old, of_older = _step_3(s, t, s1, s2)
        x_next = weighted(of_x, x, of_v, v, of_old, old, of_older, older)
    elif start == "full":
        x_next = rk4_from(v, velocity, x, s, t)
    else:
        of_x, of_v, of_old = _step_2(s, t, s1)
        x_next = weighted(of_x, x, of_v, v, of_old, old)
    return x_next, (eps, s, old, s1)
