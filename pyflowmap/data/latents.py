"""A store of latents, or of any arrays: class- and mask-conditional, read by memory map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows
from .shard import Shard, open_npy, open_safetensors

__all__ = ["latents"]


class latents:
    """x1 = (stored latents - mean) / std, float32; condition["label"] and condition["mask"] where the store has them.

    path    a .safetensors file, or a folder of such shards in the order of their names, each with the keys

                latents  (N, ...)  float16, bfloat16, float32 or float64
                labels   (N,)      whole numbers from 0                           optional
                masks    (N, ...)  numbers, given as float32; one-hot for classes  optional
                crc32    (N,)      checksums, as `write_latents` makes them       optional

            or a .npy file of latents, or a folder of latents*.npy with labels*.npy and masks*.npy of the same ending
    mean, std   a number, a number per channel (the first dimension of a row), or "stored": as `write_latents` measured.
            A network learns best from unit deviation; `restore` goes back to what the autoencoder decodes
    labels, masks   False: leave them out

    Shapes, dtypes and file sizes are checked when the store is opened; rows when they are read: each against its
    checksum, and for numbers that are not finite. The error names the shard and its rows.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        mean: float | Sequence[float] | str = 0.0,
        std: float | Sequence[float] | str = 1.0,
        labels: bool = True,
        masks: bool = True,
    ):
        self.path = Path(path)
        self.shards = _opened(self.path)
        self.starts = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards])])
        self._check_shards()
        first = self.shards[0]
        self.shape = first.shape
        for shard in self.shards:
            for key, wanted in (("labels", labels), ("masks", masks)):
                if not wanted and shard.arrays.get("crc32") is None:  # a checksum covers what is left out, too
                    shard.arrays.pop(key, None)
        self.mask_shape = tuple(first.arrays["masks"].shape[1:]) if masks and "masks" in first.arrays else None
        self.labels = self._classes() if labels and "labels" in first.arrays else 0
        self.mean, self.std = self._per_channel(mean, "mean"), self._per_channel(std, "std")
        if not (self.std > 0.0).all():
            raise ValueError(f"std = {std}; a deviation is positive, and no channel of the store may be constant")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows = check_rows(indices, len(self), "latents")
        place = np.searchsorted(self.starts, rows, side="right") - 1
        x1 = np.empty((len(rows), *self.shape), np.float32)
        label = np.empty(len(rows), np.int64) if self.labels else None
        mask = None if self.mask_shape is None else np.empty((len(rows), *self.mask_shape), np.float32)
        for number in np.unique(place):
            here = place == number
            first = int(self.starts[number])
            read = self.shards[number].read(rows[here] - first, first)
            x1[here] = read["latents"]
            if label is not None:
                label[here] = read["labels"]
            if mask is not None:
                mask[here] = read["masks"]
        x1 = (x1 - self.mean) / self.std
        condition = {} if label is None else {"label": torch.from_numpy(label)}
        if mask is not None:
            condition["mask"] = torch.from_numpy(mask)
        return torch.from_numpy(x1), condition

    def restore(self, x: Tensor) -> Tensor:
        """mean + std x: in the units of the store, for the decoder."""
        mean, std = (torch.from_numpy(each).to(x) for each in (self.mean, self.std))
        return x * std + mean

    def _check_shards(self) -> None:
        """One kind of row, and all of them: `write_latents` notes in each shard which rows it holds."""
        first = self.shards[0]
        kinds = lambda shard: {k: tuple(v.shape[1:]) for k, v in shard.arrays.items() if k != "crc32"}  # noqa: E731
        for shard, start in zip(self.shards, self.starts.tolist()):
            if kinds(shard) != kinds(first):
                raise ValueError(
                    f"{shard.path} holds rows of {kinds(shard)} but {first.path.name} of {kinds(first)}; "
                    "one store has one kind"
                )
            noted = shard.notes
            if noted and (noted["first"] != start or noted["rows"] != shard.rows):
                raise ValueError(
                    f"{shard.path} begins with row {noted['first']} of its store, but {start} rows come before it: "
                    "a shard is missing or foreign; run write_latents again"
                )
        noted = self.shards[-1].notes
        if noted and noted["of"] != len(self):
            raise ValueError(
                f"{self.path}: the store has {noted['of']} rows but only {len(self)} are here; run write_latents again"
            )

    def _classes(self) -> int:
        largest = 0
        for shard in self.shards:
            labels = shard.arrays["labels"]
            if int(labels.min()) < 0:
                raise ValueError(
                    f"{shard.path}: row {int(labels.argmin())} has label {int(labels.min())}; labels start at 0"
                )
            largest = max(largest, int(labels.max()) + 1, shard.notes.get("labels", 0))
        if largest > 1 << 16:
            raise ValueError(f"{self.path}: labels go up to {largest - 1}, more than 65535; the labels are damaged")
        return largest

    def _per_channel(self, value: float | Sequence[float] | str, name: str) -> np.ndarray:
        """float32, broadcast against (B, C, ...)."""
        if isinstance(value, str):
            if value != "stored":
                raise ValueError(f'{name} = {value!r}; a number, a number per channel or "stored"')
            if not all(shard.notes for shard in self.shards):
                raise ValueError(f'{name} = "stored", but {self.path} was not written by write_latents; give numbers')
            mean, deviation = combined([shard.notes for shard in self.shards])
            value = (mean if name == "mean" else deviation).tolist()
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (1,), self.shape[:1]) or not np.isfinite(array).all():
            raise ValueError(
                f"{name} = {str(value)[:80]}; a finite number, or one for each of the {self.shape[0]} channels"
            )
        return array.reshape(-1, *[1] * (len(self.shape) - 1))


def combined(notes: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel of all shards, from each one's mean, sum of squares about it, and rows.

    Chan, Golub & LeVeque 1983, eq. 2.1: no difference of large sums.
    """
    rows, mean, spread = 0, np.float64(0.0), np.float64(0.0)
    for each in notes:
        n, its_mean, its_spread = each["rows"], np.asarray(each["mean"]), np.asarray(each["spread"])
        delta = its_mean - mean
        spread = spread + its_spread + delta**2 * (rows * n / (rows + n))  # squares per row: elements are averaged
        mean = mean + delta * (n / (rows + n))
        rows += n
    return np.asarray(mean), np.sqrt(spread / rows)


def _opened(path: Path) -> list[Shard]:
    if path.is_dir():
        files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("."))
        arrays = sorted(path.glob("latents*.npy"))
        if files and arrays:
            raise ValueError(f"{path} holds both .safetensors and latents*.npy; give a folder of one kind")
        if not files and not arrays:
            raise FileNotFoundError(f"{path} holds neither *.safetensors nor latents*.npy; write_latents makes a store")
        return [open_safetensors(p) for p in files] or [open_npy(p) for p in arrays]
    if not path.is_file():
        raise FileNotFoundError(f"there is no store {str(path)!r}; write_latents makes one")
    if path.suffix == ".npy":
        return [open_npy(path)]
    if path.suffix == ".safetensors":
        return [open_safetensors(path)]
    raise ValueError(f"{path} ends in {path.suffix!r}; a store is .safetensors, .npy or a folder of them")
