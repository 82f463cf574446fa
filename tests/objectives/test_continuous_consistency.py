"""sCM against its own formulas in the angle theta, written out with torch.func.jvp; the exact map; training."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Gaussian
from torch import nn

from pyflowmap import FlowMap, weights
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.objectives import continuous_consistency

ORACLE = Gaussian()
SUM = {"weight": weights.constant(norm="sum")}
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")


def data(rows, size=1, seed=1):
    return torch.randn(2, rows, size, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def angles(rows, seed=0):
    """theta in (0.1, 1.45), float64."""
    return 0.1 + 1.35 * torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_time(theta, d=1.0):
    return theta.cos() / (theta.cos() + d * theta.sin())


class Tiny(nn.Module):
    def __init__(self, size=3, width=24, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(size + 2, width), nn.SiLU(), nn.Linear(width, size)).double()

    def forward(self, x, s, t):
        return self.body(torch.cat([x, s[:, None], t[:, None]], 1))


class Exact(nn.Module):
    """The oracle's mean velocity with a head of features that starts at 0."""

    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x, s, t):
        features = (torch.ones_like(x), x, s[:, None] * torch.ones_like(x), x * x)
        return ORACLE.mean_velocity(x, s, t) + sum(w * f for w, f in zip(self.head, features))


def gradients(network, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(network.parameters()))])


# ---- the formulas of the paper -----------------------------------------------------------------------------------


def plain(f, x1, x0, theta, d, r, c, norm, velocity=None):
    """|| F - sg(F) - sg(g/(|g|+c)) ||^2 and |g|, from the consistency function f(x_theta, theta)."""
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    x, dx = cos * x1 + sin * d * x0, cos * d * x0 - sin * x1
    if velocity is not None:
        dx = velocity(x, cos, sin)

    def F(z, theta):
        cos, sin = theta.cos()[:, None], theta.sin()[:, None]
        return (cos * d * z - f(d * z, theta)) / (d * sin)

    F0, dF = torch.func.jvp(F, (x / d, theta), (cos * sin * dx / d, (cos * sin)[:, 0]))
    g = (-(cos**2) * (d * F0 - dx) - r * (cos * sin * x + d * dF)).detach()
    length = g.square().sum(1).sqrt() if norm != "rms" else g.square().mean(1).sqrt()
    step = g if norm is None else g / (length + c)[:, None]
    return (F(x / d, theta) - F0.detach() - step).square().sum(1), g.square().mean(1), length


def own_time(path, t):
    """The path's own time of the linear time t, and alpha + sigma there."""
    if isinstance(path, Linear):
        return t, torch.ones_like(t)
    ratio = (1 - t) / t  # sigma / alpha
    alpha = (1 + ratio**2) ** -0.5
    if isinstance(path, Trigonometric):
        m = torch.asin(alpha) * 2 / math.pi
    else:  # log alpha = -(19.9/4) T^2 - 0.05 T, T = 1 - m
        m = 1 - (-0.05 + torch.sqrt(0.0025 - 4 * (19.9 / 4) * alpha.log())) / (19.9 / 2)
    return m, alpha * (1 + ratio)


def consistency_function(path, prediction, network, d):
    def f(x, theta):
        t = linear_time(theta, d)
        m, scale = own_time(path, t)
        point = (scale / (theta.cos() + d * theta.sin()))[:, None] * x
        if prediction == "data":
            return network(point, m, m)
        return point + (1 - m)[:, None] * network(point, m, torch.ones_like(m))

    return f


