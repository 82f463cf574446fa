"""A mixture of Gaussians: drawn, never stored, with its density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows
from .random_numbers import normal, uniform

__all__ = ["mixture"]


@dataclass(frozen=True)
class mixture:
    """p(x) = sum_k w_k N(x; m_k, std^2 I). Endless: index i is a draw. One mean: a Gaussian.

    means    K rows of D numbers
    std      of every component
    weights  K positive numbers, in proportion; default: equal
    labelled True: the component is condition["label"]

    Numbers are float32 and depend on (seed, index) alone.

    >>> mixture(means=((0.0, 0.0), (4.0, 0.0))).batch(np.arange(8))[0].shape
    torch.Size([8, 2])
    """

    means: Sequence[Sequence[float]] = ((0.0, 0.0),)
    std: float = 1.0
    weights: Sequence[float] | None = None
    labelled: bool = False
    seed: int = 0

    def __post_init__(self):
        means = np.asarray(self.means, dtype=np.float64)
        if means.ndim != 2 or means.size == 0 or not np.isfinite(means).all():
            raise ValueError(f"means have shape {means.shape}; pass K rows of D finite numbers")
        weights = self.share
        if weights.shape != means.shape[:1] or not (np.isfinite(weights) & (weights > 0.0)).all():
            raise ValueError(f"weights = {self.weights}; one positive number for each of the {len(means)} means")
        if not 0.0 < self.std < math.inf:
            raise ValueError(f"std = {self.std}; it is positive, e.g. 1.0")

    @property
    def share(self) -> np.ndarray:
        """The components' probabilities, (K,)."""
        weights = np.asarray([1.0] * len(self.means) if self.weights is None else self.weights, dtype=np.float64)
        return weights / weights.sum()

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.means[0]),)

    @property
    def labels(self) -> int:
        return len(self.means) if self.labelled else 0

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows = check_rows(indices, None, "mixture")
        edges = np.cumsum(self.share)[:-1]
        component = np.searchsorted(edges, uniform(self.seed, rows, 1)[:, 0])
        means = np.asarray(self.means, dtype=np.float64)
        x = means[component] + self.std * normal(self.seed, rows, means.shape[1], skip=1)
        condition = {"label": torch.from_numpy(component.astype(np.int64))} if self.labelled else {}
        return torch.from_numpy(x.astype(np.float32)), condition

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), (N,) float64, of points (N, D)."""
        if x.dim() != 2 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; points are (N, {self.shape[0]})")
        means = torch.as_tensor(np.asarray(self.means, dtype=np.float64))
        squares = (x.double()[:, None] - means).square().sum(-1) / self.std**2
        constant = -0.5 * self.shape[0] * math.log(2.0 * math.pi * self.std**2)
        return torch.logsumexp(torch.from_numpy(self.share).log() - 0.5 * squares, 1) + constant
