"""A small perceptron, times and data in float64, and gradients: what the objectives' tests compare with plain torch."""

from __future__ import annotations

import torch
from torch import nn


class Tiny(nn.Module):
    """A perceptron on [x, s, t - s] in float64; `outputs` of the size of x, a tuple where there are two."""

    def __init__(self, size=3, width=24, outputs=1, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.outputs = outputs
        self.body = nn.Sequential(
            nn.Linear(size + 3, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, outputs * size),
        ).double()  # fmt: skip
        with torch.no_grad():  # as built its derivatives are too small to matter
            for parameter in self.parameters():
                parameter.mul_(2.0)

    def forward(self, x, s, t, label=None):
        extra = torch.zeros_like(s) if label is None else 0.3 * label.to(x.dtype)
        result = self.body(torch.cat([x, s[:, None], (t - s)[:, None], extra[:, None]], 1))
        return result if self.outputs == 1 else result.chunk(self.outputs, 1)


def pairs(rows, seed=0):
    """s < t, apart by more than 0.01."""
    rng = torch.Generator().manual_seed(seed)
    s, t = (0.01 + 0.98 * torch.rand(2, rows, generator=rng, dtype=torch.float64)).sort(0).values
    return s - 0.005, t + 0.005


def data(rows, size=3, seed=0):
    """(x1, x0), standard normal both."""
    rng = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(2, rows, size, generator=rng, dtype=torch.float64).unbind(0)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)


def assert_same(ours, plain, network):
    """per_sample losses and parameter gradients to 1e-10."""
    torch.testing.assert_close(ours.per_sample, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, plain.mean()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
