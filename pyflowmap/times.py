"""Laws of training times. Each returns float32 times of shape (B,) on the device of `x1`, drawn there without a sync.

A pair law returns (s, t) with s <= t: the start and the end of a jump. `equal` is the expected share of rows with
t = s, the rows that see plain flow matching. All means are in this library's time, 0 = noise to 1 = data.

With `seed` the times of a row depend on (seed, sample id) alone, not on the batch, the device or the number of
processes; `sample_ids` (B,), int64, default 0..B-1. With `generator`, or with neither, torch draws them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import evaluate, noise

__all__ = ["uniform", "uniform_pair", "logit_normal", "logit_normal_pair"]

_STREAM = 0x74696D65  # apart from the noise of the same sample, which is stream 0
_BELOW_ONE = 1.0 - 2.0**-24


class _Source:
    """Numbers for a law: columns of standard normal or uniform numbers, a row per sample."""

    def __init__(
        self, x1: Tensor, seed: int | None, generator: torch.Generator | None, sample_ids: Tensor | None, columns: int
    ):
        if x1.dim() == 0:
            raise ValueError("x1 has no batch dimension; its shape is (B, ...)")
        if seed is not None and generator is not None:
            raise ValueError(f"seed = {seed} and generator are both given; give one")
        if seed is None and sample_ids is not None:
            raise ValueError("sample_ids need a seed: what is drawn depends on (seed, sample id); pass seed=")
        self.device, self.rows, self.generator = x1.device, x1.shape[0], generator
        self.field = None
        if seed is not None:
            like = torch.empty(self.rows, columns, device=x1.device)
            self.field = evaluate(noise(like, seed, sample_ids, stream=_STREAM)).unbind(1)

    def normal(self, column: int) -> Tensor:
        if self.field is not None:
            return self.field[column]
        return torch.randn(self.rows, **self._options())

    def uniform(self, column: int) -> Tensor:
        if self.field is not None:  # by the normal distribution's own function; in [0, 1), as torch.rand
            return torch.special.ndtr(self.field[column].double()).float().clamp(max=_BELOW_ONE)
        return torch.rand(self.rows, **self._options())

    def _options(self) -> dict:
        """Asked for a generator, torch.rand takes no symbolic size (a compiled step, any batch)."""
        options = {"device": self.device}
        return options if self.generator is None else {**options, "generator": self.generator}


def _share(equal: float) -> float:
    if not 0.0 <= equal <= 1.0:
        raise ValueError(f"equal = {equal} is not a share; it lies in [0, 1]")
    return equal


def _std(std: float) -> float:
    if not std >= 0.0:
        raise ValueError(f"std = {std}; it must be >= 0")
    return std


def _sorted(a: Tensor, b: Tensor, equal: float, source: _Source) -> tuple[Tensor, Tensor]:
    s, t = torch.minimum(a, b), torch.maximum(a, b)
    if equal > 0.0:
        t = torch.where(source.uniform(2) < equal, s, t)
    return s, t


def uniform(
    x1: Tensor, *, seed: int | None = None, generator: torch.Generator | None = None, sample_ids: Tensor | None = None
) -> Tensor:
    """t ~ U(0, 1), shape (B,)."""
    return _Source(x1, seed, generator, sample_ids, 1).uniform(0)


def uniform_pair(
    x1: Tensor,
    *,
    equal: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): two U(0, 1), sorted. Boffi et al. 2025.

    >>> s, t = uniform_pair(torch.zeros(8, 3), seed=0)
    >>> bool((s <= t).all())
    True
    """
    equal, source = _share(equal), _Source(x1, seed, generator, sample_ids, 3)
    return _sorted(source.uniform(0), source.uniform(1), equal, source)


def logit_normal(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """t = sigmoid(mean + std z), z ~ N(0, 1). Esser et al. 2024 (SD3), eq. 19."""
    std, source = _std(std), _Source(x1, seed, generator, sample_ids, 1)
    return torch.sigmoid(mean + std * source.normal(0))


def logit_normal_pair(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    equal: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): two logit-normal times, sorted; a share `equal` of the rows has t = s.

    Geng et al. 2025 (MeanFlow), sec. 4.3.
    A positive `mean` leans towards the data. MeanFlow's own time runs the other way, so its mean changes sign here.
    """
    std, equal, source = _std(std), _share(equal), _Source(x1, seed, generator, sample_ids, 3)
    first, second = (torch.sigmoid(mean + std * source.normal(column)) for column in (0, 1))
    return _sorted(first, second, equal, source)
