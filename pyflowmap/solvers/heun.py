"""Heun's method (the explicit trapezoidal rule; not the midpoint rule, nor Ralston's)."""

from .driver import solver


@solver(order=2, nfe=2)
def heun(velocity, x, s, t, memory):
    """k1 = v(x, s); k2 = v(x + h k1, t); x' = x + h/2 (k1 + k2): order 2, 2 NFE per step. Karras et al. 2022, alg. 1.

    >>> import torch
    >>> heun(lambda x, t: -x, torch.ones(1, 1), [0.0, 1.0])
    tensor([[0.5000]])
    """
    k1 = velocity(x, s)
    k2 = velocity(x + (t - s) * k1, t)
    return x + (t - s) / 2 * (k1 + k2), memory
