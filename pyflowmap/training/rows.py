"""What is done to the rows of a batch before the step: dropped conditions, and rows that must not count."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .seeds import mix

__all__ = ["check_dropout", "drop", "replaced"]


def check_dropout(dropout: Mapping[str, tuple[Any, float]]) -> None:
    for key, value in dropout.items():
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f'dropout[{key!r}] = {value!r}; it is (null, share), e.g. {{"label": (10, 0.1)}}')
        if not 0.0 <= value[1] <= 1.0:
            raise ValueError(f"dropout[{key!r}] has the share {value[1]}; it lies in [0, 1], e.g. 0.1")


def drop(
    condition: dict[str, Tensor],
    dropout: Mapping[str, tuple[Any, float]],
    sample_ids: Tensor,  # (B,) positions in the global batch, on the CPU
    total: int,  # rows of the global batch
    seed: int,
) -> dict[str, Tensor]:
    """Each row's condition replaced by null with probability share: classifier-free guidance needs both.

    Which rows depends on the seed and their positions in the global batch alone, not on how processes share it.
    """
    out = dict(condition)
    for key, (null, share) in dropout.items():
        if key not in condition:
            raise ValueError(f"dropout names the condition {key!r}; the data has {', '.join(condition) or 'none'}")
        x = condition[key]
        generator = torch.Generator().manual_seed(mix(seed, zlib.crc32(key.encode())))
        gone = (torch.rand(total, generator=generator) < share)[sample_ids.cpu()].to(x.device)
        null = torch.as_tensor(null, dtype=x.dtype, device=x.device)
        out[key] = torch.where(gone.view(-1, *[1] * (x.dim() - 1)), null, x)
    return out


def replaced(x: Tensor, good: Tensor) -> Tensor:
    """`x` with a good row in the place of each bad one; zeros where no row is good.

    A weight of 0 in the loss is not enough: a NaN activation reaches the gradient of the shared weights as 0 * NaN.
    A row that is replaced before the forward pass is finite all the way, and then a weight of 0 gives exactly 0.
    """
    rows = torch.nonzero(good).flatten()
    if len(rows) == 0:
        return torch.zeros_like(x)
    at = torch.arange(len(good), device=good.device)
    at[~good] = rows[torch.arange(int((~good).sum()), device=good.device) % len(rows)]
    return x[at]
