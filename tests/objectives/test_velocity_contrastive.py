"""VeCoR: the paper's gradient, its derived minimum and that minimum's loss, what it draws, bad input."""

import pytest
import torch
from mean_gradient import feature, row_gradients, sigmas
from oracles import Gaussian

from pyflowmap import FlowMap, weights
from pyflowmap.objectives import flow_matching, velocity_contrastive
from pyflowmap.objectives.negatives import permuted_channels

MEANS = torch.tensor([0.7, -0.4, 1.6], dtype=torch.float64)[:, None]  # one per channel
ORACLE = Gaussian(m=MEANS)
TIMES = {"times": lambda x: 0.05 + 0.9 * torch.rand(len(x), dtype=torch.float64)}


def data(rows, seed=0):
    torch.manual_seed(seed)
    return MEANS + 0.5 * torch.randn(rows, 3, 2, dtype=torch.float64)


def minimum(x, t, k):
    """mu + (v - mu)/(1 - k), mu the mean over channels of the exact velocity v."""
    v = ORACLE.velocity(x, t[:, None, None])
    mu = v.mean(1, keepdim=True)
    return mu + (v - mu) / (1.0 - k)


def orders(x, count, dim, seed):
    """The permutations that are drawn: what they make of the channels' numbers."""
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    numbers = torch.arange(x.shape[dim]).reshape(shape).expand(x.shape).float()
    return [p.long() for p in permuted_channels(numbers, count, dim, seed, None)]


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("weight", [weights.constant(), weights.constant(2.0, norm="sum")], ids=["mean", "sum"])
def test_the_gradient_is_the_papers(count, dim, weight):
    torch.manual_seed(1)
    x1, x0 = torch.randn(2, 5, 4, 3, dtype=torch.float64).unbind(0)
    t = torch.rand(5, dtype=torch.float64)
    net = torch.nn.Linear(3, 3).double()
    fm = FlowMap(lambda x, t: net(x) + t[:, None, None], prediction="velocity")
    ours = velocity_contrastive(
        fm, x1, x0=x0, times=lambda x, seed: t, weight=weight, negatives=count, channel_dim=dim, strength=0.2, seed=3
    )
    found = torch.autograd.grad(ours.mean(), list(net.parameters()))

    v = net((1 - t[:, None, None]) * x0 + t[:, None, None] * x1) + t[:, None, None]
    u = x1 - x0
    near = (v - u).square().sum((1, 2))
    apart = [(v - torch.gather(u, dim, p)).square().sum((1, 2)) for p in orders(x1, count, dim, 3)]
    factor = 2.0 if weight.norm == "sum" else 1.0 / 12
    paper = factor * (near - 0.2 * sum(apart)).mean()
    for a, b in zip(found, torch.autograd.grad(paper, list(net.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.raw_error, near.detach() / 12)
    from_parts = ours.parts["flow_matching"] - 0.2 * count * ours.parts["negative"]
    torch.testing.assert_close(from_parts, paper.detach() / factor / 12)


@pytest.mark.parametrize("count", [1, 3])
def test_the_derived_minimum_has_no_mean_gradient(count):
    x1, strength = data(40_000), 0.1

    def gradients(k):
        def loss_of(theta):
            def network(x, t):
                return minimum(x, t, k) + theta[:, None, None] * feature(x, t)

            fm = FlowMap(network, prediction="velocity")
            return velocity_contrastive(fm, x1, strength=strength, negatives=count, **TIMES)

        return row_gradients(loss_of, len(x1))

    assert sigmas(gradients(strength * count)) < 4.0
    assert sigmas(gradients(0.0)) > 8.0  # the velocity itself is not the minimum


def test_the_loss_of_the_minimum_is_the_conditional_variance():
    """u_c | x_t are independent with variance r = S^2/sd_t^2; the permuted one adds the spread over channels."""
    x1, k, seen = data(40_000), 0.2, []

    def network(x, t):
        seen.append((x, t))
        return minimum(x, t, k)

    loss = velocity_contrastive(FlowMap(network, prediction="velocity"), x1, strength=k, **TIMES)
    x, t = seen[0]
    v = ORACLE.velocity(x, t[:, None, None])
    r = 0.25 / ORACLE.sd(t) ** 2
    spread = (v - v.mean(1, keepdim=True)).square().mean((1, 2))
    expected = (r + k * k * (r + spread) - 2 * k * r / 3) / (1 - k)
    assert sigmas(loss.per_sample - expected) < 4.0
    assert expected.std() > 0.1 * expected.mean()  # so that the equality says something of each row


def test_the_permutations_are_uniform_and_the_samples_own():
    x = torch.zeros(30_000, 3, 2)
    first, second = orders(x, 2, 1, 5)
    for p in (first, second):
        assert torch.equal(p[:, :, 0], p[:, :, 1])  # a pixel keeps its place
        code = (p[:, 0, 0] * 3 + p[:, 1, 0]).bincount()
        code = code[code > 0].double()
        assert len(code) == 6 and ((code - 5000).square() / 5000).sum() < 20.5  # chi^2, 5 degrees of freedom, 0.1 %
    assert 0.14 < float((first == second).all(1)[:, 0].double().mean()) < 0.19  # independent: 1/6
    fm, x1 = FlowMap(lambda x, t: torch.sin(x), prediction="velocity"), torch.randn(8, 3, 2)
    ids = torch.tensor([6, 1, 3])
    whole = velocity_contrastive(fm, x1, seed=2).per_sample
    torch.testing.assert_close(velocity_contrastive(fm, x1[ids], seed=2, sample_ids=ids).per_sample, whole[ids])


def test_no_strength_is_flow_matching_and_any_weight_takes_it():
    fm, x1 = FlowMap(lambda x, t: torch.sin(x), prediction="velocity"), data(16)
    plain = flow_matching(fm, x1, seed=1)
    none = velocity_contrastive(fm, x1, strength=0.0, seed=1)
    torch.testing.assert_close(none.per_sample, plain.per_sample)
    exact = FlowMap(lambda x, t: minimum(x, t, 0.9), prediction="velocity")
    loss = velocity_contrastive(exact, x1, strength=0.9, weight=weights.adaptive(p=0.5), seed=1)
    assert bool((loss.per_sample >= 0).all())  # the paper's number is negative here
    assert float(loss.parts["flow_matching"] - 0.9 * loss.parts["negative"]) < 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.5, "negatives": 2}, "strength = 0.5 with negatives = 2"),
        ({"strength": -0.1}, "strength = -0.1"),
        ({"strength": float("nan")}, "strength = nan"),
        ({"negatives": 0}, "negatives = 0"),
        ({"channel_dim": 0}, "channel_dim = 0"),
        ({"channel_dim": 3}, "channel_dim = 3"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        velocity_contrastive(FlowMap(lambda x, t: x, prediction="velocity"), torch.zeros(2, 3, 4), **options)


def test_one_channel():
    with pytest.raises(ValueError, match="one channel in dimension 1"):
        velocity_contrastive(FlowMap(lambda x, t: x, prediction="velocity"), torch.zeros(2, 1, 4))
