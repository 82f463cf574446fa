"""Runge-Kutta steps: everything from one step's own evaluations, no history."""

from .solver import solver


@solver(order=1, nfe=1)
def euler(velocity, x, s, t, memory):
    """x' = x + h v(x, s): order 1, 1 NFE per step. For linear paths it equals DDIM (Song et al. 2021, eq. 12).

    >>> import torch
    >>> euler(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.2500]])
    """
    return x + (t - s) * velocity(x, s), memory


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
