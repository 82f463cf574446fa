"""PNG files with the standard library, so that sampling and training need no plotting package."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import whole_file

__all__ = ["grid", "picture", "write"]


def grid(images: Tensor, columns: int, border: int = 2, zoom: int = 2) -> np.ndarray:
    """(N, 1 or 3, H, W) in [-1, 1] -> one uint8 picture (H', W') or (H', W', 3), row by row, on black."""
    n, c, h, w = images.shape
    if c not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}; a picture has 1 or 3 channels, (N, C, H, W)")
    rows = -(-n // columns)
    picture = torch.full((rows, columns, c, h + border, w + border), -1.0)
    picture.view(-1, c, h + border, w + border)[:n, :, :h, :w] = images.detach().float().cpu()
    picture = picture.permute(0, 3, 1, 4, 2).reshape(rows * (h + border), columns * (w + border), c)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return (pixels[..., 0] if c == 1 else pixels).repeat(zoom, 0).repeat(zoom, 1)


def picture(images: Tensor) -> np.ndarray:
    """(N, C, H, W) as a nearly square grid, (C, H, W) as it is."""
    if not isinstance(images, Tensor) or images.dim() not in (3, 4) or images.numel() == 0:
        shown = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"the pictures are {shown}; they are (N, C, H, W) or (C, H, W), in [-1, 1]")
    if images.dim() == 3:
        return grid(images[None], 1, border=0, zoom=1)
    return grid(images, columns=math.ceil(math.sqrt(len(images))))


def write(pixels: np.ndarray, path: str | Path) -> None:
    """Write uint8 (height, width) or (height, width, 3) as PNG (ISO 15948: filter 0, one IDAT chunk), whole or not at
    all."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}; write takes uint8 (height, width[, 3])")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path = {str(path)!r}; the picture is a PNG, name it .png")
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    with whole_file(path) as temporary:
        temporary.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows.tobytes()))
            + chunk(b"IEND", b"")
        )
