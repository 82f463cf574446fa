"""Laws of training times. Each returns float32 times of shape (B,) on the device of `x1`, drawn there without a sync.

A pair law returns (s, t) with s <= t: the start and the end of a jump. `equal` is the expected share of rows with
t = s, the rows that see plain flow matching. All means are in this library's time, 0 = noise to 1 = data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["uniform", "uniform_pair", "logit_normal", "logit_normal_pair"]


def _generator(x1: Tensor, seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise ValueError(f"seed = {seed} and generator are both given; give one")
    if seed is not None:
        return torch.Generator(x1.device).manual_seed(seed)
    return generator


def _draw(law: Callable, rows: int, x1: Tensor, generator: torch.Generator | None) -> Tensor:
    """torch.rand or torch.randn; asked for a generator, they take no symbolic size (a compiled step, any batch)."""
    options = {} if generator is None else {"generator": generator}
    return law(rows, device=x1.device, **options)


def _rows(x1: Tensor) -> int:
    if x1.dim() == 0:
        raise ValueError("x1 has no batch dimension; its shape is (B, ...)")
    return x1.shape[0]


def _share(equal: float) -> float:
    if not 0.0 <= equal <= 1.0:
        raise ValueError(f"equal = {equal} is not a share; it lies in [0, 1]")
    return equal


def _std(std: float) -> float:
    if not std >= 0.0:
        raise ValueError(f"std = {std}; it must be >= 0")
    return std


def _pair(times: Tensor, equal: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    times = times.view(2, -1)
    s, t = times.amin(0), times.amax(0)
    if equal > 0.0:
        t = torch.where(_draw(torch.rand, s.shape[0], times, generator) < equal, s, t)
    return s, t


def uniform(x1: Tensor, *, seed: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """t ~ U(0, 1), shape (B,)."""
    return _draw(torch.rand, _rows(x1), x1, _generator(x1, seed, generator))


def uniform_pair(
    x1: Tensor, *, equal: float = 0.0, seed: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(s, t): two U(0, 1), sorted. Boffi et al. 2025.

    >>> s, t = uniform_pair(torch.zeros(8, 3), seed=0)
    >>> bool((s <= t).all())
    True
    """
    rows, equal, generator = _rows(x1), _share(equal), _generator(x1, seed, generator)
    return _pair(_draw(torch.rand, 2 * rows, x1, generator), equal, generator)


def logit_normal(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t = sigmoid(mean + std z), z ~ N(0, 1). Esser et al. 2024 (SD3), eq. 19."""
    rows, std, generator = _rows(x1), _std(std), _generator(x1, seed, generator)
    return torch.sigmoid(mean + std * _draw(torch.randn, rows, x1, generator))


def logit_normal_pair(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    equal: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): two logit-normal times, sorted; a share `equal` of the rows has t = s.

    Geng et al. 2025 (MeanFlow), sec. 4.3.
    A positive `mean` leans towards the data. MeanFlow's own time runs the other way, so its mean changes sign here.
    """
    rows, std, equal, generator = _rows(x1), _std(std), _share(equal), _generator(x1, seed, generator)
    return _pair(torch.sigmoid(mean + std * _draw(torch.randn, 2 * rows, x1, generator)), equal, generator)
