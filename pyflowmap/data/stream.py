"""Batches in an order that depends on (seed, step) alone."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Stream", "permutation"]

_STREAM_OF_ENDLESS = 1 << 40  # indices that one seed may use; 2^22 seeds fit into an int64


class Batch(NamedTuple):
    x1: Tensor  # (B / world, ...)
    condition: dict[str, Tensor]
    sample_ids: Tensor  # (B / world,) int64, positions in the global batch


def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: argsort of `rows` Philox words keyed by (seed, epoch).

    Words, not `Generator.permutation`: numpy keeps the bits of its bit generators from version to version, but not the
    ways of its generators, and a run that is resumed years later must see the same order.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable")


class Stream:
    """Endless batches of a data set; step k of an unbroken run is a pure function of (seed, k).

    Row i of step k is number n = k batch + i of the run: place n mod N of a random order of epoch n // N. Each sample
    comes once an epoch: where N is no multiple of the batch, a batch ends one epoch and begins the next. An endless set
    (no `__len__`) is read in order, a range of its own for each seed modulo 2^22.

    data     a data set: `batch(indices) -> (x1, condition)` and, unless endless, `len`
    batch    rows of the *global* batch, a multiple of `world`
    rank, world   process `rank` of `world` gets the rows rank, rank + world, ... of the global batch. `sample_ids` are
             their positions in it, so that what is drawn for a row does not depend on the number of processes
    prefetch how many batches one thread makes ahead; 0: none. It changes nothing but the time

    `position`, the number of batches handed out, is the whole state: save it, set it, and the run goes on as if it had
    not been broken. Setting it costs nothing; the next batch sorts its epoch's order once, O(N log N).

    >>> from pyflowmap.data import checkerboard
    >>> stream = Stream(checkerboard(), 8, seed=1)
    >>> next(stream).x1.shape, stream.position
    (torch.Size([8, 2]), 1)
    """

    def __init__(self, data: Any, batch: int, *, seed: int = 0, rank: int = 0, world: int = 1, prefetch: int = 2):
        if not callable(getattr(data, "batch", None)):
            raise TypeError(f"data is {type(data).__name__}; a data set has batch(indices) -> (x1, condition)")
        for name, value, least in (
            ("batch", batch, 1),
            ("world", world, 1),
            ("rank", rank, 0),
            ("prefetch", prefetch, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}; a whole number, at least {least}")
        if rank >= world:
            raise ValueError(f"rank = {rank}, world = {world}; a rank lies below world")
        if batch % world:
            raise ValueError(f"batch = {batch} cannot be shared evenly by {world} processes; use a multiple of {world}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed = {seed!r}; a whole number from 0 to 2^63 - 1")
        self.data, self.batch, self.seed, self.rank, self.world = data, batch, seed, rank, world
        self.length = len(data) if hasattr(data, "__len__") else None
        if self.length == 0:
            raise ValueError("the data set is empty; there is nothing to train on")
        self._position, self._prefetch = 0, prefetch
        self._ids = np.arange(rank, batch, world, dtype=np.int64)
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order): one is kept
        self._pending: deque[Future] = deque()  # batches from `position` on
        self._thread: ThreadPoolExecutor | None = None

    # ---- which samples -----------------------------------------------------------------------------------------------

    def indices(self, step: int) -> np.ndarray:
        """The set's rows that this process sees at `step`, (batch / world,) int64."""
        number = step * self.batch + self._ids
        if self.length is None:
            return (self.seed % (1 << 22)) * _STREAM_OF_ENDLESS + number
        epoch, place = np.divmod(number, self.length)
        chosen = np.empty_like(place)
        for each in np.unique(epoch):  # more than one at the end of an epoch, or where a batch is larger than the set
            now = epoch == each
            chosen[now] = self._order_of(int(each))[place[now]]
        return chosen

    def _order_of(self, epoch: int) -> np.ndarray:
        order = self._order  # read once: another thread may replace it
        if order is None or order[0] != epoch:
            assert self.length is not None
            self._order = order = (epoch, permutation(self.length, self.seed, epoch))
        return order[1]

    def _make(self, step: int) -> Batch:
        x1, condition = self.data.batch(self.indices(step))
        rows = len(self._ids)
        for name, value in (("x1", x1), *condition.items()):
            if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(self.data).__name__}.batch of {rows} indices gave {name}: {shown}; "
                    f"give a tensor of {rows} rows"
                )
        return Batch(x1, condition, torch.from_numpy(self._ids.copy()))

    # ---- the iterator ------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Batches handed out; what is made ahead does not count."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"position = {value!r}; the number of batches that were handed out, at least 0")
        self._forget()
        self._position = value

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._prefetch == 0:
            batch = self._make(self._position)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="pyflowmap-stream")
            while len(self._pending) <= self._prefetch:
                self._pending.append(self._thread.submit(self._make, self._position + len(self._pending)))
            try:
                batch = self._pending[0].result()
            except BaseException:
                self._forget()  # asked again, the same step is tried again
                raise
            self._pending.popleft()
        self._position += 1
        return batch

    def close(self) -> None:
        """End the thread; the stream can still be read."""
        self._forget()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _forget(self) -> None:
        for each in self._pending:
            each.cancel()
        self._pending.clear()
