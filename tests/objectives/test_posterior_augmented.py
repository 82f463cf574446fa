"""PAFM: the specification's gradient, no bias and less variance than flow matching, what would bias it, bad input."""

import math

import pytest
import torch
from mean_gradient import feature, row_gradients, sigmas
from oracles import Gaussian

from pyflowmap import FlowMap
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.objectives import flow_matching, posterior_augmented

ORACLE = Gaussian()
TIMES = {"times": lambda x: 0.05 + 0.9 * torch.rand(len(x), dtype=torch.float64)}


def normal(*shape):
    return ORACLE.m + ORACLE.S * torch.randn(*shape, dtype=torch.float64)


def specification(path, x1, x0, t, candidates, temperature, floor=1e-2):
    """(target, 1/sum w^2), candidates (K, B, ...) with the row's own first; -inf where there is none. All in loops."""
    targets, effective = [], []
    for i in range(len(x1)):
        a, s = path.alpha(float(t[i])), path.sigma(float(t[i]))
        da, ds = path.alpha_derivative(float(t[i])), path.sigma_derivative(float(t[i]))
        x = a * x1[i] + s * x0[i]
        if s < floor:
            targets.append(da * x1[i] + ds * x0[i])
            effective.append(1.0)
            continue
        logit = torch.stack([-(x - a * c).square().sum() / (2 * s * s * temperature) for c in candidates[i]])
        w = torch.softmax(logit, 0)
        targets.append(sum(w[j] * (da * c + ds / s * (x - a * c)) for j, c in enumerate(candidates[i])))
        effective.append(float(1 / w.square().sum()))
    return torch.stack(targets), sum(effective) / len(effective)


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=["linear", "trig", "vp"])
@pytest.mark.parametrize("source", ["given", "batch", "label"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_the_specifications(path, source, temperature):
    torch.manual_seed(2)
    x1, x0 = torch.randn(2, 6, 2, 2, dtype=torch.float64).unbind(0)
    more = torch.randn(9, 6, 2, 2, dtype=torch.float64)  # with x1 and the velocity, more than a launch takes
    t = torch.tensor([0.0, 0.3, 0.6, 0.9, 0.999, 0.995], dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 0, 1, 2])
    net = torch.nn.Linear(2, 2).double()
    fm = FlowMap(lambda x, t, **_: net(x) + t[:, None, None], prediction="velocity", interpolant=path)
    options = {"candidates": more} if source == "given" else {}
    if source == "label":
        options = {"label": "label", "condition": {"label": label}}
    ours = posterior_augmented(fm, x1, x0=x0, times=lambda x: t, temperature=temperature, **options)
    found = torch.autograd.grad(ours.mean(), list(net.parameters()))

    sets = {
        "given": [[x1[i], *more[:, i]] for i in range(6)],
        "batch": [list(x1) for _ in range(6)],
        "label": [[x1[j] for j in range(6) if label[i] == label[j]] for i in range(6)],
    }
    target, effective = specification(path, x1, x0, t, sets[source], temperature)
    a, s = (f(t)[:, None, None] for f in (path.alpha, path.sigma))
    error = (net(a * x1 + s * x0) + t[:, None, None] - target).square()
    torch.testing.assert_close(ours.per_sample, error.mean((1, 2)), rtol=1e-9, atol=1e-11)
    assert float(ours.parts["effective_samples"]) == pytest.approx(effective, rel=1e-9)
    for ours_, plain in zip(found, torch.autograd.grad(error.mean(), list(net.parameters()))):
        torch.testing.assert_close(ours_, plain, rtol=1e-9, atol=1e-11)


def test_near_the_data_in_float32():
    """What is subtracted is nearly equal there: the target must still be the float64 one, and finite at the end."""
    torch.manual_seed(0)
    base = torch.randn(1, 256)
    x1 = base + 0.01 * torch.randn(8, 256)  # close together: the weights are not one-hot
    x0, t = torch.randn(8, 256), torch.tensor([0.5, 0.9, 0.97, 0.985, 0.9899, 0.995, 1.0 - 6e-8, 1.0])
    zero = FlowMap(lambda x, t: 0.0 * x, prediction="velocity")
    expected, effective = specification(
        Linear(), x1.double(), x0.double(), t.double(), [list(x1.double()) for _ in range(8)], 1.0
    )
    assert effective > 2.0
    for options in ({}, {"candidates": torch.stack([x1.roll(k, 0) for k in range(1, 8)])}):
        loss = posterior_augmented(zero, x1, x0=x0, times=lambda x: t, **options)
        torch.testing.assert_close(loss.per_sample.double(), expected.square().mean(1), rtol=2e-3, atol=0.0)


def test_given_candidates_no_bias_and_less_variance():
    torch.manual_seed(1)
    rows = 80_000
    x1, more = normal(rows, 1), normal(3, rows, 1)

    def loss_of(theta, objective=posterior_augmented, **options):
        def network(x, t):
            return ORACLE.velocity(x, t[:, None]) + theta[:, None] * feature(x, t)

        return objective(FlowMap(network, prediction="velocity"), x1, **TIMES, **options)

    gradient = row_gradients(lambda theta: loss_of(theta, candidates=more), rows)
    plain = row_gradients(lambda theta: loss_of(theta, flow_matching), rows)
    assert sigmas(gradient) < 4.0 and sigmas(plain) < 4.0
    assert gradient.var() < 0.6 * plain.var()
    zero = torch.zeros(rows, dtype=torch.float64)
    assert loss_of(zero, candidates=more).mean() < 0.6 * loss_of(zero, flow_matching).mean()
    assert sigmas(row_gradients(lambda theta: loss_of(theta, candidates=more, temperature=10.0), rows)) > 8.0
    near = 0.8 * x1 + 0.1 * torch.randn(3, rows, 1, dtype=torch.float64)  # augmented: no draws from the data
    assert sigmas(row_gradients(lambda theta: loss_of(theta, candidates=near), rows)) > 8.0


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_rows_of_the_batch_no_bias(path):
    """Two classes of different means; candidates of the other class would be wrong. Batches are independent values."""
    classes = Gaussian(m=torch.tensor([-1.0, 1.5], dtype=torch.float64))
    values = {"label": [], "across": []}
    torch.manual_seed(3)
    for _ in range(600):
        label = torch.randint(2, (32,))
        oracle = Gaussian(m=classes.m[label][:, None])
        x1 = oracle.m + oracle.S * torch.randn(32, 1, dtype=torch.float64)
        for name, options in (("label", {"condition": {"label": label}, "label": "label"}), ("across", {})):

            def loss_of(theta, oracle=oracle, x1=x1, options=options):
                def network(x, t, label=None):
                    # D - eps weights of the path: v = a' D + s' eps with eps = (x - a D)/s
                    a, s, da, ds = (
                        f(t)[:, None] for f in (path.alpha, path.sigma, path.alpha_derivative, path.sigma_derivative)
                    )
                    D = oracle.m + a * oracle.S**2 / (s**2 + (a * oracle.S) ** 2) * (x - a * oracle.m)
                    return da * D + ds * (x - a * D) / s + theta[:, None] * feature(x, t)

                fm = FlowMap(network, prediction="velocity", interpolant=path)
                return posterior_augmented(fm, x1, **TIMES, **options)

            weight = 2.0 * label.double() - 1.0  # what crossing over would do has opposite signs in the two classes
            values[name].append((row_gradients(loss_of, 32) * weight).mean())
    assert sigmas(torch.stack(values["label"])) < 4.0
    assert sigmas(torch.stack(values["across"])) > 8.0


def test_a_rows_time_and_noise_are_its_own():
    """Candidates are the batch's, so a row's loss is; given candidates, it depends on (seed, sample id) alone."""
    fm = FlowMap(lambda x, t: torch.sin(x), prediction="velocity")
    x1, more, ids = torch.randn(8, 3), torch.randn(2, 8, 3), torch.tensor([5, 0, 2])
    whole = posterior_augmented(fm, x1, candidates=more, seed=4).per_sample
    part = posterior_augmented(fm, x1[ids], candidates=more[:, ids], seed=4, sample_ids=ids).per_sample
    torch.testing.assert_close(part, whole[ids])
    order = torch.randperm(8)
    whole = posterior_augmented(fm, x1, seed=4).per_sample
    torch.testing.assert_close(posterior_augmented(fm, x1[order], seed=4, sample_ids=order).per_sample, whole[order])


def test_far_apart_it_is_flow_matching():
    fm, x1 = FlowMap(lambda x, t: torch.sin(x), prediction="velocity"), 1e4 * torch.randn(8, 64)
    loss = posterior_augmented(fm, x1, times=lambda x, seed: torch.full((8,), 0.5), seed=1)
    plain = flow_matching(fm, x1, times=lambda x, seed: torch.full((8,), 0.5), seed=1)
    torch.testing.assert_close(loss.per_sample, plain.per_sample)
    assert math.isclose(float(loss.parts["effective_samples"]), 1.0)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (1, {}, "batch of one row"),
        (4, {"candidates": torch.zeros(4, 3)}, r"candidates \(4, 3\)"),
        (4, {"candidates": torch.zeros(0, 4, 3)}, r"candidates \(0, 4, 3\)"),
        (4, {"candidates": torch.zeros(2, 4, 3), "label": "y"}, "give one"),
        (4, {"condition": {"y": torch.arange(4)}}, "condition 'y' differs from row to row"),
        (4, {"condition": {"y": torch.arange(4)}, "label": "z"}, r"label = 'z' but the condition has \['y'\]"),
        (4, {"temperature": 0.0}, "temperature = 0.0"),
        (4, {"sigma_floor": 0.0}, "sigma_floor = 0.0"),
    ],
)
def test_bad_options(rows, options, words):
    with pytest.raises(ValueError, match=words):
        posterior_augmented(FlowMap(lambda x, t, **_: x, prediction="velocity"), torch.zeros(rows, 3), **options)
