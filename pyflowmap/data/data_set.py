"""What a data set is, and what each one of them needs: checked indices, and an example that is made without reading."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataSet", "check_rows", "describe", "example"]


class DataSet(Protocol):
    """`batch(indices) -> (x1, condition)` and a `shape`; `len(set)` rows, or no `__len__`: endless.

    batch    int64 indices (B,) -> float32 x1 (B, *shape) and a dictionary of tensors with a row each, on the CPU. The
             same indices give the same numbers; it may be called from another thread
    shape    of one sample

    Optional, for checks before any data is read: `labels`, the number of classes of condition["label"] (0: there is no
    label), and `mask_shape`, the shape of condition["mask"] (None: there is no mask).
    """

    shape: tuple[int, ...]

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]: ...


def check_rows(indices: Any, length: int | None, name: str) -> np.ndarray:
    """The indices as int64 (B,), each of them a row of the set."""
    rows = np.asarray(indices)
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: indices are {rows.dtype} of shape {rows.shape}; pass whole numbers (B,), e.g. np.arange(8)"
        )
    rows = rows.astype(np.int64)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (length is not None and high >= length):
        bound = "an index is not negative" if length is None else f"there are rows 0 to {length - 1}"
        raise ValueError(f"{name}: indices go from {low} to {high}; {bound}")
    return rows


def describe(data: Any) -> tuple[tuple[int, ...], int, tuple[int, ...] | None]:
    """(shape, labels, mask_shape) of a set; raises TypeError where it is none."""
    shape = getattr(data, "shape", None)
    if not callable(getattr(data, "batch", None)) or not isinstance(shape, tuple):
        raise TypeError(
            f"the data set is {type(data).__name__}; it has batch(indices) -> (x1, condition) and a shape, a tuple"
        )
    return shape, int(getattr(data, "labels", 0)), getattr(data, "mask_shape", None)


def example(data: Any, rows: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """What a batch looks like, without reading one: normal numbers, the set's last class, masks of zeros."""
    shape, labels, mask_shape = describe(data)
    x1 = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    condition = {}
    if labels:
        condition["label"] = torch.full((rows,), labels - 1)
    if mask_shape is not None:
        condition["mask"] = torch.zeros(rows, *mask_shape)
    return x1, condition
