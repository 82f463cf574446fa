"""Consistency pairs (CT, iCT, CD, ECT) against plain torch; their error and bias against the gap; one dropout mask."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles import Gaussian, slope
from torch import nn

from pyflowmap import FlowMap, times, weights
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.objectives import consistency, easy_consistency

ORACLE = Gaussian()
BOTH = pytest.mark.parametrize("objective", [consistency, easy_consistency])
SUM = {"weight": weights.constant(norm="sum")}
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
EXACT = FlowMap(ORACLE.mean_velocity)


def data(rows, size=1, seed=1):
    return torch.randn(2, rows, size, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def pairs(rows, seed=0, ends=0):
    """s < r in float64; the last `ends` rows have r = 1."""
    s, r = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(0).values
    s, r = 0.02 + 0.9 * s, 0.03 + 0.92 * r
    r[rows - ends :] = 1.0
    return s, r


class Tiny(nn.Module):
    def __init__(self, size=3, width=24, seed=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Linear(size + 2, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, size)
        ).double()  # fmt: skip

    def forward(self, x, s, t):
        return self.body(torch.cat([x, s[:, None], t[:, None]], 1))


def gradients(network, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(network.parameters()))])


# ---- the papers' formulas, in their noise level --------------------------------------------------------------------


def function_of_sigma(network, prediction, path):
    """f(x1 + sigma e, sigma) of a network that lives on `path`."""

    def f(x, sigma):
        alpha = 1 / (1 + sigma) if isinstance(path, Linear) else (1 + sigma**2) ** -0.5
        if isinstance(path, Linear):
            m = alpha
        elif isinstance(path, Trigonometric):
            m = torch.asin(alpha) * 2 / math.pi
        else:
            m = 1 - (-0.05 + torch.sqrt(0.0025 - 19.9 * alpha.log())) / 9.95
        point = alpha[:, None] * x
        if prediction == "data":
            return network(point, m, m)
        return point + (1 - m)[:, None] * network(point, m, torch.ones_like(m))

    return f


def view(network, prediction, path):
    call = (lambda net, x, s, t, _: net(x, s, s)) if prediction == "data" else None
    return FlowMap(network, prediction=prediction, interpolant=path, call=call)


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=str)
@pytest.mark.parametrize("prediction", ["mean_velocity", "data"])
@pytest.mark.parametrize("kind", ["CT", "CT, target", "CD, euler", "CD, heun", "ECT"])
def test_loss_and_gradient_are_the_papers(kind, prediction, path):
    network, (x1, x0), (s, r) = Tiny(), data(12, 3), pairs(12, ends=3)
    sigma, less = (1 - s) / s, (1 - r) / r
    average = Tiny(seed=5)
    f = function_of_sigma(network, prediction, path)
    goal = function_of_sigma(average if "target" in kind else network, prediction, path)
    x, y = x1 + sigma[:, None] * x0, x1 + less[:, None] * x0
    if "CD" in kind:  # on the linear path, where the last step is Heun's as well: the oracle has a velocity there
        h, point = (r - s)[:, None], s[:, None] * x
        first = ORACLE.velocity(point, s[:, None])
        second = ORACLE.velocity(point + h * first, r[:, None])
        y = (point + h * (first if "euler" in kind else (first + second) / 2)) / r[:, None]
    with torch.no_grad():
        there = torch.where((r == 1)[:, None], y, goal(y, less))
    error = (f(x, sigma) - there).square().sum(1)
    loss, options = error, {**SUM}
    if "CD" in kind:
        options |= {"teacher": VELOCITY, "solver": kind.split()[1]}
    if "target" in kind:
        options["target"] = view(average, prediction, path)
    if kind == "ECT":
        loss = ((error + 0.01).sqrt() - 0.1) / (sigma - less)
        options["weight"] = weights.pseudo_huber(0.1)
    objective = easy_consistency if kind == "ECT" else consistency
    ours = objective(view(network, prediction, path), x1, x0=x0, times=lambda _: (s, r), **options)
    torch.testing.assert_close(ours.per_sample, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.raw_error, error.detach() / 3, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(network, ours.mean()), gradients(network, loss.mean()), rtol=1e-8, atol=1e-11)


@BOTH
def test_a_network_with_the_time_of_meanflow_is_the_same_map(objective):
    """network(x, 1 - s, 1 - t) with the sign of its velocity turned, as network and as teacher."""
    network, (x1, x0), (s, r) = Tiny(), data(8, 3), pairs(8, ends=2)
    turned = FlowMap(lambda x, tau, r: -network(x, 1.0 - tau, 1.0 - r), call="meanflow")
    for teacher in (None, FlowMap(network)):
        a = objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, r), teacher=teacher).per_sample
        b = objective(turned, x1, x0=x0, times=lambda _: (s, r), teacher=teacher and turned).per_sample
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@BOTH
def test_the_target_is_a_constant_for_data_that_has_a_gradient_too(objective):
    network, (x1, x0), (s, r) = Tiny(), data(8, 3), pairs(8)
    x1.requires_grad_()
    ours = objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, r), **SUM).mean()
    sigma, less = ((1 - t) / t for t in (s, r))
    f = function_of_sigma(network, "mean_velocity", Linear())
    there = f(x1 + less[:, None] * x0, less).detach()
    plain = (f(x1 + sigma[:, None] * x0, sigma) - there).square().sum(1).mean()
    torch.testing.assert_close(torch.autograd.grad(ours, x1), torch.autograd.grad(plain, x1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ends", [0, 4])
def test_a_teacher_that_predicts_data_ends_with_a_step_of_euler(ends):
    """Its velocity is (D - x)/(1 - t): 0/0 at t = 1, where x + h v is D itself."""
    network, (x1, x0), (s, r) = Tiny(), data(12, 3), pairs(12, ends=ends)
    teacher = FlowMap(lambda x, t: ORACLE.data(x, t[:, None]), prediction="data")
    ours, velocity = (
        consistency(FlowMap(network), x1, x0=x0, times=lambda _: (s, r), teacher=each, **SUM).per_sample
        for each in (teacher, VELOCITY)
    )
    inside = 12 - ends
    torch.testing.assert_close(ours[:inside], velocity[:inside], rtol=1e-8, atol=1e-10)
    if ends:
        euler = consistency(
            FlowMap(network), x1, x0=x0, times=lambda _: (s, r), teacher=VELOCITY, solver="euler", **SUM
        ).per_sample
        torch.testing.assert_close(ours[inside:], euler[inside:], rtol=1e-8, atol=1e-10)


# ---- the exact map ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_error_of_distillation_is_that_of_one_step(solver, order):
    x1, x0 = data(64)
    s = torch.linspace(0.1, 0.7, 64, dtype=torch.float64)
    gaps, errors = [0.1, 0.05, 0.025, 0.0125], []
    for h in gaps:
        loss = consistency(EXACT, x1, x0=x0, times=lambda _, h=h: (s, s + h), teacher=VELOCITY, solver=solver)
        errors.append(float(loss.raw_error.mean().sqrt()))
    assert slope(gaps, errors) == pytest.approx(order, abs=0.15)


def test_distillation_along_the_exact_flow_has_no_error():
    """A gap so small that a step of Heun is exact to 1e-12."""
    (x1, x0), s = data(64), torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    loss = consistency(EXACT, x1, x0=x0, times=lambda _: (s, s + 1e-4), teacher=VELOCITY)
    assert float(loss.raw_error.max().sqrt()) < 1e-10


class Exact(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x, s, t):
        features = (torch.ones_like(x), x, s[:, None] * x)
        return ORACLE.mean_velocity(x, s, t) + sum(w * f for w, f in zip(self.head, features))


def test_the_bias_of_one_noise_falls_with_the_gap():
    """At the exact map E[f(x_r) | x_s] - f(x_s) is of the order gap^2, against a spread of the order gap: the mean
    gradient, divided by the gap as ECT does, falls like the gap."""
    network, gaps, bias = Exact(), [0.2, 0.1, 0.05], []
    (x1, x0), s = data(400_000, seed=9), torch.linspace(0.2, 0.6, 400_000, dtype=torch.float64)
    x1 = 0.7 + 0.5 * x1
    for h in gaps:
        loss = consistency(
            FlowMap(network), x1, x0=x0, times=lambda _, h=h: (s, s + h), weight=weights.constant(1.0 / h, norm="sum")
        )
        bias.append(float(gradients(network, loss.mean()).norm()))
        noise = 4 * 2 * float((loss.raw_error / h**2).mean().sqrt()) / 400_000**0.5 * 2  # |1-s|, features below 2
        assert bias[-1] > noise
    assert 0.8 < slope(gaps, bias) < 1.3
    with torch.no_grad():
        network.head[1] = 0.05
    loss = consistency(
        FlowMap(network), x1, x0=x0, times=lambda _: (s, s + 0.05), weight=weights.constant(20.0, norm="sum")
    )
    assert float(gradients(network, loss.mean()).norm()) > 1.5 * bias[-1]


# ---- dropout, rows, words --------------------------------------------------------------------------------------------


@BOTH
def test_dropout_is_one_mask_for_network_and_target(objective):
    """At s = r both passes see the same point: with one mask there is nothing between them."""
    network, (x1, x0) = Tiny(dropout=0.5).train(), data(32, 3)
    s = torch.linspace(0.2, 0.7, 32, dtype=torch.float64)
    loss = objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, s), **SUM)
    assert float(loss.raw_error.max()) < 1e-28
    state = torch.get_rng_state()
    objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, s), **SUM)
    assert not torch.equal(state, torch.get_rng_state())  # and the next step has another
    other = objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, s + 0.2), **SUM)
    assert not torch.equal(other.raw_error, loss.raw_error)


def test_an_average_has_the_same_mask_and_the_teacher_none():
    network, (x1, x0) = Tiny(dropout=0.5).train(), data(32, 3)
    s = torch.linspace(0.2, 0.7, 32, dtype=torch.float64)
    average, modes = copy.deepcopy(network), []
    loss = consistency(FlowMap(network), x1, x0=x0, times=lambda _: (s, s), target=FlowMap(average))
    assert float(loss.raw_error.max()) < 1e-28
    teacher = Tiny(dropout=0.5).train()
    teacher.body[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    consistency(FlowMap(network), x1, x0=x0, times=lambda _: (s, s + 0.1), teacher=FlowMap(teacher))
    assert modes == [False, False] and all(m.training for m in teacher.modules())


def test_compiled_code_refuses_dropout_and_takes_the_rest():
    x1, (s, r) = torch.zeros(4, 3, dtype=torch.float64), pairs(4)

    def step(network):
        fm = FlowMap(network)
        loss = lambda x: easy_consistency(fm, x, x0=x + 1.0, times=lambda _: (s, r), **SUM).mean()  # noqa: E731
        return torch.compile(loss, backend="eager", fullgraph=True)

    plain = easy_consistency(FlowMap(Tiny()), x1, x0=x1 + 1.0, times=lambda _: (s, r), **SUM).mean()
    torch.testing.assert_close(step(Tiny())(x1), plain)
    with pytest.raises(Exception, match="needs one mask"):
        step(Tiny(dropout=0.5).train())(x1)


@BOTH
def test_a_row_does_not_feel_the_others(objective):
    network, (x1, x0), (s, r) = Tiny(), data(8, 3), pairs(8, ends=2)
    whole = objective(FlowMap(network), x1, x0=x0, times=lambda _: (s, r)).per_sample
    rows = torch.tensor([7, 1, 3])
    part = objective(FlowMap(network), x1[rows], x0=x0[rows], times=lambda _: (s[rows], r[rows])).per_sample
    torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12)


@BOTH
def test_conditions_reach_network_target_and_teacher(objective):
    seen = []

    def network(x, s, t, label):
        seen.append(label.tolist())
        return label[:, None] * x

    fm = FlowMap(network)
    x1, x0 = torch.ones(3, 2), torch.zeros(3, 2)
    objective(fm, x1, x0=x0, condition={"label": torch.arange(3)}, teacher=fm)
    assert seen == [[0, 1, 2]] * 4  # two of Heun, target, network


def test_a_network_that_predicts_data_has_the_data_as_its_target_at_the_end():
    """All partners of stage 0 and sigma < 1 are the data: no second evaluation counts, whatever the network returns."""
    network = lambda x, s: torch.full_like(x, math.nan) if not torch.is_grad_enabled() else 0.0 * x  # noqa: E731
    x1 = torch.full((4, 2), 3.0)
    s = torch.full((4,), 0.5)
    loss = easy_consistency(
        FlowMap(network, prediction="data"), x1, times=lambda _: (s, torch.ones(4)), weight=weights.constant(norm="sum")
    )
    torch.testing.assert_close(loss.per_sample, torch.full((4,), 18.0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda fm, x: consistency(fm, x, solver="heun"), ValueError, "no teacher"),
        (lambda fm, x: consistency(fm, x, teacher=fm, solver="rk4"), ValueError, "solver = 'rk4'"),
        (lambda fm, x: consistency(fm, x, target=fm.network), TypeError, "target is Tiny"),
        (lambda fm, x: consistency(fm, x, times=times.uniform), ValueError, r"\(4,\).*law of pairs"),
        (lambda fm, x: easy_consistency(fm, x, times=lambda _: (torch.ones(4), torch.zeros(4))), ValueError, "row 0"),
        (lambda fm, x: easy_consistency(fm, x, times=lambda _: torch.full((2, 4), 80.0)), ValueError, "r = 80"),
        (lambda fm, x: easy_consistency(fm, x, teacher=fm.network), TypeError, "teacher is Tiny"),
        (lambda fm, x: easy_consistency(fm, x.long()), TypeError, "int64"),
        (lambda fm, x: consistency(fm, x, weight=1.0), TypeError, "weight = 1.0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(FlowMap(Tiny()), torch.zeros(4, 3))
