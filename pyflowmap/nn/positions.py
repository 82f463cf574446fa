"""Where the tokens of a picture are: rotation angles, or vectors to add."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rope_2d", "sincos_2d"]


def _angles(height: int, width: int, frequencies: int, base: float, device) -> tuple[Tensor, Tensor]:
    """Row and column times base^(-i / frequencies): two of (height * width, frequencies), float32, row-major."""
    frequency = torch.exp(torch.arange(frequencies, device=device) * (-math.log(base) / frequencies))
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency for n in (height, width))
    return rows.repeat_interleave(width, 0), columns.repeat(height, 1)


def rope_2d(
    height: int, width: int, channels: int, *, base: float = 100.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the axial rotary angles of a height x width grid, each (height * width, channels / 2), float32.

    The first half of the pairs turns with the row, the second with the column, at frequencies base^(-4i / channels).
    `base` 100 suits grids up to about 64. Heo et al. 2024 (RoPE-ViT), sec. 3.2.

    Raises ValueError where `channels` is no multiple of 4.

    >>> cos, sin = rope_2d(2, 3, 8)
    >>> cos.shape, sin[4].tolist()[::2]                    # row 1, column 1: sin(1) for both axes
    (torch.Size([6, 4]), [0.84147..., 0.84147...])
    """
    if channels % 4 or channels < 4:
        raise ValueError(f"rope_2d: channels = {channels} per head; two axes of pairs need a multiple of 4")
    angle = torch.cat(_angles(height, width, channels // 4, base, device), 1)
    return angle.cos(), angle.sin()


def sincos_2d(height: int, width: int, channels: int, *, device: torch.device | str | None = None) -> Tensor:
    """[sin r, cos r, sin c, cos c] of row and column angles: (height * width, channels), float32.

    Vaswani et al. 2017, sec. 3.5, per axis, as in ViT and DiT.

    Raises ValueError where `channels` is no multiple of 4.

    >>> sincos_2d(1, 2, 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.0000, 1.0000, 0.8415, 0.5403]])
    """
    if channels % 4 or channels < 4:
        raise ValueError(f"sincos_2d: channels = {channels}; sine and cosine of two axes need a multiple of 4")
    rows, columns = _angles(height, width, channels // 4, 10000.0, device)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1)
