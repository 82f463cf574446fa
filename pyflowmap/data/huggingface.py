"""A data set of the package `datasets`, Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows
from .pictures import MAX_PIXELS, check_size, decode

__all__ = ["huggingface"]


class huggingface:
    """Rows of a `datasets.Dataset`: x1 from one column, condition["label"] from another.

    source    the Dataset itself; a folder written by its `save_to_disk`; or, with download=True, a name of the hub
    split     of a name or of a folder with several
    column    of the data: pictures (then `size` is needed) or arrays of numbers, taken as they are
    label     column of whole numbers from 0, or None
    size, channels, max_pixels   of pictures, as for `image_folder`
    download  True: `datasets.load_dataset` may fetch it. Nothing is fetched otherwise, and no code of a data set is run

    A row that cannot be read raises ValueError with its number. Needs `datasets`, unless something like a Dataset is
    given: `len` and `source[row]`, a mapping.
    """

    def __init__(
        self,
        source: Any,
        *,
        split: str = "train",
        column: str = "image",
        label: str | None = "label",
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        download: bool = False,
    ):
        if channels not in (1, 3):
            raise ValueError(f"channels = {channels!r}; 3 for colour, 1 for grey")
        self.rows = _opened(source, split, download) if isinstance(source, (str, Path)) else source
        if not hasattr(self.rows, "__len__") or not hasattr(self.rows, "__getitem__"):
            raise TypeError(
                f"source is {type(source).__name__}, which has no rows to look up; streaming sets must be saved first"
            )
        if len(self.rows) == 0:
            raise ValueError("the data set is empty; there is nothing to train on")
        self.column, self.label, self.channels, self.max_pixels = column, label, channels, max_pixels
        self.size = None if size is None else check_size(size)
        first = self._row(0)
        for name in (column, *([] if label is None else [label])):
            if name not in first:
                raise ValueError(
                    f"the data set has no column {name!r}; it has {', '.join(map(str, first))}: pass column=, label="
                )
        self.shape = tuple(self._sample(first, 0).shape)
        self.labels = 0 if label is None else self._classes(label)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = check_rows(indices, len(self), "huggingface").tolist()
        rows = [self._row(number) for number in numbers]
        x1 = torch.from_numpy(np.stack([self._sample(row, number) for row, number in zip(rows, numbers)]))
        if self.label is None:
            return x1, {}
        label = np.asarray([int(row[self.label]) for row in rows], np.int64)
        wrong = np.flatnonzero((label < 0) | (label >= self.labels))
        if wrong.size:
            raise ValueError(
                f"row {numbers[wrong[0]]} has {self.label} = {label[wrong[0]]}, not one of 0 to {self.labels - 1}; "
                "mend it, or leave such rows out"
            )
        return x1, {"label": torch.from_numpy(label)}

    def _row(self, number: int) -> Any:
        try:
            return self.rows[number]
        except Exception as error:  # Arrow and the decoders of a column raise what they like
            raise ValueError(f"row {number} of the data set cannot be read ({error}); leave it out") from error

    def _sample(self, row: Any, number: int) -> np.ndarray:
        value = row[self.column]
        if hasattr(value, "convert"):  # a picture
            if self.size is None:
                raise ValueError(f"column {self.column!r} holds pictures; pass size=, e.g. 64")
            try:
                pixels = decode(value, self.size, self.channels, self.max_pixels)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"row {number} of the data set cannot be read ({error}); leave it out") from None
            return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
        x = np.asarray(value)
        if x.dtype.kind not in "fiu" or x.ndim == 0:
            raise ValueError(
                f"row {number}: column {self.column!r} is {x.dtype} of shape {x.shape}, not an array of numbers"
            )
        x = x.astype(np.float32)
        if x.shape != getattr(self, "shape", x.shape) or not np.isfinite(x).all():
            raise ValueError(
                f"row {number}: column {self.column!r} has shape {x.shape} or numbers that are not finite; row 0 has "
                f"shape {getattr(self, 'shape', x.shape)}"
            )
        return x

    def _classes(self, label: str) -> int:
        """From the column's ClassLabel where it is one; else from the column, which is small."""
        feature: Any = (getattr(self.rows, "features", None) or {}).get(label)
        if getattr(feature, "num_classes", None):
            return int(feature.num_classes)
        column = getattr(self.rows, "column_names", None) and self.rows[label]
        values = column or [self._row(number)[label] for number in range(len(self))]
        return int(max(values)) + 1


def _opened(source: str | Path, split: str, download: bool) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError("this data set is read by the package datasets; run pip install datasets") from None
    if Path(source).is_dir():
        found = datasets.load_from_disk(str(source))
        if isinstance(found, dict):
            if split not in found:
                raise ValueError(f"{source} has no split {split!r}; it has {', '.join(found)}")
            return found[split]
        return found
    if not download:
        raise FileNotFoundError(
            f"there is no folder {str(source)!r}; pass download=True if it is a name of the hub to be fetched, "
            "or the Dataset itself"
        )
    return datasets.load_dataset(str(source), split=split)
