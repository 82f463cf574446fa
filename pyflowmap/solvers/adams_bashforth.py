"""Adams-Bashforth: the integral of the polynomial through the last velocities; any step lengths.

    x' = x + sum_j w_j b_{-j},      w_j = int_s^t L_j(tau) dtau,      L_j the Lagrange basis on the times of the b_{-j}

Memory: (b, its time, older b, its time, ...). An older velocity that is kept is not copied.
"""

from functools import lru_cache

from ..algebra import weighted
from .runge_kutta import midpoint_from, rk4_from
from .solver import solver


def check_start(start):
    if start not in ("full", "low"):
        raise ValueError(
            f'start = {start!r}; it is "full", Runge-Kutta steps of the full order, or "low", the lower orders'
        )


def start_nodes(s, t, start):
    """The times inside a step at which the Runge-Kutta start asks for the velocity."""
    return (s + (t - s) / 2,) if start == "full" else ()


@lru_cache(4096)
def weights_2(h, h1):
    """(w_0, w_1) for a step of h after one of h1."""
    back = h * h / (2.0 * h1)
    return h + back, -back


@lru_cache(4096)
def weights_3(h, h1, h2):
    """(w_0, w_1, w_2) for a step of h after one of h1, after one of h2."""
    w0, w1 = weights_2(h, h1)
    c = h * h * (2.0 * h + 3.0 * h1) / (6.0 * h1 * (h1 + h2))
    return w0 + c, w1 - (1.0 + h1 / h2) * c, h1 / h2 * c


@solver(order=2, nfe=1, starting=1, nodes=start_nodes, check=check_start)
def adams_bashforth_2(velocity, x, s, t, memory, *, start="full"):
    """x' = x + h [(1 + r) b_0 - r b_{-1}], r = h/(2 h_1), h_1 the step before: order 2, 1 NFE per step.

    start="full": the first step is `midpoint`, 1 NFE more. start="low": it is Euler's, still order 2, larger error.
    Hairer et al. 1993, sec. III.5. With equal steps the weights are 3/2 and -1/2. It never asks at t.

    >>> import torch
    >>> adams_bashforth_2(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.4062]])
    """
    v = velocity(x, s)
    if memory is None:
        return (midpoint_from(v, velocity, x, s, t) if start == "full" else x + (t - s) * v), (v, s)
    old, s1 = memory
    w0, w1 = weights_2(t - s, s - s1)
    return weighted(1.0, x, w0, v, w1, old), (v, s)


@solver(order=3, nfe=1, starting=6, nodes=start_nodes, check=check_start)
def adams_bashforth_3(velocity, x, s, t, memory, *, start="full"):
    """x' = x + h [k_1 b_0 + k_2 b_{-1} + k_3 b_{-2}]: order 3, 1 NFE per step. Hairer et al. 1993, sec. III.5.

    c = h (2h + 3h_1) / (6 h_1 (h_1 + h_2)), k_1 = 1 + h/(2h_1) + c, k_2 = -h/(2h_1) - (1 + h_1/h_2) c, k_3 = c h_1/h_2;
    with equal steps 23/12, -16/12, 5/12. start="full": the first two steps are `rk4`, 3 NFE more each. start="low":
    Euler, then Adams-Bashforth 2; the first step's error then limits the run to order 2. Some published variable-step
    codes (iPNDM_v) misplace a parenthesis in c and have order 2 where steps are uneven; this is the exact one.

    >>> import torch
    >>> adams_bashforth_3(lambda x, t: 3 * t * t + 0 * x, torch.zeros(1, 1), [0.0, 0.1, 0.3, 0.6, 1.0])
    tensor([[1.]])
    """
    v = velocity(x, s)
    if memory is None:
        return (rk4_from(v, velocity, x, s, t) if start == "full" else x + (t - s) * v), (v, s, None, 0.0)
    old, s1, older, s2 = memory
    if older is not None:
        w0, w1, w2 = weights_3(t - s, s - s1, s1 - s2)
        x_next = weighted(1.0, x, w0, v, w1, old, w2, older)
    elif start == "full":
        x_next = rk4_from(v, velocity, x, s, t)
    else:
        w0, w1 = weights_2(t - s, s - s1)
        x_next = weighted(1.0, x, w0, v, w1, old)
    return x_next, (v, s, old, s1)
