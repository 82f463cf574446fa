"""The checkerboard in two dimensions: drawn, never stored, with its density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows
from .random_numbers import uniform

__all__ = ["checkerboard"]

_MARGIN = 2.0**-20


@dataclass(frozen=True)
class checkerboard:
    """Uniform on the 8 of 4 x 4 cells over [-half, half]^2 whose ix + iy is even. Endless: index i is a draw.

        p(x) = 1 / (2 half^2) on the cells, 0 elsewhere;    deviation half / sqrt(3) in each coordinate

    The 2-D set of Boffi, Albergo & Vanden-Eijnden 2025, where half = 1; half = sqrt(3) is the same in units of its own
    deviation, which is how a network that scales its input and output by it sees the set. KL is the same in both.

    Numbers are float32 and depend on (seed, index) alone. Within a cell the outermost 2^-20 of its width is left out: a
    rounded number must not lie in the neighbour, where the density is 0.

    >>> x1, condition = checkerboard().batch(np.arange(1000))
    >>> checkerboard().density(x1).unique()
    tensor([0.5000], dtype=torch.float64)
    """

    half: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0.0 < self.half < math.inf:
            raise ValueError(f"half = {self.half}; half the width of the board is positive, e.g. 1.0")

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        u = uniform(self.seed, check_rows(indices, None, "checkerboard"), 3)
        cell = np.floor(8.0 * u[:, 0]).astype(np.int64)
        iy = cell // 2
        corner = np.stack([2 * (cell % 2) + iy % 2, iy], 1)
        inside = _MARGIN + (1.0 - 2.0 * _MARGIN) * u[:, 1:]
        x = ((corner + inside) / 2.0 - 1.0) * self.half
        return torch.from_numpy(x.astype(np.float32)), {}

    def density(self, x: Tensor) -> Tensor:
        """p(x), (N,) float64, of points (N, 2)."""
        if x.dim() != 2 or x.shape[1] != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; points are (N, 2)")
        place = torch.floor((x.double() / self.half + 1.0) * 2.0)
        on = (place >= 0).all(1) & (place < 4).all(1) & (place.sum(1) % 2 == 0)
        return on.double() / (2.0 * self.half**2)

    def divergence(self, x: Tensor, cuts: int = 6) -> float:
        """KL(data || model) in nats of samples x (N, 2), from histograms: each cell is cut into `cuts` x `cuts` bins.

            sum_b p log(p / q_b),   p = 1 / (8 cuts^2) exactly,   q_b = (n_b + 1/2) / (N + (8 cuts^2 + 1) / 2)

        over the K = 8 cuts^2 bins of the cells; what lies off the cells counts in N alone. The half in every bin
        (Krichevsky & Trofimov 1981) keeps an empty bin finite. Samples of the data itself give about (K - 1)/(2N);
        structure finer than a bin is not seen. A model that puts a share m off the cells has -log(1 - m) or more.
        """
        if x.dim() != 2 or x.shape[1] != 2 or len(x) == 0 or cuts < 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, cuts = {cuts}; points are (N, 2), and a cell has cuts >= 1"
            )
        place = torch.floor((x.double() / self.half + 1.0) * 2.0 * cuts)
        inside = (place >= 0).all(1) & (place < 4 * cuts).all(1)  # NaN is outside
        column, row = place[inside].long().unbind(1)
        count = torch.bincount(column * 4 * cuts + row, minlength=(4 * cuts) ** 2).view(4 * cuts, 4 * cuts).double()
        cell = torch.arange(4 * cuts) // cuts
        on = (cell[:, None] + cell) % 2 == 0
        bins = int(on.sum())
        q = (count[on] + 0.5) / (len(x) + (bins + 1) / 2.0)
        return float((-math.log(bins) - q.log()).mean())
