"""A tiny problem for the Trainer: a network in float64, an objective of (seed, sample id) alone, a stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import pyflowmap as pfm
from pyflowmap.objectives.loss import Loss
from pyflowmap.training import Step


class Batch(NamedTuple):
    x1: Tensor
    condition: dict[str, Tensor]
    sample_ids: np.ndarray


class Stream:
    """Batch k is a function of k alone; rank r has the rows r::world."""

    def __init__(self, rows: int = 8, rank: int = 0, world: int = 1, poison: dict | None = None, dtype=torch.float64):
        self.rows, self.rank, self.world, self.position, self.dtype = rows, rank, world, 0, dtype
        self.poison = poison or {}  # {step: rows of the global batch that are NaN}

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        draw = np.random.default_rng([7, self.position])
        x1 = torch.from_numpy(draw.standard_normal((self.rows, 3))) * 0.5 + 0.7
        label = torch.from_numpy(draw.integers(0, 4, self.rows))
        for row in self.poison.get(self.position, ()):
            x1[row] = torch.nan
        self.position += 1
        own = slice(self.rank, None, self.world)
        return Batch(x1[own].to(self.dtype), {"label": label[own]}, np.arange(self.rows)[own])


class Network(nn.Module):
    """Three linear layers in a ModuleList, odd sizes, a label, dropout if asked for."""

    def __init__(self, width: int = 7, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        sizes = [5, width, width, 3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = torch.cat([x, s[:, None].to(x.dtype), t[:, None].to(x.dtype)], 1)
        h = torch.tanh(self.layers[0](h) + self.embedding(label))
        h = self.dropout(torch.tanh(self.layers[1](h)))
        return self.layers[2](h)


def rows_of_noise(like: Tensor, seed: int, ids: Tensor, stream: int) -> Tensor:
    """A normal field, row i a function of (seed, ids[i], stream)."""
    rows = [np.random.default_rng([seed, int(i), stream]).standard_normal(like.shape[1:]) for i in ids]
    return torch.from_numpy(np.stack(rows)).to(like.dtype)


def matching(flow_map: Any, x1: Tensor, *, condition: dict, seed: int, sample_ids: Tensor, scale: float = 1.0) -> Loss:
    """|| u_{t,t}(x_t) - (x1 - x0) ||^2 with noise and times of (seed, sample id), plain torch."""
    x0 = rows_of_noise(x1, seed, sample_ids, 0)
    t = torch.special.ndtr(rows_of_noise(x1[:, 0], seed, sample_ids, 1))
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    out = flow_map.network(x, t, t, condition["label"])
    error = (out - (x1 - x0)).square().sum(1)
    return Loss(scale * error, error.detach() / x1.shape[1], {"half": error.detach().mean() / 2})


def step(objective: Any = matching, dtype=torch.float64, seed: int = 0, **options: Any) -> Step:
    torch.manual_seed(seed)
    network = options.pop("network", None) or Network(dropout=options.pop("dropout", 0.0))
    return Step(network.to(dtype), objective, **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


__all__ = ["Batch", "Network", "Stream", "matching", "pfm", "rows_of_noise", "step", "weights"]
