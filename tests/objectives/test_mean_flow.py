"""MeanFlow: distillation of an exact velocity, tangent warm-up, the conditional variance it leaves."""

import math
from functools import partial

import pytest
import torch
from objectives.plain import Tiny, assert_same, data, pairs
from oracles import Gaussian

from pyflowmap import FlowMap, weights
from pyflowmap.objectives import baked_guidance, mean_flow

ORACLE = Gaussian()
EXACT = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t))
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
SUM = weights.constant(norm="sum")


@pytest.mark.parametrize("equal", [0.0, 0.5])
def test_the_exact_map_has_no_error_to_its_own_velocity(equal):
    x1, x0 = data(64)
    distilled = partial(mean_flow, x1=x1, x0=x0, times=lambda x: pairs(64), equal=equal, teacher=VELOCITY)
    assert float(distilled(EXACT).raw_error.max()) < 1e-20
    bent = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t) + 0.1 * t[:, None])
    assert float(distilled(bent).raw_error.mean()) > 1e-3
    assert float(mean_flow(EXACT, x1, x0=x0, times=lambda x: pairs(64), equal=equal).raw_error.mean()) > 1e-2


def plain(network, x1, x0, s, t, n, scale, teacher):
    """Geng et al. 2025, eq. 11, in this library's time; T = b + r (t-s) dV."""
    x = (1 - s[:, None]) * x0 + s[:, None] * x1
    b = x1 - x0 if teacher is None else teacher(x, s)
    near = (network(x[:n], s[:n], s[:n]) - b[:n]).square().sum(1)
    x, s, t, b = x[n:], s[n:], t[n:], b[n:]
    u, du = torch.func.jvp(lambda x, s: network(x, s, t), (x, s), (b, torch.ones_like(s)))
    return torch.cat([near, (u - (b + scale * (t - s)[:, None] * du).detach()).square().sum(1)])


@pytest.mark.parametrize("scale", [0.0, 0.3, torch.tensor(0.7, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_gradients(scale, adaptive, given):
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    t[8] = s[8]
    weight = weights.adaptive(p=0.7, c=0.1) if adaptive else SUM
    ours = mean_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), weight=weight, equal=0.25,
                     tangent_scale=scale, teacher=VELOCITY if given else None)  # fmt: skip
    teacher = (lambda x, s: ORACLE.velocity(x, s[:, None])) if given else None
    error = plain(network, x1, x0, s, t, 3, float(scale), teacher)
    assert_same(ours, error / (error.detach() + 0.1) ** 0.7 if adaptive else error, network)


def test_the_default_weight_is_the_papers():
    """p = 1, c = 0.01, of the sum of squares."""
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    ours = mean_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), equal=0.25)
    error = plain(network, x1, x0, s, t, 3, 1.0, None)
    assert_same(ours, error / (error.detach() + 0.01), network)


def test_the_exact_map_leaves_the_conditional_variance_and_no_mean_gradient():
    """u - T = -(b - v) - (t-s) (du/dx) (b - v) = -(dX/dx) (b - v): (sd_t/sd_s)^2 Var(b | x_s), Var = (S / sd_s)^2.

    The gradient of exact + theta . features has mean 0 at theta = 0.
    """
    n, (s, t) = 200_000, (0.3, 0.8)
    x1, x0 = data(n, 1, seed=4)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def perturbed(x, s, t):
        features = (torch.ones_like(x), x, x * x, torch.sin(3 * x))
        return ORACLE.mean_velocity(x, s, t) + sum(w * f for w, f in zip(theta, features))

    times = lambda x: (torch.full((n,), s).double(), torch.full((n,), t).double())  # noqa: E731
    loss = mean_flow(FlowMap(perturbed), 0.7 + 0.5 * x1, x0=x0, times=times, equal=0.0, weight=SUM).per_sample
    found = loss.detach()
    want = (ORACLE.sd(t) / ORACLE.sd(s)) ** 2 * (ORACLE.S / ORACLE.sd(s)) ** 2
    assert abs(float(found.mean()) - want) < 4 * float(found.std()) / math.sqrt(n)
    parts = torch.stack([torch.autograd.grad(part.mean(), theta, retain_graph=True)[0] for part in loss.chunk(100)])
    assert float((parts.mean(0) / (parts.std(0) / 10)).abs().max()) < 4.0
    wrong = [g.mean() for g in gradients_of_wrong(n, x1, x0, times, theta)]
    assert max(abs(float(g)) for g in wrong) > 20 * float((parts.std(0) / 10).max())


def gradients_of_wrong(n, x1, x0, times, theta):
    """The same with a flow map of other data."""
    other = Gaussian(S=0.6)
    network = FlowMap(lambda x, s, t: other.mean_velocity(x, s, t) + theta[0] + theta[1] * x)
    loss = mean_flow(network, 0.7 + 0.5 * x1, x0=x0, times=times, equal=0.0, weight=SUM)
    return torch.autograd.grad(loss.mean(), theta)[0][:2]


def test_a_guided_teacher():
    """b_g = omega v(c) + (1 - omega) v(null), at every place of b."""
    teacher = FlowMap(lambda x, s, label: (label[:, None] + 1.0) * x, prediction="velocity")
    network, (x1, x0), (s, t) = Tiny(), data(10), pairs(10)
    label = torch.arange(10) % 4
    guidance = baked_guidance(2.5, null={"label": 9}, drop=0.0)
    ours = mean_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), condition={"label": label}, equal=0.2,
                     weight=SUM, teacher=teacher, guidance=guidance)  # fmt: skip
    scale = 2.5 * (label + 1.0)[:, None] - 1.5 * 10.0
    want = plain(lambda x, s, t: network(x, s, t, label[10 - len(x) :] if len(x) == 8 else label[: len(x)]),
                 x1, x0, s, t, 2, 1.0, lambda x, s: scale * x)  # fmt: skip
    assert_same(ours, want, network)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tangent_scale": 1.5}, "tangent_scale = 1.5; it is a number in"),
        ({"tangent_scale": math.nan}, "tangent_scale = nan"),
        ({"tangent_scale": torch.ones(4)}, r"tangent_scale has shape \(4,\)"),
        ({"teacher": VELOCITY, "guidance": baked_guidance(2.0, null={"label": 9})}, "drop = 0.1.*pass drop=0.0"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        mean_flow(FlowMap(Tiny()), torch.zeros(4, 3), **options)
