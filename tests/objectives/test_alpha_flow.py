"""alpha-Flow: its gradients, its three named members, its limit, its schedule."""

import math

import pytest
import torch
from objectives.plain import Tiny, assert_same, data, gradients, pairs
from oracles import Gaussian

from pyflowmap import FlowMap, weights
from pyflowmap.objectives import alpha_flow, alpha_schedule, mean_flow

ORACLE = Gaussian()
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
SUM = weights.constant(norm="sum")


def plain(network, x1, x0, s, t, n, alpha, teacher):
    """Squares of u - T_alpha, plain flow matching first. Zhang et al. 2025 in this library's time."""
    x = (1 - s[:, None]) * x0 + s[:, None] * x1
    b = x1 - x0 if teacher is None else teacher(x, s)
    near = (network(x[:n], s[:n], s[:n]) - b[:n]).square().sum(1)
    x, s, t, b = x[n:], s[n:], t[n:], b[n:]
    r = s + alpha * (t - s)
    with torch.no_grad():
        target = alpha * b + (1 - alpha) * network(x + (r - s)[:, None] * b, r, t)
    return near, (network(x, s, t) - target).square().sum(1)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_gradients(alpha, adaptive, given):
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    t[8] = s[8]
    ours = alpha_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), equal=0.25, alpha=lambda: alpha,
                      weight=weights.adaptive(p=1.0, c=0.1) if adaptive else SUM,
                      teacher=VELOCITY if given else None)  # fmt: skip
    teacher = (lambda x, s: ORACLE.velocity(x, s[:, None])) if given else None
    near, far = plain(network, x1, x0, s, t, 3, alpha, teacher)
    if adaptive:
        near, far = near / (near.detach() + 0.1), alpha * far / (far.detach() + 0.1 * alpha**2)
    else:
        far = far / alpha
    want = torch.cat([near, far])
    torch.testing.assert_close(ours.per_sample, want, rtol=1e-8, atol=1e-10)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, want.mean()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weight", [SUM, weights.adaptive(p=1.0, c=0.01)], ids=["constant", "adaptive"])
def test_the_limit_is_mean_flow(weight):
    """The gradient's distance to MeanFlow's falls as alpha, and so does that of the unweighted error; 0 is MeanFlow."""
    network, (x1, x0) = Tiny(), data(12)
    options = {"x0": x0, "times": lambda x: pairs(12), "equal": 0.25, "weight": weight}

    def found(objective, **more):
        loss = objective(FlowMap(network), x1, **options, **more)
        return torch.cat([g.reshape(-1) for g in gradients(network, loss.mean())]), loss.raw_error

    limit, raw = found(mean_flow)
    distances = []
    for alpha in (1e-2, 1e-3, 1e-4):
        gradient, error = found(alpha_flow, alpha=alpha)
        distances.append(
            (float((gradient - limit).norm() / limit.norm()), float((error - raw).abs().max() / raw.max()))
        )
    for first, second in zip(distances, distances[1:]):
        assert all(8.0 < a / b < 12.0 for a, b in zip(first, second))
    assert distances[0][0] > 1e-4 and distances[-1][0] < 1e-3
    assert torch.equal(found(alpha_flow, alpha=0.0)[0], limit)


def test_one_is_flow_matching_of_the_jump():
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    ours = alpha_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), equal=0.0, alpha=1.0, weight=SUM)
    x = (1 - s[:, None]) * x0 + s[:, None] * x1
    assert_same(ours, (network(x, s, t) - (x1 - x0)).square().sum(1), network)


def test_the_fixed_point_of_a_step_along_the_flow():
    """On a straight flow (data = noise + m) every alpha has the exact map as its zero."""
    exact = FlowMap(lambda x, s, t: 0.0 * x + 0.7)
    _, x0 = data(64)
    for alpha in (1.0, 0.5, 0.1, 0.0):
        assert float(alpha_flow(exact, x0 + 0.7, x0=x0, alpha=alpha, equal=0.25, seed=1).raw_error.max()) < 1e-12


def test_network_evaluations():
    calls = []

    def network(x, s, t):
        calls.append((len(x), torch.is_grad_enabled()))
        return x * s[:, None]

    x1, x0 = data(8)
    for alpha, want in ((1.0, [(6, True), (2, True)]), (0.5, [(6, True), (6, False), (2, True)])):
        calls.clear()
        alpha_flow(FlowMap(network), x1, x0=x0, equal=0.25, alpha=alpha)
        assert sorted(calls) == sorted(want)


def test_the_schedule():
    assert [alpha_schedule(k, start=10, end=20) for k in (0, 10, 20, 99)] == [1.0, 1.0, 0.0, 0.0]
    assert alpha_schedule(14, start=10, end=20) == pytest.approx(1 / (1 + math.exp(25 * (0.4 - 0.5))))
    found = [alpha_schedule(k, end=1000) for k in range(1001)]
    assert all(a >= b for a, b in zip(found, found[1:]))
    assert min(a for a in found if a > 0) >= 5e-3 and max(a for a in found if a < 1) <= 1 - 5e-3
    for options, words in (({"end": 0}, "start = 0, end = 0"), ({"end": 9, "clamp": 0.5}, "clamp = 0.5")):
        with pytest.raises(ValueError, match=words):
            alpha_schedule(0, **options)


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [(1.5, ValueError, "alpha = 1.5"), (lambda: math.nan, ValueError, "alpha = nan"),
     (torch.tensor(0.5), TypeError, "alpha is Tensor; it is a number on the host")],
)  # fmt: skip
def test_bad_input(alpha, error, words):
    with pytest.raises(error, match=words):
        alpha_flow(FlowMap(Tiny()), torch.zeros(4, 3), alpha=alpha)
