"""Euler's method."""

from .driver import solver


@solver(order=1, nfe=1)
def euler(velocity, x, s, t, memory):
    """x' = x + h v(x, s): order 1, 1 NFE per step. For linear paths it equals DDIM (Song et al. 2021, eq. 12).

    >>> import torch
    >>> euler(lambda x, t: -x, torch.ones(1, 1), [0.0, 0.5, 1.0])
    tensor([[0.2500]])
    """
    return x + (t - s) * velocity(x, s), memory
