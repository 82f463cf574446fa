"""One file of a latent store, read by memory map, and what can be wrong with it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

__all__ = ["Shard", "checksums", "open_npy", "open_safetensors"]

KEYS = ("latents", "labels", "masks")
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def checksums(rows: int, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """CRC-32 of each row's bytes, latents then labels then masks, as they lie in the file: (rows,) int64."""
    found = np.zeros(rows, np.int64)
    present = [np.ascontiguousarray(arrays[key]) for key in KEYS if key in arrays]
    for row in range(rows):
        value = 0
        for array in present:
            value = zlib.crc32(array[row : row + 1].tobytes(), value)
        found[row] = value
    return found


class Shard:
    """Rows of one file (or of .npy files that belong together): memory-mapped arrays of one length."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], bfloat16: set[str], notes: dict[str, Any]):
        self.path, self.arrays, self.bfloat16, self.notes = path, arrays, bfloat16, notes
        latents = arrays["latents"]
        self.rows, self.shape = len(latents), tuple(latents.shape[1:])
        if not self.shape or self.rows == 0 or 0 in self.shape:
            raise ValueError(
                f"{path}: latents have shape {tuple(latents.shape)}; rows of at least one number are needed"
            )
        if latents.dtype.kind != "f" and "latents" not in bfloat16:
            raise ValueError(f"{path}: latents are {latents.dtype}; floating-point numbers are needed")
        for key, array in arrays.items():
            if len(array) != self.rows:
                raise ValueError(f"{path}: {key} has {len(array)} rows but latents have {self.rows}; write it again")
        labels = arrays.get("labels")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: labels are {labels.dtype} of shape {labels.shape}; one whole number a row is needed"
            )
        self._sizes = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> set[Path]:
        return {Path(a.filename) for a in self.arrays.values() if isinstance(a, np.memmap) and a.filename is not None}

    def read(self, rows: np.ndarray, first: int) -> dict[str, np.ndarray]:
        """These rows of every array, latents and masks as float32; `first` is the store's number of row 0.

        Raises ValueError that names the file and its rows where the bytes are not those that were written (where the
        file holds checksums), a number is not finite, or the file has shrunk.
        """
        for path, size in self._sizes.items():
            # Reading a map beyond the end of its file kills the process: look first.
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} has changed since it was opened; rows {_range(rows)} are gone: open it again")
        stored = {key: array[rows] for key, array in self.arrays.items()}
        known = stored.pop("crc32", None)
        if known is not None:
            self._refuse(checksums(len(rows), stored) != known, rows, first, "are damaged: their checksums differ")
        result = {}
        for key, array in stored.items():
            if key == "labels":
                result[key] = array.astype(np.int64)
                continue
            if key in self.bfloat16:
                array = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float().numpy()
            result[key] = array = array.astype(np.float32)
            broken = ~np.isfinite(array.reshape(len(rows), -1)).all(1)
            self._refuse(broken, rows, first, f"are damaged: {key} hold numbers that are not finite")
        return result

    def _refuse(self, wrong: np.ndarray, rows: np.ndarray, first: int, what: str) -> None:
        if wrong.any():
            bad = rows[wrong]
            raise ValueError(
                f"{self.path}: rows {_range(bad)} (of the store {_range(bad + first)}) {what}; write it again"
            )


def _range(rows: np.ndarray) -> str:
    low, high = int(rows.min()), int(rows.max())
    return str(low) if low == high else f"{low} to {high}"


def open_safetensors(path: Path) -> Shard:
    """The file's header is checked by safetensors, sizes included; the numbers are mapped, not read."""
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); write it again") from None
    if "latents" not in names:
        raise ValueError(f'{path} has no "latents"; it holds {", ".join(sorted(names)) or "nothing"}: rename the key')
    with open(path, "rb") as raw:
        begin = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(begin - 8))
    whole = np.memmap(path, np.uint8, "r")
    arrays, bfloat16 = {}, set()
    for key in (*KEYS, "crc32"):
        if key not in names:
            continue
        kind, (low, high) = header[key]["dtype"], header[key]["data_offsets"]
        if kind not in _TYPES:
            raise ValueError(f"{path}: {key} has dtype {kind}; one of {', '.join(_TYPES)} is needed")
        arrays[key] = whole[begin + low : begin + high].view(_TYPES[kind]).reshape(header[key]["shape"])
        if kind == "BF16":
            bfloat16.add(key)
    return Shard(path, arrays, bfloat16, _notes(metadata, path))


def open_npy(path: Path) -> Shard:
    """latents<rest>.npy, and beside it labels<rest>.npy and masks<rest>.npy where they exist; another name: latents."""
    files = {"latents": path}
    if path.name.startswith("latents"):
        for key in ("labels", "masks"):
            beside = path.with_name(key + path.name[len("latents") :])
            if beside.is_file():
                files[key] = beside
    arrays = {}
    for key, file in files.items():
        try:
            arrays[key] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError) as error:
            raise ValueError(f"{file} is not a whole .npy file of numbers ({error}); write it again") from None
        if not isinstance(arrays[key], np.memmap) or arrays[key].ndim == 0:
            raise ValueError(f"{file} is not a .npy file of rows; numpy.save writes one")
    return Shard(path, arrays, set(), {})


def _notes(metadata: Mapping[str, str], path: str | os.PathLike) -> dict[str, Any]:
    """What `write_latents` noted in the header; {} for files of others."""
    text = metadata.get("pyflowmap_latents")
    if text is None:
        return {}
    try:
        notes = json.loads(text)
        number = lambda key: isinstance(notes[key], int) and not isinstance(notes[key], bool)  # noqa: E731
        moments = [np.asarray(notes[key], np.float64) for key in ("mean", "spread")]
        fit = all(map(number, ("format", "first", "rows", "of", "labels"))) and moments[0].shape == moments[1].shape
        if fit and notes["format"] == 1 and moments[0].ndim == 1 and np.isfinite(moments).all():
            return notes
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path}: the description in its header is damaged or of a newer version; write it again")
