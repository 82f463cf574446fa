"""Objectives that differentiate the network: exact solutions, gradients by torch.func.jvp, rows, guidance, training."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from oracles import Gaussian
from torch import nn

import pyflowmap as pfm
from pyflowmap import FlowMap, weights
from pyflowmap.objectives import baked_guidance, lagrangian, mean_flow
from pyflowmap.training import Step

ORACLE = Gaussian()
BOTH = pytest.mark.parametrize("objective", [lagrangian, mean_flow])
PLAIN = {"weight": weights.constant(norm="sum")}


def pairs(rows, seed=0):
    """s < t in float64, apart by more than 0.01."""
    rng = torch.Generator().manual_seed(seed)
    s, t = (0.01 + 0.98 * torch.rand(2, rows, generator=rng, dtype=torch.float64)).sort(0).values
    return s - 0.005, t + 0.005


def data(rows, size=1, seed=1, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1000 + seed)  # not that of the times
    return (torch.randn(rows, size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))


class Exact(nn.Module):
    """The mean velocity of the oracle, with mean and deviation as parameters and a head that starts at zero."""

    def __init__(self, m=0.7, S=0.5, dtype=torch.float64):
        super().__init__()
        self.m, self.S = (nn.Parameter(torch.tensor(v, dtype=dtype)) for v in (m, S))
        self.head = nn.Parameter(torch.zeros(6, dtype=dtype))

    def forward(self, x, s, t):
        a, b = s[:, None], t[:, None]
        features = (torch.ones_like(x), x, a * torch.ones_like(x), b * torch.ones_like(x), x * x, b * x)
        return Gaussian(self.m, self.S).mean_velocity(x, s, t) + sum(w * f for w, f in zip(self.head, features))


class Tiny(nn.Module):
    """A perceptron on [x, s, t - s]."""

    def __init__(self, size=1, width=64, dropout=0.0, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        middle = nn.Dropout(dropout) if dropout else nn.Identity()
        self.body = nn.Sequential(
            nn.Linear(size + 2, width), nn.SiLU(), middle, nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, size),
        ).to(dtype)  # fmt: skip

    def forward(self, x, s, t):
        return self.body(torch.cat([x, s[:, None], (t - s)[:, None]], 1).to(x.dtype))


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)


# ---- the exact solution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"differentiate_tangent": False}, {"teacher": "oracle"}], ids=str)
def test_the_exact_map_moves_with_its_velocity(options):
    if options:
        teacher = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
        options = {"teacher": teacher} if "teacher" in options else options
    x1, x0 = data(64, 3)
    exact = Exact()
    loss = lagrangian(FlowMap(exact), x1, x0=x0, times=lambda x: pairs(64), diagonal=0.0, **options)
    assert float(loss.raw_error.max()) < 1e-20
    assert all(float(g.abs().max()) < 1e-9 for g in gradients(exact, loss.mean()))
    wrong = lagrangian(FlowMap(Exact(S=0.55)), x1, x0=x0, times=lambda x: pairs(64), diagonal=0.0, **options)
    assert float(wrong.raw_error.mean()) > (1e-4 if "teacher" in options else -1.0)
    with torch.no_grad():
        exact.head[3] = 0.1  # no flow map any more
    bent = lagrangian(FlowMap(exact), x1, x0=x0, times=lambda x: pairs(64), diagonal=0.0, **options)
    assert float(bent.raw_error.mean()) > 1e-4


@pytest.mark.parametrize("S, exact", [(0.5, True), (0.55, False)])
def test_the_expected_gradient_of_mean_flow_vanishes_at_the_exact_map(S, exact):
    """The path's velocity stands for the marginal one: the loss is not 0, its gradient is a mean of 0."""
    network, batches = Exact(S=S), 60
    found = []
    for seed in range(batches):
        x1, x0 = data(4000, seed=seed)
        loss = mean_flow(
            FlowMap(network), 0.7 + 0.5 * x1, x0=x0, times=lambda x, k=seed: pairs(4000, k), equal=0.0, **PLAIN
        )
        found.append(torch.cat([g.reshape(-1) for g in gradients(network, loss.mean())]))
    found = torch.stack(found)
    score = found.mean(0) / (found.std(0) / math.sqrt(batches))
    assert float(loss.raw_error.mean()) > 0.1
    if exact:
        assert float(score.abs().max()) < 4.5  # standard errors, 8 parameters
    else:
        assert float(score.abs().max()) > 12.0


