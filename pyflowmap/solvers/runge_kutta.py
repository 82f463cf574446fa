"""Runge-Kutta steps: everything from one step's own evaluations, no history. h = t - s throughout.

A last step to a time without velocity (the data end, for a network that predicts data) keeps off that time and so
loses one order for that step alone, which leaves the order of the run what it was.
"""

from .solver import solver


@solver(order=1, nfe=1)
def euler(velocity, x, s, t, memory):
    """x' = x + h v(x, s): order 1, 1 NFE per step. For linear paths it equals DDIM (Song et al. 2021, eq. 12).

    >>> import torch
    >>> euler(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.2500]])
    """
    return x + (t - s) * velocity(x, s), memory


def midpoint_from(k1, velocity, x, s, t):
    """The midpoint step whose first velocity is known: 1 more evaluation."""
    half = (t - s) / 2
    return x + (t - s) * velocity(x + half * k1, s + half)


@solver(order=2, nfe=2, nodes=lambda s, t: (s + (t - s) / 2,))
def midpoint(velocity, x, s, t, memory):
    """k1 = v(x, s); x' = x + h v(x + h/2 k1, s + h/2): order 2, 2 NFE per step. Hairer et al. 1993, sec. II.1.

    The explicit midpoint rule; also known as RF-Solver. It never asks for the velocity at t.

    >>> import torch
    >>> midpoint(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0])
    tensor([[0.5000]])
    """
    return midpoint_from(velocity(x, s), velocity, x, s, t), memory


@solver(order=2, nfe=2)
def heun(velocity, x, s, t, memory):
    """k1 = v(x, s); k2 = v(x + h k1, t); x' = x + h/2 (k1 + k2): order 2, 2 NFE per step. Karras et al. 2022, alg. 1.

    The explicit trapezoidal rule; not the midpoint rule, nor Ralston's. A last step to a time without velocity (the
    data end, for a network that predicts data) is one of Euler, 1 NFE.

    >>> import torch
    >>> heun(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0])
    tensor([[0.5000]])
    """
    k1 = velocity(x, s)
    if t in velocity.singular:
        return x + (t - s) * k1, memory
    k2 = velocity(x + (t - s) * k1, t)
    return x + (t - s) / 2 * (k1 + k2), memory


def _inside(s, t, alpha):
    return t if alpha == 1.0 else s + alpha * (t - s)


def _check_alpha(alpha):
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha = {alpha}; it lies in (0, 1]: 1/2 midpoint, 2/3 Ralston, 1 Heun")


@solver(order=2, nfe=2, nodes=lambda s, t, alpha: (_inside(s, t, alpha),), check=_check_alpha)
def heun_alpha(velocity, x, s, t, memory, *, alpha=2 / 3):
    """k2 = v(x + alpha h k1, s + alpha h); x' = x + h [(1 - 1/(2 alpha)) k1 + 1/(2 alpha) k2]: order 2, 2 NFE per step.

    All explicit methods of two stages and order 2: alpha = 1/2 is midpoint, 2/3 Ralston's (least error bound), 1 Heun.
    Ralston 1962. With alpha = 1 a last step to a time without velocity is one of Euler, 1 NFE.

    >>> import torch
    >>> heun_alpha(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0], alpha=0.5)
    tensor([[0.5000]])
    """
    h, between = t - s, _inside(s, t, alpha)
    k1 = velocity(x, s)
    if between in velocity.singular:
        return x + h * k1, memory
    k2 = velocity(x + (alpha * h) * k1, between)
    second = 0.5 / alpha
    return x + (h * (1.0 - second)) * k1 + (h * second) * k2, memory


def _ralston_3_from(k1, velocity, x, s, t):
    """Order 3 from the times s, s + h/2 and s + 3h/4: Ralston 1962. 2 more evaluations, none at t."""
    h = t - s
    k2 = velocity(x + (h / 2) * k1, s + h / 2)
    k3 = velocity(x + (0.75 * h) * k2, s + 0.75 * h)
    return x + (h / 9) * (2.0 * k1 + 3.0 * k2 + 4.0 * k3)