CASES = [
    (Linear(), "mean_velocity", 1.0, 1.0, "l2", False),
    (Linear(), "mean_velocity", 0.5, 0.3, "rms", False),
    (Linear(), "mean_velocity", 0.5, 1.0, "l2", True),
    (Linear(), "data", 1.0, 0.6, "l2", False),
    (Linear(), "mean_velocity", 1.0, 0.0, None, False),
    (Trigonometric(), "mean_velocity", 1.0, 1.0, "l2", False),
    (Trigonometric(), "mean_velocity", 0.7, 0.4, None, True),
    (Trigonometric(), "data", 2.0, 1.0, "rms", False),
    (VariancePreserving(), "data", 0.5, 0.8, "l2", True),
    (VariancePreserving(), "mean_velocity", 1.0, 1.0, "l2", False),
]


@pytest.mark.parametrize(("path", "prediction", "d", "r", "norm", "distil"), CASES, ids=str)
def test_loss_and_gradient_are_the_papers(path, prediction, d, r, norm, distil):
    network, (x1, x0), theta = Tiny(), data(12, 3), angles(12)
    call = (lambda net, x, s, t, _: net(x, s, s)) if prediction == "data" else None
    fm = FlowMap(network, prediction=prediction, interpolant=path, call=call)
    ours = continuous_consistency(
        fm, x1, x0=x0, times=lambda _: linear_time(theta, d), norm=norm, c=0.1, warmup=r, data_std=d,
        teacher=VELOCITY if distil else None, **SUM,
    )  # fmt: skip

    def teacher(x, cos, sin):  # dx/dtheta of x = k(theta) x_lin: k' x_lin + k dt/dtheta b, dt/dtheta = -d/k^2
        k = cos + d * sin
        return (d * cos - sin) * x / k - d / k * ORACLE.velocity(x / k, cos / k)

    f = consistency_function(path, prediction, network, d)
    error, raw, length = plain(f, x1, x0, theta, d, r, 0.1, norm, teacher if distil else None)
    torch.testing.assert_close(ours.per_sample, error, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.raw_error, raw, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.parts["tangent_norm"], length.mean(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(network, ours.mean()), gradients(network, error.mean()), rtol=1e-8, atol=1e-11)


def test_a_teacher_on_another_path_is_the_same_teacher():
    """The oracle's data prediction on the variance-preserving path in place of its velocity on the linear one."""

    def predicts_data(x, s):
        a = torch.exp(-(19.9 / 4) * (1 - s) ** 2 - 0.05 * (1 - s))[:, None]
        g = (1 - a**2).sqrt()
        return ORACLE.data(x / (a + g), a / (a + g))

    other = FlowMap(predicts_data, prediction="data", interpolant=VariancePreserving())
    network, (x1, x0), theta = Tiny(), data(12, 3), angles(12)
    a, b = (
        continuous_consistency(
            FlowMap(network, interpolant=Trigonometric()), x1, x0=x0, times=lambda _: linear_time(theta), teacher=each
        ).per_sample
        for each in (VELOCITY, other)
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=str)
def test_a_network_with_the_time_of_meanflow_is_the_same_map(path):
    network, (x1, x0), theta = Tiny(), data(12, 3), angles(12)
    turned = lambda x, tau, r: -network(x, 1.0 - tau, 1.0 - r)  # noqa: E731
    first, second = (
        continuous_consistency(fm, x1, x0=x0, times=lambda _: linear_time(theta))
        for fm in (FlowMap(network, interpolant=path), FlowMap(turned, interpolant=path, call="meanflow"))
    )
    torch.testing.assert_close(first.raw_error, second.raw_error, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gradients(network, first.mean()), gradients(network, second.mean()), rtol=1e-9, atol=1e-12
    )


def test_golden_numbers():
    """theta = 0.7, x = 1.3, d = 1: dx/dtheta = 0.05247878, f = 1.21030204, F = -0.33530155 of the specification."""
    theta = torch.tensor([0.7], dtype=torch.float64)
    t, x0 = linear_time(theta), torch.tensor([[0.4]], dtype=torch.float64)
    assert float(t) == pytest.approx(0.542803, abs=1e-6)
    x1 = (1.3 - theta.sin() * x0) / theta.cos()
    exact, k = FlowMap(Exact()), float(theta.cos() + theta.sin())
    x = torch.full((1, 1), 1.3 / k, dtype=torch.float64)
    assert float(exact.jump(x, t, torch.ones_like(t)).detach()) == pytest.approx(1.21030204, abs=1e-8)
    # At warmup 0 the tangent is -cos^2 (F - dx/dtheta), which shows F and dx/dtheta.
    loss = continuous_consistency(exact, x1, x0=x0, times=lambda _: t, teacher=VELOCITY, warmup=0.0, norm=None)
    assert float(loss.parts["tangent_norm"]) == pytest.approx(math.cos(0.7) ** 2 * (0.33530155 + 0.05247878), abs=1e-8)


# ---- the exact map -----------------------------------------------------------------------------------------------


def test_the_tangent_vanishes_at_the_exact_map():
    x1, x0 = data(64, 3)
    options = {"x0": x0, "times": lambda _: linear_time(angles(64)), "teacher": VELOCITY}
    exact = Exact()
    loss = continuous_consistency(FlowMap(exact), x1, norm=None, **options)
    assert float(loss.raw_error.max()) ** 0.5 < 1e-10
    assert float(gradients(exact, loss.mean()).abs().max()) < 1e-10
    with torch.no_grad():
        exact.head[1] = 0.1
    assert float(continuous_consistency(FlowMap(exact), x1, norm=None, **options).raw_error.mean()) > 1e-4


@pytest.mark.parametrize("norm", [None, "l2", "rms"])
@pytest.mark.parametrize("bent", [False, True])
def test_the_mean_gradient_vanishes_at_the_exact_map(norm, bent):
    """With the path's velocity for the marginal one g is not 0; here it is even about 0, so normalised it averages to
    0, too."""
    network, found = Exact(), []
    if bent:
        with torch.no_grad():
            network.head[1] = 0.2
    for seed in range(40):
        x1, x0 = data(2000, seed=seed)
        loss = continuous_consistency(
            FlowMap(network),
            0.7 + 0.5 * x1,
            x0=x0,
            times=lambda x, k=seed: linear_time(angles(2000, k)),
            norm=norm,
            **SUM,
        )
        found.append(gradients(network, loss.mean()))
    found = torch.stack(found)
    score = float((found.mean(0) / (found.std(0) / math.sqrt(len(found)))).abs().max())
    assert float(loss.raw_error.mean()) > 0.01
    assert score > 10.0 if bent else score < 4.0


# ---- rows, numbers that are not finite, words --------------------------------------------------------------------


def test_one_dual_evaluation_and_nothing_else():
    calls = []

    def network(x, s, t):
        calls.append(type(x).__name__)
        return 0.5 * x

    continuous_consistency(FlowMap(network), torch.zeros(4, 2))
    assert calls == ["Dual"]


def test_rows_that_are_not_finite_are_masked_where_asked():
    network, (x1, x0), theta = Tiny(), data(6, 3), angles(6)
    bad = torch.tensor([1, 4])
    x0[bad[0], 0], x1[bad[1], 2] = math.nan, math.inf
    call = lambda **more: continuous_consistency(  # noqa: E731
        FlowMap(network), x1, x0=x0, times=lambda _: linear_time(theta), **more
    )
    assert int((~torch.isfinite(call().per_sample)).sum()) == 2
    masked = call(mask_nonfinite=True)
    assert int(masked.parts["masked"]) == 2 and float(masked.per_sample[bad].detach().abs().max()) == 0.0
    good = torch.tensor([0, 2, 3, 5])
    part = continuous_consistency(FlowMap(network), x1[good], x0=x0[good], times=lambda _: linear_time(theta[good]))
    torch.testing.assert_close(masked.per_sample[good], part.per_sample)


def test_an_infinite_tangent_leaves_a_finite_gradient():
    """What half precision does: the value is a number, its derivative overflows."""
    network, (x1, x0), theta = Tiny(), data(6, 3), angles(6)

    first = linear_time(theta).min()

    def steep(x, s, t):  # a root has an infinite derivative at 0
        return network(x, s, t) + (s - first).clamp(min=0.0).sqrt()[:, None] * 0.1

    call = lambda **more: continuous_consistency(  # noqa: E731
        FlowMap(steep), x1, x0=x0, times=lambda _: linear_time(theta), **more
    )
    assert int((~torch.isfinite(call().per_sample)).sum()) == 1
    loss = call(mask_nonfinite=True)
    assert int(loss.parts["masked"]) == 1 and bool(torch.isfinite(gradients(network, loss.mean())).all())


def test_a_learned_weight_and_float32():
    weight, network = weights.learned(channels=4), Tiny().float()
    loss = continuous_consistency(FlowMap(network), torch.randn(8, 3), weight=weight)
    loss.mean().backward()
    assert weight.head.weight.grad is not None and loss.per_sample.dtype == torch.float32
    assert bool(torch.isfinite(loss.per_sample).all())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"norm": "mean"}, ValueError, "norm = 'mean'"),
        ({"c": -0.1}, ValueError, "c = -0.1"),
        ({"warmup": 10000}, ValueError, "warmup = 10000"),
        ({"data_std": 0.0}, ValueError, "data_std = 0.0"),
        ({"times": lambda x: (x[:, 0], x[:, 0])}, ValueError, "times gave 2 times"),
        ({"times": lambda x: x}, ValueError, r"times gave shape \(4, 3\)"),
        ({"teacher": Tiny()}, TypeError, "teacher is Tiny"),
        ({"x0": torch.zeros(2, 3)}, ValueError, "x0 has shape"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        continuous_consistency(FlowMap(Tiny().float()), torch.zeros(4, 3), **options)


# ---- training ----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """u(x, s): one hidden layer, scaled and shifted by the time."""

    def __init__(self, width=48):
        super().__init__()
        self.times = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.first, self.last = nn.Linear(1, width), nn.Linear(width, 1)

    def forward(self, x, s, t):
        scale, shift = self.times(4.0 * (s[:, None] - 0.5)).chunk(2, 1)
        return self.last(nn.functional.silu(self.first(x) * (1.0 + scale) + shift))


def test_training_from_scratch_finds_the_exact_map():
    """X_{s,1} of the oracle to 1 % of the data's deviation, root mean square over the distribution of x_s."""
    torch.manual_seed(0)
    network, steps = Network(), 1700
    optimiser = torch.optim.Adam(network.parameters(), 1e-2, betas=(0.8, 0.95), fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=1)

    def errors():
        x1, x0 = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(5))
        found = []
        for value in (0.0, 0.2, 0.5, 0.8):
            s = torch.full((4000,), value)
            x = (1 - value) * x0 + value * (0.7 + 0.5 * x1)
            jump = FlowMap(average.module).jump(x, s, torch.ones_like(s)).detach()
            exact = 0.7 + (x - 0.7 * value) * 0.5 / ORACLE.sd(value)
            found.append(float((jump - exact).square().mean().sqrt()) / 0.5)
        return found

    begin = max(errors())
    for k in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1.0 + math.cos(math.pi * k / steps))
        uniform = engine.draw(512).clamp(1e-6, 1.0 - 1e-6)
        x1, x0 = (torch.special.ndtri(uniform[:, i : i + 1]) for i in (0, 1))
        t = (1.1 * uniform[:, 2] - 0.1).clamp(0.0, 0.999)
        loss = continuous_consistency(
            FlowMap(network), 0.7 + 0.5 * x1, x0=x0, times=lambda _, t=t: t, norm=None, warmup=min(1.0, k / 200)
        )
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        average.update_parameters(network)
    assert begin > 0.3 and max(errors()) < 0.01
