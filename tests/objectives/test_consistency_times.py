"""The laws of pairs of noise levels, the buckets of a global count, and the weight of consistency models."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import pyflowmap as pfm
from pyflowmap import FlowMap, times, weights

# ---- laws of pairs ---------------------------------------------------------------------------------------------------

MANY = torch.zeros(20_000, 1)


def sigma_of(t):
    return (1 - t.double()) / t.double()


def test_the_grid_of_karras():
    """sigma_i of the specification; the cleanest level is 0."""
    n, (low, high) = 10, (0.002 ** (1 / 7), 80.0 ** (1 / 7))
    grid = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    s, r = times.karras_pair(MANY, n, seed=0)
    start, count = s.unique(return_counts=True)
    want = 1 / (1 + torch.tensor(grid[:-1], dtype=torch.float64))
    torch.testing.assert_close(start.double(), want, rtol=1e-6, atol=0)  # noisiest first: t rises with i
    for i in range(n - 1):
        partner = r[s == start[i]].unique()
        level = 0.0 if i == n - 2 else grid[i + 1]
        assert len(partner) == 1 and float(partner) == pytest.approx(1 / (1 + level), rel=1e-6)
    assert float((count / len(MANY) - 1 / 9).abs().max()) < 4 * math.sqrt(1 / 9 * 8 / 9 / len(MANY))


def test_the_log_normal_grid():
    from scipy import stats

    n, (low, high) = 20, (0.002 ** (1 / 7), 80.0 ** (1 / 7))
    grid = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    law = stats.norm(-1.1, 2.0)
    mass = torch.tensor([law.cdf(math.log(a)) - law.cdf(math.log(b)) for a, b in zip(grid, grid[1:])])
    mass = mass / mass.sum()
    s, _ = times.karras_pair(MANY, n, log_normal=(-1.1, 2.0), seed=1)
    share = torch.stack([(sigma_of(s) / level - 1).abs().lt(1e-4).double().mean() for level in grid[:-1]])
    assert bool(((share - mass).abs() < 4.5 * (mass * (1 - mass) / len(MANY)).sqrt() + 1e-9).all())


def test_a_logit_normal_time_is_a_log_normal_noise_level():
    from scipy import stats

    sigma = sigma_of(times.logit_normal(MANY, 1.1, 2.0, seed=2))
    assert stats.kstest(((sigma.log() + 1.1) / 2.0).numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("stage", [0, 3, torch.tensor(7.0)])
def test_easy_pairs(stage):
    from scipy import stats

    s, r = times.easy_pair(MANY, stage=stage, seed=2)
    sigma, less = sigma_of(s), sigma_of(r)
    assert stats.kstest(((sigma.log() + 1.1) / 2.0).numpy(), "norm").pvalue > 1e-3
    want = sigma * (1 - (1 + 8 / (1 + sigma.exp())) / 2 ** (float(stage) + 1)).clamp(min=0)
    torch.testing.assert_close(less, want, rtol=1e-3, atol=1e-6)
    if float(stage) == 0:
        at_data = (1 + 8 / (1 + sigma.exp())) >= 2
        assert bool((r[at_data] == 1.0).all()) and float(at_data.double().mean()) > 0.5


def test_steps_of_the_grid():
    """Song et al. 2023: from 2 to 151 levels (N1 = 150); iCT doubles 10 -> 1280 in eight equal parts."""
    assert [times.consistency_steps(k, 1000) for k in (0, 1000)] == [2, 151]
    want = math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert times.consistency_steps(250, 1000) == want
    found = [times.consistency_steps(k, 800, 10, 1280, rule="double") - 1 for k in range(800)]
    assert found == [10 * 2 ** (k // 100) for k in range(800)]


def test_buckets_keep_their_shares_wherever_the_rows_are():
    """AnyFlow's 50 / 25 / 25: over any window of the count, any stride of processes, one row each."""

    def kinds(ids, seed):
        s, t = times.buckets(torch.zeros(len(ids), 1), seed=seed, sample_ids=ids)
        return torch.stack([s == t, (t == 1.0) & (s != t), (s != t) & (t != 1.0)]).double()

    want = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    for first, stride, rows in ((0, 1, 64), (10**12, 1, 64), (3, 8, 64), (1, 64, 200), (5, 3, 16)):
        for seed in (0, 7):
            count = kinds(first + stride * torch.arange(rows), seed).sum(1)
            assert float((count - want * rows).abs().max()) <= 4.0  # Bernoulli's own deviation is 4 at 64 rows
    # A row is in one bucket for a seed, alone or among others, and in every bucket over the seeds.
    ids = torch.arange(20)
    assert torch.equal(kinds(ids, 3)[:, 4:5], kinds(ids[4:5], 3))
    share = torch.stack([kinds(ids[:1], seed)[:, 0] for seed in range(600)]).mean(0)
    assert float((share - want).abs().max()) < 4 * math.sqrt(0.25 / 600)
    torch.manual_seed(0)
    alone = torch.stack([torch.stack(times.buckets(torch.zeros(1, 1))) for _ in range(600)])[:, :, 0]
    assert float((alone[:, 0] == alone[:, 1]).double().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 600))