def rk4_from(k1, velocity, x, s, t):
    """The step of `rk4` whose first velocity is known: 3 more evaluations."""
    if t in velocity.singular:
        return _ralston_3_from(k1, velocity, x, s, t)
    h, half = t - s, (t - s) / 2
    k2 = velocity(x + half * k1, s + half)
    k3 = velocity(x + half * k2, s + half)
    k4 = velocity(x + h * k3, t)
    return x + (h / 6) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


@solver(order=4, nfe=4, nodes=lambda s, t: (s + (t - s) / 2,))
def rk4(velocity, x, s, t, memory):
    """The classical method: x' = x + h/6 (k1 + 2 k2 + 2 k3 + k4), order 4, 4 NFE per step. Kutta 1901.

    k2 = v(x + h/2 k1, s + h/2); k3 = v(x + h/2 k2, s + h/2); k4 = v(x + h k3, t). Not what torchdiffeq calls "rk4":
    that is `rk4_38`. A last step to a time without velocity is Ralston's of order 3 (times 0, 1/2, 3/4), 3 NFE.

    >>> import torch
    >>> rk4(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0])
    tensor([[0.3750]])
    """
    return rk4_from(velocity(x, s), velocity, x, s, t), memory


@solver(order=4, nfe=4, nodes=lambda s, t: (s + (t - s) / 3, s + (t - s) * 2 / 3))
def rk4_38(velocity, x, s, t, memory):
    """The 3/8 rule: x' = x + h/8 (k1 + 3 k2 + 3 k3 + k4), order 4, 4 NFE per step. Kutta 1901; torchdiffeq's "rk4".

    k2 = v(x + h/3 k1, s + h/3); k3 = v(x + h (k2 - k1/3), s + 2h/3); k4 = v(x + h (k1 - k2 + k3), t). A last step to a
    time without velocity is Ralston's of order 3 (times 0, 1/2, 3/4), 3 NFE.

    >>> import torch
    >>> rk4_38(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0])
    tensor([[0.3750]])
    """
    h = t - s
    k1 = velocity(x, s)
    if t in velocity.singular:
        return _ralston_3_from(k1, velocity, x, s, t), memory
    k2 = velocity(x + (h / 3) * k1, s + h / 3)
    k3 = velocity(x + h * k2 - (h / 3) * k1, s + h * 2 / 3)
    k4 = velocity(x + h * (k1 - k2 + k3), t)
    return x + (h / 8) * (k1 + 3.0 * k2 + 3.0 * k3 + k4), memory


@solver(order=2, nfe=2)
def edm_heun(velocity, x, s, t, memory):
    """Heun in y = x/t and S = (1-t)/t, dy/dS = eps: order 2, 2 NFE per step. Karras et al. 2022, alg. 1.

    With k1 = v(x, s), k2 = v(x + h k1, t) it reads x' = x + h [(1 - h/s)/2 k1 + t/(2 s) k2]. Not `heun`, which is the
    same rule in x and t: their second-order terms differ. As in the paper a step to t = 1 (S = 0) is one of Euler, and
    so are steps from or to t = 0 (S = infinity), 1 NFE.

    >>> import torch
    >>> edm_heun(lambda x, t: -x, torch.ones(1, 1), [0.5, 0.75])
    tensor([[0.7969]])
    """
    if not (0.0 <= s <= 1.0 and 0.0 <= t <= 1.0):
        raise ValueError(f"edm_heun from t = {s:g} to {t:g}; it works on the linear path, from 0 = noise to 1 = data")
    h = t - s
    k1 = velocity(x, s)
    if s == 0.0 or t == 0.0 or t == 1.0 or t in velocity.singular:
        return x + h * k1, memory
    k2 = velocity(x + h * k1, t)
    return x + (h / 2 * (1.0 - h / s)) * k1 + (h / 2 * (t / s)) * k2, memory
