"""Uniform and normal numbers that depend on (seed, index) alone, for sets that are drawn rather than stored."""

from __future__ import annotations

import numpy as np

from ..reference import philox

__all__ = ["normal", "uniform"]

_STREAM = 0x64617461  # apart from the noise (0) and the times of training


def uniform(seed: int, indices: np.ndarray, columns: int) -> np.ndarray:
    """(n, columns) float64 in (0, 1): (w + 1/2) / 2^32 of the Philox words w, keyed as the library's noise is."""
    low = 0xFFFFFFFF
    ids = indices.astype(np.int64)[:, None]
    block = np.arange(-(-columns // 4), dtype=np.int64)[None, :]
    zeros = np.zeros_like(ids + block)
    counter = [block + zeros, (ids & low) + zeros, ((ids >> 32) & low) + zeros, _STREAM + zeros]
    words = philox(counter, (seed & low, (seed >> 32) & low))  # type: ignore[arg-type]  # arrays or tensors alike
    return (np.stack(words, -1).reshape(len(ids), -1)[:, :columns] + 0.5) * 2.0**-32


def normal(seed: int, indices: np.ndarray, columns: int, skip: int = 0) -> np.ndarray:
    """(n, columns) float64 standard normals by Box and Muller, from the uniform numbers after the first `skip`."""
    pairs = -(-columns // 2)
    u = uniform(seed, indices, skip + 2 * pairs)[:, skip:]
    radius, turn = np.sqrt(-2.0 * np.log(u[:, :pairs])), 2.0 * np.pi * u[:, pairs:]
    return np.concatenate([radius * np.cos(turn), radius * np.sin(turn)], 1)[:, :columns]
