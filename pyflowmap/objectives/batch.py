"""What objectives do with a batch: check it, and split it into rows that learn different things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_batch", "check_share", "rows_of", "whole"]


def check_batch(x1: Tensor, x0: Tensor | None) -> None:
    """One-line errors for what every objective is given."""
    if not isinstance(x1, Tensor) or not x1.is_floating_point() or x1.dim() < 2:
        shown = f"{x1.dtype} of shape {tuple(x1.shape)}" if isinstance(x1, Tensor) else type(x1).__name__
        raise TypeError(f"x1 is {shown}; data is a floating-point tensor (B, ...), e.g. x1.float()")
    if x1.shape[0] == 0:
        raise ValueError(f"x1 has shape {tuple(x1.shape)}: an empty batch has no loss; skip it")
    if x0 is not None and x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}; give them one shape")


def check_share(share: float, name: str) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} = {share}; it is a share of the batch, e.g. 0.75")


def rows_of(condition: Mapping[str, Any], rows: int, start: int, stop: int) -> dict[str, Any]:
    """The condition of rows start to stop of `rows`; what has no row per sample is shared."""
    return {
        key: value[start:stop] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows else value
        for key, value in condition.items()
    }


def whole(expected: float, seed: int | None) -> int:
    """`expected` rounded up or down at random so that its mean is kept: host only, no sync."""
    low = int(expected)
    if expected == low:
        return low
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return low + int(torch.rand((), generator=generator).item() < expected - low)