def test_buckets_of_another_law_and_with_an_objective():
    law = partial(times.logit_normal_pair, mean=1.0)
    s, t = times.buckets(MANY, 0.0, 0.0, law=law, seed=4)
    assert torch.equal(torch.stack(law(MANY, seed=4)), torch.stack([s, t]))
    network = FlowMap(lambda x, s, t: 0.0 * x)
    loss = pfm.objectives.mean_flow(network, torch.zeros(64, 2), times=times.buckets, equal=0.0, seed=0)
    assert set(loss.parts) == {"mean_flow"}


@pytest.mark.parametrize(
    "call",
    [
        lambda: times.karras_pair(MANY, 1),
        lambda: times.karras_pair(MANY, 10.0),
        lambda: times.karras_pair(MANY, sigma_min=0.0),
        lambda: times.karras_pair(MANY, log_normal=(-1.1, 0.0)),
        lambda: times.easy_pair(MANY, stage=-1),
        lambda: times.easy_pair(MANY, q=1.0),
        lambda: times.easy_pair(MANY, std=-1.0),
        lambda: times.easy_stage(-1, 10),
        lambda: times.consistency_steps(5, 4),
        lambda: times.consistency_steps(0, 4, rule="linear"),
        lambda: times.buckets(MANY, 0.9, 0.2),
        lambda: times.buckets(MANY, sample_ids=torch.arange(20_000)),
        lambda: weights.pseudo_huber(c=-1.0),
        lambda: weights.pseudo_huber(per="gap"),
        lambda: weights.pseudo_huber()(torch.ones(2)),
    ],
)
def test_bad_laws_and_weights(call):
    with pytest.raises(ValueError):
        call()


# ---- the weight ------------------------------------------------------------------------------------------------------


def test_pseudo_huber_by_hand():
    e, s, t = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 4.0, 9.0], [0.5, 0.25, 0.5], [0.8, 0.5, 1.0]))
    gap = torch.tensor([0.75, 2.0, 1.0], dtype=torch.float64)  # (1-s)/s - (1-t)/t
    torch.testing.assert_close(weights.pseudo_huber()(e, s=s, t=t), e.sqrt() / gap)
    torch.testing.assert_close(weights.pseudo_huber(0.3)(e, s=s, t=t), ((e + 0.09).sqrt() - 0.3) / gap)
    size, c = 16, 0.00054
    paper = (e + (c * math.sqrt(size)) ** 2).sqrt() - c * math.sqrt(size)
    torch.testing.assert_close(math.sqrt(size) * weights.pseudo_huber(c, norm="mean", per=None)(e, size=size), paper)


@pytest.mark.parametrize("c", [0.0, 0.2])
def test_pseudo_huber_has_a_gradient_everywhere(c):
    e = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    weights.pseudo_huber(c, per=None)(e).sum().backward()
    want = [0.0 if c == 0.0 else 0.5 / c, 0.5 / math.sqrt(4.0 + c * c)]
    torch.testing.assert_close(e.grad, torch.tensor(want, dtype=torch.float64))
    same = weights.pseudo_huber(c)(torch.ones(2), s=torch.tensor([0.5, 0.5]), t=torch.tensor([0.5, 0.6]))
    assert float(same[0]) == 0.0 and float(same[1]) > 0.0
