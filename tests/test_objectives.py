"""Objectives: zero residual at the exact solution, gradients against plain torch, batch split; the training loop."""

import pytest
import torch
from oracles import Gaussian

from pyflowmap import times, weights
from pyflowmap.flow_map import FlowMap
from pyflowmap.interpolants import Linear, Trigonometric
from pyflowmap.objectives import flow_matching, progressive
from pyflowmap.training import Step

ORACLE = Gaussian()
X1, X0 = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(3)).unbind(0)


def small(dropout=0.0):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(5, 32), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(32, 3)
    )

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, x, s, t):
            return self.body(torch.cat([x, s[:, None], t[:, None]], 1))

    return Net()


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in network.parameters()]


def test_the_exact_flow_map_has_no_semigroup_error():
    for split in ("midpoint", "uniform"):
        # In float64: a short jump's mean velocity is a difference divided by the span.
        exact = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s.double(), t.double()))
        loss = progressive(exact, X1.double(), x0=X0.double(), diagonal=0.0, split=split, seed=1)
        assert float(loss.raw_error.max()) < 1e-9
        wrong = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t) + 0.3 * (t - s)[:, None])
        assert float(progressive(wrong, X1, x0=X0, diagonal=0.0, split=split).raw_error.mean()) > 1e-4


def test_flow_matching_of_the_exact_velocity_leaves_the_conditional_variance():
    """E||v - (x1 - x0)||^2 = Var(x1 - x0 | x_t): S^2 / sd_t^2 per coordinate on the linear path."""
    n = 40000
    x1 = 0.7 + 0.5 * torch.randn(n, 4)
    fm = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
    loss = flow_matching(fm, x1, times=lambda x: torch.full((len(x),), 0.4), seed=None)
    assert float(loss.mean()) == pytest.approx(0.25 / ORACLE.sd(0.4) ** 2, rel=0.02)


def plain_flow_matching(network, t, path):
    e = t[:, None]
    x = path.alpha(e) * X1 + path.sigma(e) * X0
    velocity = path.alpha_derivative(e) * X1 + path.sigma_derivative(e) * X0
    return (network(x, t, t) - velocity).square().mean()


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_flow_matching_gradient(path):
    network, t = small(), torch.rand(16)
    ours = flow_matching(FlowMap(network, interpolant=path), X1, x0=X0, times=lambda x: t)
    plain = plain_flow_matching(network, t, path)
    torch.testing.assert_close(ours.mean(), plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, plain)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [weights.constant(), weights.adaptive(p=0.5, c=0.1)], ids=["constant", "adaptive"])
def test_progressive_gradient(weight):
    """PSD-M in plain torch: 12 diagonal rows, 4 off the diagonal, target without gradient."""
    network, n = small(), 12
    s, t = torch.rand(2, 16).sort(0).values
    ours = progressive(FlowMap(network), X1, x0=X0, times=lambda x: (s, t), weight=weight)

    x = (1 - s[:, None]) * X0 + s[:, None] * X1
    end = torch.cat([s[:n], t[n:]])
    target = X1 - X0
    with torch.no_grad():
        so, to, xo = s[n:], t[n:], x[n:]
        middle = (so + to) / 2
        first = network(xo, so, middle)
        second = network(xo + (middle - so)[:, None] * first, middle, to)
        target[n:] = (first + second) / 2
    error = (network(x, s, end) - target).square().sum(1)
    plain = (error / (error.detach() + 0.1) ** 0.5).mean() if isinstance(weight, weights.adaptive) else error.mean() / 3
    torch.testing.assert_close(ours.mean(), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.raw_error, error.detach() / 3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.parts["flow_matching"], error[:n].detach().mean() / 3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.parts["progressive"], error[n:].detach().mean() / 3, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, plain)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_uniform_split_teaches_any_intermediate_time():
    """The teacher's two jumps meet at r in (s, t), not at the midpoint only."""
    seen = []

    def network(x, s, t):
        if not torch.is_grad_enabled():
            seen.append((s, t))
        return ORACLE.mean_velocity(x, s, t)

    progressive(FlowMap(network), X1.repeat(8, 1), diagonal=0.0, split="uniform")
    (s, r), (r2, t) = seen
    assert torch.equal(r, r2) and bool(((s <= r) & (r <= t)).all())
    share = (r - s) / (t - s)
    assert 0.2 < float(share.std()) < 0.4 and 0.4 < float(share.mean()) < 0.6


@pytest.mark.parametrize("diagonal", [0.0, 0.3, 0.75, 1.0])
def test_the_share_holds_at_any_batch(diagonal):
    torch.manual_seed(0)
    counts = []

    def network(x, s, t):
        if torch.is_grad_enabled():
            counts.append(int((s == t).sum()))
        return x

    for _ in range(400):
        progressive(FlowMap(network), torch.zeros(3, 2), diagonal=diagonal)
    assert sum(counts) / 1200 == pytest.approx(diagonal, abs=0.05)


def test_the_teacher_has_no_dropout_and_its_mode_is_put_back():
    network = small(dropout=0.5).train()
    modes = []
    network.body[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    progressive(FlowMap(network), X1)
    assert modes == [True, False, False] and all(m.training for m in network.modules())


def test_conditions_follow_their_rows():
    def network(x, s, t, label, scale):
        assert torch.equal(label.float(), x[:, 0].round()) or not torch.is_grad_enabled()
        assert len(label) == len(x)
        return torch.zeros_like(x)

    label = torch.arange(16)
    x1 = label.float()[:, None].repeat(1, 2)
    progressive(FlowMap(network), x1, x0=x1, condition={"label": label, "scale": 2.0})


def test_seeded_loss_repeats():
    network = FlowMap(small())
    assert torch.equal(progressive(network, X1, seed=1).per_sample, progressive(network, X1, seed=1).per_sample)
    assert not torch.equal(progressive(network, X1, seed=1).per_sample, progressive(network, X1, seed=2).per_sample)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: progressive(FlowMap(small()), X1, split="thirds"), ValueError, "'thirds'"),
        (lambda: progressive(FlowMap(small()), X1, diagonal=75), ValueError, "diagonal = 75"),
        (lambda: progressive(FlowMap(small()), X1, x0=X0[:4]), ValueError, r"x0 has shape \(4, 3\)"),
        (lambda: flow_matching(FlowMap(small()), X1.long()), TypeError, "int64"),
        (lambda: flow_matching(FlowMap(small()), X1[:0]), ValueError, "empty batch"),
        (lambda: flow_matching(FlowMap(small()), X1, times=times.uniform_pair), ValueError, "times gave 2 times"),
        (lambda: progressive(small(), X1), TypeError, "flow_map is .*wrap the network"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_learned_weight_is_trained_with_the_network():
    weight = weights.learned(channels=4)
    step = Step(small(), progressive, weight=weight)
    loss, parts = step(X1)
    loss.backward()
    assert set(parts) == {"error", "flow_matching", "progressive"} and weight.head.bias.grad is not None
    assert {id(p) for p in weight.parameters()} <= {id(p) for p in step.parameters()}
