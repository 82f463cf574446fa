"""A multilayer perceptron u(x, s, t, label) for vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .embedding import Embedding, zero
from .registry import check_range, register

__all__ = ["MLP", "MLPConfig"]


@dataclass(frozen=True)
class MLPConfig:
    features: int = 2  # of one sample
    width: int = 256
    depth: int = 4  # residual blocks
    labels: int = 0

    def __post_init__(self):
        check_range(self, features=(1, 65536), width=(1, 65536), depth=(0, 256), labels=(0, 65536))


@register(MLPConfig)
class MLP(nn.Module):
    """Residual blocks h + W2 gelu(W1 h + e); the last layer starts at zero, so an untrained map is the identity.

    >>> import torch
    >>> MLP(MLPConfig(features=2))(torch.zeros(5, 2), torch.zeros(5), torch.ones(5)).shape
    torch.Size([5, 2])
    """

    def __init__(self, config: MLPConfig = MLPConfig()):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.width, config.labels)
        self.first = nn.Linear(config.features, config.width)
        self.inner = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.outer = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.last = nn.Linear(config.width, config.features)
        zero(self.last)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        e = self.embedding(s, t, label)
        h = self.first(x) + e
        for inner, outer in zip(self.inner, self.outer):
            h = h + outer(nn.functional.gelu(inner(h) + e))
        return self.last(h)
