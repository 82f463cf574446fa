"""Greyscale PNG files with the standard library, so that sampling needs no plotting package."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import whole_file

__all__ = ["grid", "write"]


def grid(images: Tensor, columns: int, border: int = 2, zoom: int = 2) -> np.ndarray:
    """(N, 1, H, W) in [-1, 1] -> one uint8 picture, row by row, on black."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    picture = torch.full((rows, columns, h + border, w + border), -1.0)
    picture.view(-1, h + border, w + border)[:n, :h, :w] = images[:, 0].detach().float().cpu()
    picture = picture.permute(0, 2, 1, 3).reshape(rows * (h + border), columns * (w + border))
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return pixels.repeat(zoom, 0).repeat(zoom, 1)


def write(pixels: np.ndarray, path: str | Path) -> None:
    """Write a (height, width) uint8 array as PNG (ISO 15948: filter 0, one IDAT chunk), whole or not at all."""
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}; write takes uint8 (height, width)")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path = {str(path)!r}; the picture is a PNG, name it .png")
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = pixels

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    with whole_file(path) as temporary:
        temporary.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows.tobytes()))
            + chunk(b"IEND", b"")
        )
