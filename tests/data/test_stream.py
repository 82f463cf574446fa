"""The order of training: every row once an epoch, and a step that depends on (seed, step) alone."""

import threading

import numpy as np
import pytest
import torch

from pyflowmap.data import Stream, checkerboard
from pyflowmap.data.stream import permutation


class Rows:
    """Row i is the number i; it counts the calls and the threads."""

    shape = (1,)

    def __init__(self, rows):
        self.rows, self.threads, self.fail_at = rows, set(), None

    def __len__(self):
        return self.rows

    def batch(self, indices):
        assert indices.dtype == np.int64
        self.threads.add(threading.current_thread().name)
        if self.fail_at is not None and self.fail_at in indices:
            raise OSError("no such row today")
        return torch.from_numpy(indices).float()[:, None], {"label": torch.from_numpy(indices)}


def take(stream, steps):
    return [next(stream).condition["label"].tolist() for _ in range(steps)]


@pytest.mark.parametrize("rows, batch", [(12, 4), (10, 4), (3, 8), (1, 5)])
def test_every_epoch_holds_each_row_once_wherever_batches_end(rows, batch):
    flat = [row for rows_of in take(Stream(Rows(rows), batch, seed=3), 4 * rows) for row in rows_of]
    epochs = [flat[k : k + rows] for k in range(0, len(flat) - rows + 1, rows)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows >= 10:  # 10! orders: none comes twice
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permutation(20, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_uniform():
    """Row 0 of four stands at each place equally often: 4000 orders, 4 sigma of a binomial."""
    counts = np.bincount([int(np.flatnonzero(permutation(4, 0, e) == 0)[0]) for e in range(4000)], minlength=4)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


def philox4x64(counter, key):
    """Philox4x64-10 on Python's whole numbers. Salmon et al. 2011, table 2 and section 3.3."""
    mask, (c0, c1, c2, c3), (k0, k1) = 2**64 - 1, (counter, 0, 0, 0), key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def test_the_order_is_that_of_the_published_generator():
    """So that a run resumed with another numpy sees the same order."""
    words = philox4x64(1, (5, 2)) + philox4x64(2, (5, 2))
    assert permutation(8, 5, 2).tolist() == sorted(range(8), key=words.__getitem__)


def test_a_step_is_a_function_of_seed_and_step():
    whole = take(Stream(Rows(10), 4, seed=5), 9)
    for start in (8, 0, 5, 5, 2):
        stream = Stream(Rows(10), 4, seed=5, prefetch=start % 3)
        stream.position = start
        assert take(stream, 9 - start) == whole[start:]
        assert stream.position == 9
    assert take(Stream(Rows(10), 4, seed=6), 9) != whole


def test_position_can_jump_far_and_back_while_batches_are_made_ahead():
    stream = Stream(Rows(10), 4, prefetch=3)
    first = take(stream, 3)
    stream.position = 10**12
    far = take(stream, 1)
    stream.position = 0
    assert take(stream, 3) == first
    stream.position = 10**12
    assert take(stream, 1) == far


def test_prefetch_changes_nothing_but_the_thread():
    ahead, alone = Rows(10), Rows(10)
    assert take(Stream(ahead, 4, prefetch=3), 20) == take(Stream(alone, 4, prefetch=0), 20)
    assert len(ahead.threads) == 1 and "stream" in ahead.threads.pop()
    assert alone.threads == {threading.current_thread().name}


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_the_global_batch_by_interleaved_rows(world):
    whole = Stream(Rows(10), 6, seed=1)
    shares = [Stream(Rows(10), 6, seed=1, rank=r, world=world) for r in range(world)]
    for _ in range(7):
        expected = next(whole).condition["label"]
        for rank, stream in enumerate(shares):
            batch = next(stream)
            assert batch.sample_ids.tolist() == list(range(rank, 6, world))
            assert torch.equal(batch.condition["label"], expected[batch.sample_ids])
            assert torch.equal(batch.x1[:, 0].long(), expected[batch.sample_ids])


def test_an_endless_set_is_never_repeated_and_seeds_do_not_overlap():
    streams = [Stream(checkerboard(), 50, seed=seed) for seed in (0, 1, 12345)]
    rows = torch.cat([next(s).x1 for s in streams for _ in range(5)])
    assert len(rows.unique(dim=0)) == 750
    again = Stream(checkerboard(), 50, seed=1)
    assert torch.equal(next(again).x1, rows[250:300])
    indices = np.concatenate([s.indices(k) for s in streams for k in range(3)])
    assert len(np.unique(indices)) == len(indices) and indices.min() >= 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_reaches_the_reader_at_its_step_and_can_be_tried_again(prefetch):
    data = Rows(8)
    stream = Stream(data, 2, prefetch=prefetch)
    order = take(Stream(Rows(8), 2), 4)
    data.fail_at = order[2][0]
    assert take(stream, 2) == order[:2]
    for _ in range(2):
        with pytest.raises(OSError, match="no such row"):
            next(stream)
        assert stream.position == 2
    data.fail_at = None
    assert take(stream, 2) == order[2:]
    stream.close()
    assert take(stream, 1)


class Wrong(Rows):
    def batch(self, indices):
        return torch.zeros(len(indices) + 1, 1), {}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stream(Rows(0), 4), "empty"),
        (lambda: Stream(Rows(4), 0), "batch = 0"),
        (lambda: Stream(Rows(4), 4, world=3), "batch = 4 .* 3 processes"),
        (lambda: Stream(Rows(4), 4, rank=2, world=2), "rank = 2, world = 2"),
        (lambda: Stream(Rows(4), 4, seed=-1), "seed = -1"),
        (lambda: Stream(Rows(4), 4, prefetch=True), "prefetch = True"),
        (lambda: setattr(Stream(Rows(4), 4), "position", -1), "position = -1"),
        (lambda: next(Stream(Wrong(4), 4)), r"4 indices gave x1: \(5, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="list; a data set has batch"):
        Stream([1, 2], 1)
