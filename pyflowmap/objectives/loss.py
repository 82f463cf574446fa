"""What an objective returns."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

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

    def __getattr__(self, name: str) -> NoReturn:
        cure = "; loss.mean().backward()" if name == "backward" else ""
        raise AttributeError(f"a Loss has per_sample, raw_error, parts and .mean(), no {name!r}{cure}")

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
