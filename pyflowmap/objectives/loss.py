"""What an objective returns."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Loss", "frozen_teacher"]


@dataclass(eq=False)
class Loss:
    """per_sample (B,) with gradient; raw_error (B,), the unweighted mean square, detached; parts, scalars to log.

    A learned or adaptive weight can fall while the raw error explodes: watch `raw_error`.
    """

    per_sample: Tensor
    raw_error: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """The scalar to call backward on."""
        return self.per_sample.mean()


@contextmanager
def frozen_teacher(network):
    """No gradient and no dropout while a network teaches; its training mode is put back afterwards."""
    modules = [m for m in network.modules() if m.training] if isinstance(network, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True


def check_batch(x1: Tensor, x0: Tensor | None) -> None:
    """One-line errors for what every objective is given."""
    if not isinstance(x1, Tensor) or not x1.is_floating_point() or x1.dim() < 2:
        shown = f"{x1.dtype} of shape {tuple(x1.shape)}" if isinstance(x1, Tensor) else type(x1).__name__
        raise TypeError(f"x1 is {shown}; data is a floating-point tensor (B, ...), e.g. x1.float()")
    if x1.shape[0] == 0:
        raise ValueError(f"x1 has shape {tuple(x1.shape)}: an empty batch has no loss; skip it")
    if x0 is not None and x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}; give them one shape")