def test_the_identities_at_the_golden_point():
    """D_s u and d_t u of the specification, by the same derivative that the objectives take."""
    x, s, t = (torch.tensor(v, dtype=torch.float64) for v in ([[1.3], [-0.4]], [0.23, 0.23], [0.81, 0.81]))
    b = ORACLE.velocity(x, s[:, None])
    network = lambda x, s, t: ORACLE.mean_velocity(x, s, t)  # noqa: E731
    for tangents, want in (((b, 1.0, None), (0.868116, -0.427580)), ((None, None, 1.0), (1.510804, -0.744127))):
        _, du = pfm.jvp(network, (x, s, t), tangents)
        torch.testing.assert_close(du.flatten(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


# ---- gradients against torch.func.jvp ---------------------------------------------------------------------------


def plain_lagrangian(network, x1, x0, s, t, n, differentiate_tangent):
    x, b = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0
    near = (network(x[:n], s[:n], s[:n]) - b[:n]).square().sum(1)
    x, s, t, h = x[n:], s[n:], t[n:], (t - s)[n:, None]
    u, du = torch.func.jvp(lambda t: network(x, s, t), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        target = network(x + h * u, t, t)
    residual = u + h * du - target if differentiate_tangent else u - (target - h * du).detach()
    return torch.cat([near, residual.square().sum(1)])


def plain_mean_flow(network, x1, x0, s, t, n):
    x, b = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0
    near = (network(x[:n], s[:n], s[:n]) - b[:n]).square().sum(1)
    x, s, t, b = x[n:], s[n:], t[n:], b[n:]
    u, du = torch.func.jvp(lambda x, s: network(x, s, t), (x, s), (b, torch.ones_like(s)))
    return torch.cat([near, (u - (b + (t - s)[:, None] * du).detach()).square().sum(1)])


@pytest.mark.parametrize("case", ["lsd", "lsd, tangent as a constant", "mean flow"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients(case, adaptive):
    network = Tiny(3, dtype=torch.float64)
    x1, x0 = data(12, 3)
    s, t = pairs(12)
    weight = weights.adaptive(p=0.7, c=0.1) if adaptive else weights.constant(norm="sum")
    options = {"x0": x0, "times": lambda x: (s, t), "weight": weight}
    if case == "mean flow":
        ours, error = mean_flow(FlowMap(network), x1, equal=0.5, **options), plain_mean_flow(network, x1, x0, s, t, 6)
    else:
        through = case == "lsd"
        ours = lagrangian(FlowMap(network), x1, diagonal=0.25, differentiate_tangent=through, **options)
        error = plain_lagrangian(network, x1, x0, s, t, 3, through)
    plain = error / (error.detach() + 0.1) ** 0.7 if adaptive else error
    torch.testing.assert_close(ours.per_sample, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.raw_error, error.detach() / 3, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, plain.mean()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_tangent_as_a_constant_has_the_same_loss_and_another_gradient():
    network, (x1, x0) = Tiny(3, dtype=torch.float64), data(8, 3)
    loss = [
        lagrangian(FlowMap(network), x1, x0=x0, times=lambda x: pairs(8), diagonal=0.0, differentiate_tangent=through)
        for through in (True, False)
    ]
    torch.testing.assert_close(loss[0].raw_error, loss[1].raw_error)
    first, second = (torch.cat([g.reshape(-1) for g in gradients(network, each.mean())]) for each in loss)
    assert float((first - second).norm()) > 0.05 * float(first.norm())


@BOTH
@pytest.mark.parametrize("call", ["start_and_span", "meanflow"])
def test_other_conventions_of_time_are_the_same_map(objective, call):
    """A network that takes (s, t - s), or MeanFlow's (1 - s, 1 - t) with the sign of its velocity turned."""
    network = Tiny(3, dtype=torch.float64)
    turned = {
        "start_and_span": lambda x, s, h: network(x, s, s + h),
        "meanflow": lambda x, tau, r: -network(x, 1.0 - tau, 1.0 - r),
    }[call]
    x1, x0 = data(8, 3)
    losses = [
        objective(fm, x1, x0=x0, times=lambda x: pairs(8)) for fm in (FlowMap(network), FlowMap(turned, call=call))
    ]
    torch.testing.assert_close(losses[0].per_sample, losses[1].per_sample, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(gradients(network, loss.mean()) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- rows, seeds, conditions --------------------------------------------------------------------------------------


@BOTH
def test_a_row_does_not_feel_the_others(objective):
    network, (x1, x0), (s, t) = Tiny(3, dtype=torch.float64), data(8, 3), pairs(8)
    share = {"diagonal" if objective is lagrangian else "equal": 0.0}
    whole = objective(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), **share).per_sample
    rows = torch.tensor([6, 1, 3])
    part = objective(FlowMap(network), x1[rows], x0=x0[rows], times=lambda x: (s[rows], t[rows]), **share).per_sample
    torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_share_holds_at_any_batch(objective, share):
    torch.manual_seed(0)
    counts = []

    def network(x, s, t):
        if type(s) is torch.Tensor and type(t) is torch.Tensor and torch.is_grad_enabled():
            counts.append(len(s))
            assert torch.equal(s, t)
        return 0.0 * x

    option = {"diagonal" if objective is lagrangian else "equal": share}
    for _ in range(300):
        parts = objective(FlowMap(network), torch.zeros(3, 2), **option).parts
        assert set(parts) <= {"flow_matching", objective.__name__}
    assert sum(counts) / 900 == pytest.approx(share, abs=0.06)


@BOTH
def test_seeded_loss_repeats(objective):
    fm, x1 = FlowMap(Tiny(3)), torch.ones(8, 3)
    assert torch.equal(objective(fm, x1, seed=1).per_sample, objective(fm, x1, seed=1).per_sample)
    assert not torch.equal(objective(fm, x1, seed=1).per_sample, objective(fm, x1, seed=2).per_sample)


@BOTH
def test_conditions_follow_their_rows(objective):
    seen = []

    def network(x, s, t, label, scale):
        assert scale == 2.0 and label.shape == x.shape[:1]
        seen.append(label.tolist())
        return label[:, None] * x

    x1, label = torch.ones(8, 2), torch.arange(8)
    loss = objective(FlowMap(network), x1, x0=x1, times=lambda x: torch.tensor([[0.2] * 8, [0.6] * 8]),
                     condition={"label": label, "scale": 2.0})  # fmt: skip
    assert seen[:2] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    torch.testing.assert_close(loss.raw_error[:6], torch.arange(6.0).square())  # v = x1 - x0 = 0, u = label


def test_dropout_is_one_mask_for_value_and_derivative():
    """u = drop(x): the derivative along b is drop(b), so each error is (2x - b - 2hb)^2 or b^2, and nothing else."""
    (x1, x0), (s, t) = data(200), pairs(200)
    dropout = nn.Dropout(0.5).train()
    loss = mean_flow(FlowMap(lambda x, s, t: dropout(x)), x1, x0=x0, times=lambda x: (s, t), equal=0.0, **PLAIN)
    x, b, h = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0, (t - s)[:, None]
    kept, dropped = (2 * x - b - 2 * h * b).square()[:, 0], b.square()[:, 0]
    is_kept = torch.isclose(loss.per_sample, kept)
    assert bool((is_kept | torch.isclose(loss.per_sample, dropped)).all()) and 60 < int(is_kept.sum()) < 140


def test_the_teacher_has_no_dropout_and_its_mode_is_put_back():
    network, modes = Tiny(dropout=0.5).train(), []
    network.body[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    lagrangian(FlowMap(network), torch.zeros(8, 1))
    assert modes == [True, True, False] and all(m.training for m in network.modules())


def test_the_default_times_are_those_of_the_paper_turned_round():
    """MeanFlow's logit-normal of mean -0.4 in a time that runs from data to noise is one of mean +0.4 here."""
    seen = []
    mean_flow(FlowMap(lambda x, s, t: (seen.append((s, t)), x)[1]), torch.zeros(20000, 1), seed=3, equal=1.0)
    reference = torch.sigmoid(-0.4 + torch.randn(2, 20000)).amax(0)  # tau = 1 - s: the noisier of two
    assert float(seen[0][0].mean()) == pytest.approx(float(1.0 - reference.mean()), abs=0.01)


# ---- guidance -----------------------------------------------------------------------------------------------------


def labelled(x, s, t, label):
    """v(x | label) = (label + 1) x, u independent of t; label 9 is null."""
    return (label[:, None] + 1.0) * x


@pytest.mark.parametrize("omega, kappa", [(2.0, 0.0), (1.0, 0.5), (0.4, 0.3)])
def test_guided_velocity_by_hand(omega, kappa):
    (x1, x0), (s, t) = data(10, 2), pairs(10)
    label = torch.arange(10) % 4
    guidance = baked_guidance(omega, kappa, null={"label": 9}, interval=(0.2, 0.5), drop=0.0)
    ours = mean_flow(FlowMap(labelled), x1, x0=x0, times=lambda x: (s, t), condition={"label": label}, equal=0.5,
                     guidance=guidance, **PLAIN)  # fmt: skip
    x, b, k = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0, label[:, None].double() + 1.0
    inside = ((s >= 0.2) & (s <= 0.5))[:, None]
    assert 0 < int(inside.sum()) < 10
    guided = torch.where(inside, omega * b + (1 - omega - kappa) * 10 * x + kappa * k * x, b)
    h = torch.cat([torch.zeros(5), (t - s)[5:]])[:, None]
    want = (k * x - guided - h * k * guided).square().sum(1)  # D_s u = (du/dx) b_g = k b_g
    torch.testing.assert_close(ours.per_sample, want, rtol=1e-9, atol=1e-9)


def test_dropped_rows_learn_the_null_condition_without_guidance():
    labels, (x1, x0) = [], data(4000)
    network = lambda x, s, t, label: (labels.append((s is t, label)), 0.0 * x)[1]  # noqa: E731
    loss = mean_flow(FlowMap(network), x1, x0=x0, condition={"label": torch.zeros(4000, dtype=torch.long)}, equal=1.0,
                     guidance=baked_guidance(3.0, null={"label": 9}, drop=0.25), **PLAIN)  # fmt: skip
    label = labels[-1][1]
    assert float((label == 9).float().mean()) == pytest.approx(0.25, abs=0.03)
    scale = torch.where(label == 9, 1.0, 9.0)  # u = 0: b_g = 3 b, or b where dropped
    torch.testing.assert_close(loss.per_sample, scale * (x1 - x0).square()[:, 0], rtol=1e-6, atol=1e-9)


# ---- bad input ----------------------------------------------------------------------------------------------------

X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lagrangian(FlowMap(lambda x, s: x, prediction="velocity"), X), ValueError, 'prediction="velocity"'),
        (lambda: mean_flow(FlowMap(lambda x, s: x, prediction="data"), X), ValueError, 'use FlowMap.*"mean_velocity"'),
        (lambda: lagrangian(FlowMap(Tiny(2)), X, diagonal=75), ValueError, "diagonal = 75"),
        (lambda: mean_flow(FlowMap(Tiny(2)), X, equal=-0.1), ValueError, "equal = -0.1"),
        (lambda: mean_flow(FlowMap(Tiny(2)), X.long()), TypeError, "int64"),
        (lambda: lagrangian(FlowMap(Tiny(2)), X, x0=X[:2]), ValueError, r"x0 has shape \(2, 2\)"),
        (lambda: lagrangian(Tiny(2), X), TypeError, "flow_map is Tiny; wrap the network"),
        (lambda: lagrangian(FlowMap(Tiny(2)), X, teacher=Tiny(2)), TypeError, "teacher is Tiny"),
        (lambda: mean_flow(FlowMap(Tiny(2)), X, weight=2.0), TypeError, "weight = 2.0"),
        (lambda: mean_flow(FlowMap(Tiny(2)), X[:2], times=pfm.times.uniform), ValueError, r"\(2,\).*law of pairs"),
        (lambda: lagrangian(FlowMap(Tiny(2)), X, times=lambda x: (0.2, 0.8)), ValueError, "0.2 and 0.8"),
        (lambda: lagrangian(FlowMap(Tiny(2)), X, times=lambda x: (x[:3, 0], x[:3, 0])), ValueError, r"tensors \(4,\)"),
        (lambda: mean_flow(FlowMap(Tiny(2)), X, guidance=2.0), TypeError, "guidance is float.*baked_guidance"),
        (lambda: baked_guidance(1.0, 1.0, null={"label": 9}), ValueError, "kappa = 1.0"),
        (lambda: baked_guidance(2.0), ValueError, "null"),
        (lambda: baked_guidance(2.0, null={"label": 9}, drop=2), ValueError, "drop = 2"),
        (
            lambda: mean_flow(FlowMap(labelled), X, guidance=baked_guidance(2.0, null={"label": 9})),
            ValueError,
            "'label'",
        ),
        (
            lambda: mean_flow(
                FlowMap(labelled), X, condition={"label": 3}, guidance=baked_guidance(2.0, null={"label": 9})
            ),
            ValueError,
            "one by one",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_tangent_that_was_not_tracked_cannot_be_differentiated_by_mistake():
    """What an own loop gets that forgets `.detach()`, and the program with it runs."""
    net, x1 = Tiny(2), torch.randn(16, 2)
    torch.manual_seed(0)
    s, t = pfm.times.logit_normal_pair(x1, 0.4, 1.0, equal=0.75)
    x, v = pfm.interpolants.Linear().draw(x1, s)
    u, du = pfm.jvp(net, (x, s, t), (v, 1.0, 0.0), kwargs={})
    r = pfm.lazy(u) - (pfm.lazy(v) + (t - s) * pfm.lazy(du)).detach()
    pfm.weights.adaptive(p=1.0, c=0.01, norm="sum")(pfm.inner(r)).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    u, du = pfm.jvp(net, (x, s, t), (v, 1.0, 0.0))
    with pytest.raises(RuntimeError, match="not tracked"):
        pfm.inner(pfm.lazy(u) - (pfm.lazy(v) + (t - s) * pfm.lazy(du))).mean().backward()


# ---- training -----------------------------------------------------------------------------------------------------


@BOTH
def test_a_compiled_step_takes_any_batch(objective):
    """Times drawn on symbolic sizes; where the share is no whole number of rows, neither part is left out."""
    step = Step(Tiny(3, width=8), objective)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    for rows in (16, 13, 7, 2):
        loss, parts = compiled(torch.randn(rows, 3))
        assert bool(loss.isfinite()) and set(parts) == {"error", "flow_matching", objective.__name__}
        # 0.75 of the rows, rounded, but not all of them
        near = {16: 12, 13: 10, 7: 5, 2: 1}[rows] / rows
        mixed = near * parts["flow_matching"] + (1.0 - near) * parts[objective.__name__]
        torch.testing.assert_close(parts["error"], mixed, rtol=1e-5, atol=1e-6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="one row cannot be shared out"):
        compiled(torch.randn(1, 3))


@BOTH
def test_a_step_compiles_in_one_graph(objective):
    """Value and gradients of the eager step; in LSD the time alone has a tangent."""
    network, (x1, x0) = Tiny(3, width=8), data(8, 3, dtype=torch.float32)
    s, t = (time.float() for time in pairs(8))
    step = Step(network, objective, x0=x0, times=lambda x: (s, t))
    torch._dynamo.reset()
    losses = [f(x1)[0] for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(*(gradients(network, loss) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_network_that_asks_for_tensors():
    """as_tensor=True, for code that asks isinstance(x, torch.Tensor) and converts what is none."""
    inner = Tiny(3)

    def asks(x, s, t):
        return inner(*(each if isinstance(each, torch.Tensor) else torch.as_tensor(each) for each in (x, s, t)))

    x1 = torch.ones(8, 3)
    for objective in (lagrangian, mean_flow):
        want = objective(FlowMap(inner), x1, seed=0).per_sample
        torch.testing.assert_close(objective(FlowMap(asks), x1, seed=0, as_tensor=True).per_sample, want)


EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "gaussian_oracle.py"
TRAINED = pytest.mark.parametrize("objective, steps", [("lagrangian", 2000), ("mean_flow", 1000)])


@TRAINED
def test_training_finds_the_exact_map(objective, steps):
    spec = importlib.util.spec_from_file_location("gaussian_oracle", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x, s, t = torch.tensor([1.3, -0.4]), torch.tensor(0.23), torch.tensor(0.81)
    torch.testing.assert_close(example.exact_jump(x, s, t), ORACLE.jump(x, s, t))
    assert max(example.errors(example.train(objective, steps=20))) > 0.03
    assert max(example.errors(example.train(objective, steps=steps))) < 0.01


@TRAINED
def test_training_finds_it_on_two_processes(objective, steps):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    result = subprocess.run(
        [*command, "--objective", objective, "--steps", str(steps)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = [float(number) for number in re.findall(r"([\d.]+)%", result.stdout)]
    assert len(found) == 2 and max(found) < 1.0, result.stdout
