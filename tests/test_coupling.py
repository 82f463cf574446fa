"""Couplings: against brute force, POT and the plan's optimality; labels and conditions follow; in an objective."""

import itertools
import sys
import warnings

import pytest
import torch

from pyflowmap import FlowMap, coupling, evaluate, noise
from pyflowmap.objectives import flow_matching, posterior_augmented, progressive, shortcut

pytest.importorskip("scipy")


def points(rows, *event, seed=0, dtype=torch.float64):
    return torch.randn(2, rows, *event, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind(0)


def cost(x0, x1):
    return (x0.flatten(1)[:, None] - x1.flatten(1)[None]).square().sum(-1)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("labelled", [False, True])
def test_exact_is_the_best_of_all_permutations(rows, labelled):
    x0, x1 = points(rows, 2, 3, seed=rows)
    labels = torch.arange(rows) % 2 if labelled else torch.zeros(rows).long()
    allowed = [p for p in itertools.permutations(range(rows)) if bool((labels[list(p)] == labels).all())]
    C = cost(x0, x1)
    best = min(allowed, key=lambda p: sum(float(C[p[j], j]) for j in range(rows)))
    assert coupling.exact(x0, x1, labels=labels if labelled else None).tolist() == list(best)


def test_exact_agrees_with_pot():
    ot = pytest.importorskip("ot")
    x0, x1 = points(40, 8)
    plan = ot.emd([], [], cost(x0, x1).numpy())
    assert plan.argmax(0).tolist() == coupling.exact(x0, x1).tolist()


def test_exact_does_not_cancel():
    """Points 0.1 apart, 1e3 from the origin: in float32 ||x0||^2 + ||x1||^2 - 2<x0, x1> is all rounding there."""
    x0, order = 1e3 + 1e-1 * torch.randn(32, 4), torch.randperm(32, generator=torch.Generator().manual_seed(1))
    x1 = x0[order] + 1e-4 * torch.randn(32, 4)
    assert torch.equal(coupling.exact(x0, x1), order)


# ---- Sinkhorn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_the_plan_is_optimal(labelled):
    """Unique: the marginals, and log P + C/epsilon = f_i + g_j wherever there may be mass."""
    pytest.importorskip("ot")
    x0, x1 = points(12, 3)
    labels = torch.arange(12) % 3 if labelled else torch.zeros(12).long()
    options = {"labels": labels} if labelled else {}
    P = coupling.sinkhorn(x0, x1, 1.5, 20_000, tolerance=1e-9, **options)
    share = torch.full((12,), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(P.sum(0), share, rtol=1e-6, atol=0)
    torch.testing.assert_close(P.sum(1), share, rtol=1e-6, atol=0)
    assert bool((P[labels[:, None] != labels[None]] == 0).all())
    for label in labels.unique():
        at = (labels == label).nonzero()[:, 0]
        potential = (P[at][:, at].log() + cost(x0, x1)[at][:, at] / 1.5).double()
        inner = potential - potential.mean(0, keepdim=True) - potential.mean(1, keepdim=True) + potential.mean()
        assert float(inner.abs().max()) < 1e-8


def test_small_epsilon_tends_to_the_exact_plan():
    pytest.importorskip("ot")
    x0, x1 = points(8, 3)
    p = coupling.exact(x0, x1)
    off = []
    for epsilon in (1.0, 0.1, 0.01):
        P = coupling.sinkhorn(x0, x1, epsilon, 200_000)
        off.append(float(1.0 - 8 * P[p, torch.arange(8)].mean()))
    assert off[0] > off[1] > off[2] and off[2] < 1e-2


def test_no_cost_underflows():
    """exp(-C/epsilon) is 0 everywhere here."""
    pytest.importorskip("ot")
    x0, x1 = (1e3 * x for x in points(6, 50))
    assert float((-cost(x0, x1) / 1e3).exp().max()) == 0.0
    P = coupling.sinkhorn(x0, x1, 1e3, 200_000)
    assert bool(P.isfinite().all()) and float(P.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(P.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-2, atol=0)


def test_too_few_iterations_are_told():
    pytest.importorskip("ot")
    with pytest.warns(UserWarning, match=r"after 2 iterations the marginals are .* off"):
        coupling.sinkhorn(*points(8, 3), 0.01, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coupling.sinkhorn(*points(8, 3), 1.0)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def marked(rows):
    """Data that can be told from its condition, and noise."""
    x0, x1 = points(rows, 2)
    return x0, x1, {"label": torch.arange(rows), "first": x1[:, :1].clone(), "scale": 2.0, "shared": torch.ones(3)}


@pytest.mark.parametrize(
    "method", [{"method": "exact"}, {"method": "sinkhorn", "epsilon": 0.5}], ids=["exact", "sinkhorn"]
)
@pytest.mark.parametrize("replacement", [False, True])
def test_conditions_follow_their_data(method, replacement):
    pytest.importorskip("ot")
    x0, x1, condition = marked(16)
    a, b, moved = coupling.pair(x0, x1, condition, replacement=replacement, seed=3, **method)
    assert torch.equal(b, x1[moved["label"]]) and torch.equal(b[:, :1], moved["first"])
    assert moved["scale"] == 2.0 and torch.equal(moved["shared"], condition["shared"])
    assert bool((a[:, None] == x0[None]).all(-1).any(1).all())  # every one is a row of x0
    if not replacement:
        assert torch.equal(b, x1)
    again = coupling.pair(x0, x1, condition, replacement=replacement, seed=3, **method)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)
    if replacement or "epsilon" in method:
        other = coupling.pair(x0, x1, condition, replacement=replacement, seed=4, **method)
        assert not torch.equal(other[0], a)


def test_pairs_within_a_label():
    pytest.importorskip("ot")
    x0, x1 = points(24, 2)
    labels = torch.arange(24) % 4
    for method in ({"method": "exact"}, {"method": "sinkhorn", "epsilon": 0.1}):
        for replacement in (False, True):
            a, _, moved = coupling.pair(
                x0, x1, {"label": labels}, labels=labels, replacement=replacement, seed=1, iterations=100_000, **method
            )
            source = (a[:, None] == x0[None]).all(-1).int().argmax(1)
            assert torch.equal(labels[source], moved["label"])


def test_pairs_are_drawn_from_the_plan():
    pytest.importorskip("ot")
    x0, x1 = points(4, 2)
    P = coupling.sinkhorn(x0, x1, 2.0, tolerance=1e-9)
    for replacement in (False, True):
        counts = torch.zeros(4, 4, dtype=torch.float64)
        for seed in range(1500):
            a, b, _ = coupling.pair(x0, x1, method="sinkhorn", epsilon=2.0, replacement=replacement, seed=seed)
            i, j = ((y[:, None] == x[None]).all(-1).int().argmax(1) for y, x in ((a, x0), (b, x1)))
            counts.index_put_((i, j), torch.ones(4, dtype=torch.float64), accumulate=True)
        expected = 6000 * P
        assert float(((counts - expected).square() / expected).sum()) < 37.7  # chi^2, at most 15 degrees, 0.1 %


def test_replacement_leaves_out_37_percent():
    x0, x1 = points(64, 2)
    kept = 0
    for seed in range(50):
        a, b, _ = coupling.pair(x0, x1, replacement=True, seed=seed)
        kept += len(b.unique(dim=0))
        p = coupling.exact(x0, x1)
        j = (b[:, None] == x1[None]).all(-1).int().argmax(1)
        assert torch.equal(a, x0[p[j]])
    assert kept / (50 * 64) == pytest.approx(1 - (1 - 1 / 64) ** 64, abs=0.02)


# ---- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [flow_matching, progressive, shortcut])
def test_an_objective_on_minibatch_couplings(objective):
    prediction = "velocity" if objective is flow_matching else "mean_velocity"
    fm = FlowMap(lambda x, *times, label: torch.sin(x) + label[:, None], prediction=prediction)
    x1, label = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 2
    for options in ({}, {"label": "label"}):
        coupled = coupling.minibatch(objective, **options)(fm, x1, condition={"label": label}, seed=7)
        z = evaluate(noise(x1, 7))
        z = z[coupling.exact(z, x1, labels=label if options else None)]
        expected = objective(fm, x1, x0=z, condition={"label": label}, seed=7)
        torch.testing.assert_close(coupled.per_sample, expected.per_sample)
        assert not torch.allclose(coupled.per_sample, objective(fm, x1, condition={"label": label}, seed=7).per_sample)


def test_coupled_paths_are_shorter_and_their_marginal_is_the_noise():
    """Lower variance of the target, which is what it is for; the noise of the batch is the same set of numbers."""
    fm = FlowMap(lambda x, t: 0.0 * x, prediction="velocity")
    x1 = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)) + 3.0
    plain = flow_matching(fm, x1, seed=1).mean()
    assert float(coupling.minibatch(flow_matching)(fm, x1, seed=1).mean()) < 0.9 * float(plain)


# ---- bad input -------------------------------------------------------------------------------------------------------

A, B = points(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: coupling.exact(A, B[:3]), ValueError, r"x0 \(4, 3\) on cpu cannot be paired with x1 \(3, 3\)"),
        (lambda: coupling.exact(A[:0], B[:0]), ValueError, "at least one row"),
        (lambda: coupling.exact(A.long(), B), TypeError, "x0 is torch.int64"),
        (lambda: coupling.exact(A, B, labels=torch.zeros(3)), ValueError, r"labels is shape \(3,\)"),
        (lambda: coupling.exact(A * float("nan"), B), ValueError, "not finite"),
        (lambda: coupling.sinkhorn(A, B, 0.0), ValueError, "epsilon = 0.0"),
        (lambda: coupling.sinkhorn(A * float("nan"), B, 1.0), ValueError, "not finite"),
        (lambda: coupling.sinkhorn(A, B, 1.0, 0), ValueError, "iterations = 0"),
        (lambda: coupling.pair(A, B, method="emd"), ValueError, "method = 'emd'"),
        (lambda: coupling.pair(A, B, method="sinkhorn"), ValueError, "epsilon = None"),
        (lambda: coupling.pair(A, B, epsilon=0.1), ValueError, "epsilon = 0.1"),
        (lambda: coupling.pair(A, B, replacement=True, sample_ids=torch.arange(4)), ValueError, "need a seed"),
        (lambda: coupling.minibatch(posterior_augmented), ValueError, "independent noise"),
        (lambda: coupling.minibatch("flow_matching"), TypeError, "objective is str"),
        (
            lambda: coupling.minibatch(flow_matching, label="y")(None, B),
            ValueError,
            "label = 'y' but the condition has",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("module", "call", "words"),
    [
        ("scipy.optimize", lambda: coupling.exact(A, B), "coupling.exact needs scipy"),
        ("ot.bregman", lambda: coupling.sinkhorn(A, B, 1.0), "coupling.sinkhorn needs POT"),
    ],
)
def test_what_is_not_installed(monkeypatch, module, call, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=words):
        call()
