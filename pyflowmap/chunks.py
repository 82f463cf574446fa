"""Chunks: a batch run some rows at a time, so that it takes no more memory than it may.

How many rows fit is measured on the work itself: the first chunk is one row, the second twice or up to four times as
many, and so on. After two sizes r1 < r2 with peaks p1 < p2, a chunk of r rows takes

    p2 + (r - r2) (p2 - p1) / (r2 - r1),        and no chunk has more than four times the rows of the largest measured

so nothing is run that is thrown away. A peak is what the call allocates beyond what was allocated when it began: on
CUDA the allocator's own maximum (its statistics are reset), on the CPU the live storages of all tensors that are made;
what a CPU kernel takes for itself and gives back is not seen. Sizes depend on the measurement, and a matrix product of
another number of rows may round differently: name `chunk` where every bit must come out again.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .guidance import Guidance

__all__ = ["Part", "Rows", "Sizes", "bytes_of", "collect", "measured"]

_GROWTH = 4
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_of(limit: int | str) -> int:
    """2_000_000_000, "2GB" or "1.5GiB" as a number of bytes.

    >>> bytes_of("2GB"), bytes_of("1.5 KiB")
    (2000000000, 1536)
    """
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]|[KMGT]i)?B\s*", limit)
        if found is None:
            raise ValueError(f'memory_limit = {limit!r}; write a number of bytes, or one like "500MB", "2GB", "1.5GiB"')
        return int(float(found[1]) * _UNITS[found[2] or ""])
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f'memory_limit = {limit!r}; it is a positive number of bytes, or a string like "2GB"')
    return limit


# ---- a part of a batch ---------------------------------------------------------------------------------------------


class Rows:
    """Cuts what has `count` rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, condition: Mapping[str, Any], lo: int, hi: int) -> dict[str, Any]:
        """Rows lo to hi of a condition: of its tensors, also inside lists and dicts. Raises for what may or may not be
        one per sample."""
        return {key: self._cut(value, key, lo, hi) for key, value in condition.items()}

    def _cut(self, value: Any, key: str, lo: int, hi: int) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0:
                return value
            if value.shape[0] != self.count:
                raise ValueError(
                    f"condition {key!r} holds a tensor of {value.shape[0]} rows for {self.count} samples, so it cannot "
                    "be cut into chunks; give one row per sample"
                )
            return value[lo:hi]
        if isinstance(value, Mapping):
            return {name: self._cut(each, key, lo, hi) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            if any(isinstance(each, Tensor) for each in tree_leaves(value)):
                return type(value)([self._cut(each, key, lo, hi) for each in value])
            if len(value) == self.count > 1:
                raise TypeError(
                    f"condition {key!r} is a {type(value).__name__} of {self.count} entries, one per sample or not; "
                    "chunks cut tensors only"
                )
        return value


class Part(Guidance):
    """A guidance whose conditions, made for the whole batch, have been cut."""

    def __init__(self, guidance: Guidance, conditions: tuple[Mapping[str, Any], ...]) -> None:
        self.guidance, self._conditions = guidance, conditions

    @property
    def remembers(self) -> bool:
        return self.guidance.remembers

    @property
    def singular(self) -> frozenset[float]:
        return self.guidance.singular

    def check(self, solver: Any, grad: bool | str = False) -> None:
        self.guidance.check(solver, grad)

    def evaluations(self, s: float) -> int:
        return self.guidance.evaluations(s)

    def conditions(self, condition: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        return self._conditions

    def slots(self, condition: Mapping[str, Any]) -> int:
        return self.guidance.slots(condition)

    def begin(self) -> Guidance:
        return self.guidance.begin()

    def idle(self, times: list[float]) -> int:
        return self.guidance.idle(times)


# ---- how much memory -------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Bytes in storages made while it is on, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}
        self.foreign: dict[int, Any] = {}  # there before; held, so that no new one takes the address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.known:
                self.foreign.setdefault(storage._cdata, storage)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key not in self.known and key not in self.foreign:
                self.known[key] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for each in tree_leaves(tree):
        if isinstance(each, Tensor) and each.layout == torch.strided:
            yield each.untyped_storage()


def measured(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int, int]:
    """What `function` returns, the most bytes that it had allocated at once, and those that it has not freed."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        peak = torch.cuda.max_memory_allocated(device) - before
        return result, peak, torch.cuda.memory_allocated(device) - before
    with _Live() as live:
        result = function()
    return result, live.peak, live.now


class Sizes:
    """How many rows to run next: `chunk`, or as many as `limit` allows."""

    def __init__(self, rows: int, chunk: int | None, limit: int | str | None, device: torch.device) -> None:
        if chunk is not None and limit is not None:
            raise ValueError(f"chunk = {chunk} with memory_limit = {limit!r}; one of them decides how many rows to run")
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk = {chunk!r}; it is a whole number of rows, at least 1")
        if limit is not None and device.type not in ("cpu", "cuda"):
            raise ValueError(f"memory_limit is measured on CPU and CUDA, the noise is on {device}; use chunk=")
        self.rows, self.chunk, self.device = rows, chunk, device
        self.limit = None if limit is None else bytes_of(limit)
        self.taken = 0  # by the result, and by what the runs so far have left behind
        self.peaks: dict[int, int] = {}  # by rows

    def next(self, left: int) -> int:
        if self.limit is None:
            return min(left, self.chunk or left)
        if not self.peaks:
            return min(left, 1)
        sizes = sorted(self.peaks)
        largest = sizes[-1]
        if len(sizes) == 1:  # a peak grows no faster than the rows do
            slope = self.peaks[largest] / largest
        else:
            slope = (self.peaks[largest] - self.peaks[sizes[-2]]) / (largest - sizes[-2])
        room = self.limit - self.taken - self.peaks[largest]
        if room < 0:
            return max(1, min(left, largest // 2))
        fit = largest + int(room / slope) if slope > 0 else _GROWTH * largest
        return max(1, min(left, fit, _GROWTH * largest))

    def run(self, part: Callable[[int, int], Tensor], lo: int, hi: int) -> Tensor:
        size = hi - lo
        if self.limit is None or size <= max(self.peaks, default=0):
            return part(lo, hi)
        piece, peak, left = measured(lambda: part(lo, hi), self.device)
        bytes_per_row = piece.untyped_storage().nbytes() // max(1, size)
        behind = max(0, left - piece.untyped_storage().nbytes())
        if not self.peaks:
            self.taken = self.rows * bytes_per_row
            least = self.taken + peak
            if least > self.limit:
                raise ValueError(
                    f"memory_limit = {self.limit} bytes: one row alone takes {peak} and the result of {self.rows} rows "
                    f"{self.taken}; the smallest limit that works is {least}"
                )
        self.taken += behind
        self.peaks[size] = max(1, peak - behind)
        return piece


def collect(
    part: Callable[[int, int], Tensor],
    sizes: Sizes,
    *,
    like: Tensor | None,  # whose memory format the result has
    dim: int,
    grad: bool,
    progress: bool,
) -> Tensor:
    """`part(lo, hi)` for all rows, put together along `dim`."""
    rows, lo = sizes.rows, 0
    if rows == 0:
        return part(0, 0)
    result: Tensor | None = None
    pieces: list[Tensor] = []
    with _bar(rows) if progress else nullcontext() as bar:
        while lo < rows:
            hi = lo + sizes.next(rows - lo)
            piece = sizes.run(part, lo, hi)
            if grad:
                pieces.append(piece)
            else:
                if result is None and like is not None and dim == 0:
                    result = torch.empty_like(like)
                elif result is None:
                    result = piece.new_empty((*piece.shape[:dim], rows, *piece.shape[dim + 1 :]))
                result.narrow(dim, lo, hi - lo).copy_(piece)
            del piece
            if bar is not None:
                bar.update(hi - lo)
            lo = hi
    return torch.cat(pieces, dim) if grad else result  # type: ignore[return-value]


def _bar(rows: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=rows, desc="sampling", unit="sample", leave=False)
