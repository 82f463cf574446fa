"""What is random in a loss depends on (seed, sample id) alone: not on the batch, nor on who computes it."""

from functools import partial

import pytest
import torch

from pyflowmap import FlowMap, objectives, times
from pyflowmap.objectives import baked_guidance, embedded_guidance

X1 = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
LAWS = [
    times.uniform,
    times.logit_normal,
    times.uniform_pair,
    partial(times.logit_normal_pair, equal=0.5),
    times.karras_pair,
    times.easy_pair,
    times.buckets,
]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_draws_a_sample_the_same_in_any_batch(law):
    def drawn(rows, **options):
        result = law(X1[rows], seed=5, **options)
        return torch.stack(result if isinstance(result, tuple) else (result,))

    whole = drawn(torch.arange(8))
    for ids in (torch.arange(1, 8, 2), torch.tensor([7, 0, 3])):
        assert torch.equal(drawn(ids, sample_ids=ids), whole[:, ids])
    with pytest.raises(ValueError, match="sample_ids need a seed"):
        law(X1, sample_ids=torch.arange(8))


def test_seeded_uniform_times_are_uniform_and_independent_of_the_noise():
    x = torch.zeros(100_000, 1)
    t = times.uniform(x, seed=3).double()
    assert t.min() >= 0.0 and t.max() < 1.0
    grid = torch.arange(1, len(t) + 1, dtype=torch.float64) / len(t)
    assert (t.sort().values - grid).abs().max() < 1.95 / len(t) ** 0.5  # Kolmogorov-Smirnov, 0.1 %
    s, t = (each.double() for each in times.uniform_pair(x, seed=3))
    assert abs(s.mean() - 1 / 3) < 4 * (1 / 18 / len(s)) ** 0.5 and abs(t.mean() - 2 / 3) < 4 * (1 / 18 / len(s)) ** 0.5
    from pyflowmap import evaluate, noise

    z = evaluate(noise(x, seed=3)).double().flatten()
    assert abs(torch.corrcoef(torch.stack([t, z]))[0, 1]) < 4 / len(t) ** 0.5


def network(x, s, t, label=None, omega=None):
    given = sum(each[:, None] * 0.1 for each in (label, omega) if each is not None)
    return torch.sin(x * (1.0 + s[:, None]) + t[:, None]) + given


CASES = {
    "flow_matching": (objectives.flow_matching, {}),
    "consistency": (objectives.consistency, {}),
    "continuous_consistency": (objectives.continuous_consistency, {}),
    "easy_consistency": (objectives.easy_consistency, {"times": partial(times.easy_pair, stage=2)}),
    "lagrangian": (objectives.lagrangian, {"diagonal": 0.5}),
    "alpha_flow": (objectives.alpha_flow, {"equal": 0.5}),
    "eulerian": (objectives.eulerian, {"diagonal": 0.5}),
    "improved_mean_flow": (
        objectives.improved_mean_flow,
        {"equal": 0.5, "guidance": embedded_guidance(null={"label": 10}, drop=0.5)},
    ),
    "progressive_u": (objectives.progressive, {"diagonal": 0.5, "split": "uniform"}),
    "mean_flow": (objectives.mean_flow, {"equal": 0.5, "guidance": baked_guidance(2.0, null={"label": 10}, drop=0.5)}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_halves_make_the_whole(name):
    """Rows 0, 2, ... on one process and 1, 3, ... on another: each sample's loss is that of the whole batch."""
    objective, options = CASES[name]
    fm = FlowMap(network)
    label = torch.arange(8)

    def losses(ids):
        loss = objective(fm, X1[ids], condition={"label": label[ids]}, seed=11, sample_ids=ids, **options)
        return loss.per_sample

    whole = losses(torch.arange(8))
    for ids in (torch.arange(0, 8, 2), torch.arange(1, 8, 2)):
        torch.testing.assert_close(losses(ids), whole[ids], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="sample_ids need a seed"):
        objective(fm, X1, condition={"label": label}, sample_ids=torch.arange(8), **options)
