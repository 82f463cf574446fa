"""`log_likelihood` against densities in closed form: Gaussians, mixtures; probes, orders, paths, gradients, errors."""

import math

import pytest
import torch
from oracles import Gaussian, Mixture, slope
from torch.distributions import Categorical, MixtureSameFamily, Normal

import pyflowmap as pfm
from pyflowmap import FlowMap, log_likelihood, solvers
from pyflowmap.interpolants import Trigonometric
from pyflowmap.likelihood import bits_per_dimension

ORACLE = Gaussian()
GAUSSIAN = FlowMap(ORACLE.mean_velocity)
X = torch.linspace(-0.8, 2.0, 15, dtype=torch.float64).reshape(5, 3)
W, M, S = (torch.tensor(v, dtype=torch.float64) for v in (Mixture.W, Mixture.M, Mixture.S))
MIXTURE = MixtureSameFamily(Categorical(W), Normal(M, S))
GRID = [0.995 * k / 40 for k in range(41)]  # the oracle's velocity is 0/0 at 1


def gaussian_density(x, t=1.0):
    return Normal(t * ORACLE.m, ORACLE.sd(t)).log_prob(x).flatten(1).sum(1)


def mixture_density(x, t):
    at = MixtureSameFamily(Categorical(W), Normal(t * M, ((t * S) ** 2 + (1 - t) ** 2).sqrt()))
    return at.log_prob(x).flatten(1).sum(1)


def mixture_network(x, s):
    """Of tensor operations that a Dual knows: the oracle's formula with the components first."""
    t, x = float(s[0]), x[None]
    w, m, sd = (v.reshape(-1, *[1] * (x.dim() - 1)) for v in (W, M, S))
    variance = (t * sd) ** 2 + (1 - t) ** 2
    share = torch.softmax(w.log() - 0.5 * variance.log() - (x - t * m) ** 2 / (2 * variance), 0)
    return (share * (m + t * sd**2 / variance * (x - t * m))).sum(0)


MIXED = FlowMap(mixture_network, prediction="data")
ROTATION = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
ROTATED = FlowMap(lambda x, s: mixture_network(x @ ROTATION, s) @ ROTATION.T, prediction="data")


@pytest.mark.parametrize("shape", [(5, 3), (5, 1, 3), (1, 15), (15, 1)])
def test_gaussian(shape):
    x = X.reshape(shape)
    expected = gaussian_density(x)
    for options in ({"exact": True}, {"seed": 3}, {"seed": 3, "probes": 2}):  # b is elementwise: signs are exact
        found = log_likelihood(GAUSSIAN, x, 100, **options)
        assert found.shape == (shape[0],) and found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_mixture_in_one_dimension():
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    found = log_likelihood(MIXED, x, grid=[0.995 * k / 300 for k in range(301)], exact=True)
    torch.testing.assert_close(found, mixture_density(x, 0.995), rtol=0, atol=5e-4)
    fine = torch.linspace(-5, 5, 2001, dtype=torch.float64)[:, None]
    density = log_likelihood(MIXED, fine, grid=GRID, exact=True).exp()
    assert float(torch.trapezoid(density, fine[:, 0])) == pytest.approx(1.0, abs=3e-3)


def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), (solvers.heun, 2), (ab2, 2)])
def test_the_order_is_the_solvers(solver, order):
    steps, errors = [40, 80, 160, 320], []
    for n in steps:
        grid = [0.995 * k / n for k in range(n + 1)]
        found = log_likelihood(ROTATED, X, grid=grid, solver=solver, exact=True)
        errors.append(float((found - mixture_density(X @ ROTATION, 0.995)).abs().max()))
    assert slope([1 / n for n in steps], errors) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_are_unbiased(distribution):
    """The same point 4,000 times: other probes each, one expectation. The Jacobian of ROTATED is full."""
    x = torch.tensor([[0.4, -1.0, 0.9]], dtype=torch.float64)
    options = {"grid": GRID, "distribution": distribution, "seed": 5}
    exact = float(log_likelihood(ROTATED, x, grid=GRID, exact=True))
    one, four = (log_likelihood(ROTATED, x.expand(4000, 3), probes=n, **options) for n in (1, 4))
    for found in (one, four):
        assert float(found.std()) > 0.01
        assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(4000)
    assert float(four.var() / one.var()) == pytest.approx(0.25, abs=0.05)


def test_probes_depend_on_seed_and_sample_alone():
    x = X.repeat(2, 1)[:8]
    whole = log_likelihood(ROTATED, x, grid=GRID, seed=3)
    ids = torch.tensor([6, 0, 3])
    assert torch.equal(log_likelihood(ROTATED, x[ids], grid=GRID, seed=3, sample_ids=ids), whole[ids])
    assert not torch.equal(log_likelihood(ROTATED, x, grid=GRID, seed=4), whole)
    assert not torch.equal(log_likelihood(ROTATED, x, grid=GRID), log_likelihood(ROTATED, x, grid=GRID))


def test_probes_are_not_the_noise_of_the_samples():
    like, seen = torch.empty(4, 64, dtype=torch.float64), []
    fm = FlowMap(lambda x, s: seen.append(x.tangent.clone()) or 0.0 * x, prediction="velocity")
    for n in (1, 3):
        log_likelihood(fm, like.zero_(), 1, solver="euler", probes=n, distribution="gaussian", seed=7)
    assert len(seen) == 4 and torch.equal(seen[0], seen[1])
    own = [pfm.evaluate(pfm.noise(like, seed=7, stream=k)) for k in range(6)]
    for a in seen[1:]:
        assert 0.8 < float(a.std()) < 1.2
        assert all(abs(float((a * b).mean())) < 0.25 for b in own)  # four sigma


def test_conditions_reach_the_network():
    label = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    x = torch.zeros(3, 4, dtype=torch.float64)
    fm = FlowMap(lambda x, s, label: label[:, None].expand_as(x), prediction="velocity")
    expected = Normal(0.0, 1.0).log_prob(label) * 4
    torch.testing.assert_close(log_likelihood(fm, x, 2, condition={"label": label}), expected)


def test_data_prediction_just_before_the_end():
    fm = FlowMap(lambda x, s: ORACLE.data(x, s.to(x).reshape(-1, 1)), prediction="data")
    found = log_likelihood(fm, X, grid=torch.linspace(0.0, 0.999, 201), exact=True)
    torch.testing.assert_close(found, gaussian_density(X, 0.999), rtol=1e-3, atol=1e-3)


def test_a_grid_that_stops_above_noise_takes_the_noises_share():
    grid = [0.005 + 0.995 * k / 200 for k in range(201)]
    found = log_likelihood(GAUSSIAN, X, grid=grid, exact=True)
    start = ORACLE.jump(X, 1.0, 0.005)
    stretch = X.shape[1] * math.log(ORACLE.sd(1.0) / ORACLE.sd(0.005))
    expected = Normal(0.0, 0.995).log_prob(start).sum(1) - stretch
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(log_likelihood(GAUSSIAN, X, grid=grid[::-1], exact=True), found)


@pytest.mark.parametrize("kind", ["velocity", "ddpm_v"])
def test_another_path_has_the_same_density(kind):
    path = Trigonometric()

    def network(x, r):
        r = r.to(x).reshape(-1, 1)
        t, x = path.linear_time(r), x / path.scale(r)
        b = ORACLE.velocity(x, t)
        data, eps = x + (1 - t) * b, x - t * b
        if kind == "velocity":
            return path.alpha_derivative(r) * data + path.sigma_derivative(r) * eps
        return path.alpha(r) * eps - path.sigma(r) * data

    fm = FlowMap(network, prediction=kind, interpolant=path)
    torch.testing.assert_close(log_likelihood(fm, X, 200, exact=True), gaussian_density(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", [True, "checkpoint"])
@pytest.mark.parametrize("options", [{"exact": True}, {"seed": 1}], ids=["exact", "probe"])
def test_gradients(grad, options):
    """Of data and of a parameter: the data is N(0, exp(2 w)), so d log p/dw = x^2/exp(2 w) - 1."""
    w = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()
    fm = FlowMap(lambda x, s: w * x, prediction="velocity")  # x_1 = exp(w) x_0
    log_likelihood(fm, x, 200, grad=grad, **options).sum().backward()
    torch.testing.assert_close(x.grad, -X * math.exp(0.6), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(w.grad), float((X**2 * math.exp(0.6) - 1).sum()), rtol=1e-4, atol=1e-4)
    assert not log_likelihood(fm, x, 2, **options).requires_grad


def test_float32_and_half_precision_networks():
    found = log_likelihood(GAUSSIAN, X.float(), 100, exact=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gaussian_density(X).float(), rtol=2e-3, atol=2e-3)
    layer = torch.nn.Linear(3, 3, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(-0.5 * torch.eye(3))
    fm = FlowMap(layer, prediction="velocity", call=lambda network, x, s, t, condition: network(x))
    found = log_likelihood(fm, X.float(), 100, exact=True)  # x_1 = exp(-1/2) x_0
    expected = Normal(0.0, math.exp(-0.5)).log_prob(X).sum(1).float()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert log_likelihood(GAUSSIAN, X[:0], 2).shape == (0,)


def test_the_shipped_network_prefers_digits_to_noise():
    fm = pfm.load("digits")
    label = torch.tensor([3, 3])
    digits = pfm.sample(fm, (2, 1, 28, 28), 4, condition={"label": label}, seed=0)
    other = digits.flatten(1).flip(1).roll(7, 1).reshape(digits.shape) + 0.5 * torch.randn(2, 1, 28, 28)
    found = [log_likelihood(fm, x, 4, condition={"label": label}, seed=0) for x in (digits, other)]
    assert bool((found[0] > found[1]).all()) and found[0].isfinite().all()


def test_bits_per_dimension():
    flat = torch.full((2,), -12 * math.log(256.0))  # uniform over [0, 256) in 12 dimensions
    torch.testing.assert_close(bits_per_dimension(flat, 12), torch.full((2,), 8.0))
    scaled = torch.full((2,), -12 * math.log(2.0))  # uniform over [-1, 1)
    torch.testing.assert_close(bits_per_dimension(scaled, 12, bin=2 / 256), torch.full((2,), 8.0))
    for bad in ({"dimensions": 0}, {"dimensions": 3, "bin": 0.0}, {"dimensions": 3, "bin": math.nan}):
        with pytest.raises(ValueError, match=r"dimensions = 0|bin = "):
            bits_per_dimension(flat, **bad)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: log_likelihood(lambda x: x, X), TypeError, "pfm.FlowMap"),
        (lambda: log_likelihood(GAUSSIAN, X.long()), TypeError, "int64.*x1.float"),
        (lambda: log_likelihood(GAUSSIAN, X[0]), TypeError, r"shape \(3,\)"),
        (lambda: log_likelihood(GAUSSIAN, [1.0]), TypeError, "list"),
        (lambda: log_likelihood(GAUSSIAN, X, solver="flow_map"), ValueError, '"flow_map" takes a jump'),
        (lambda: log_likelihood(GAUSSIAN, X, solver="ancestral"), ValueError, '"ancestral" draws noise'),
        (lambda: log_likelihood(GAUSSIAN, X, solver=solvers.restart), ValueError, '"restart" draws noise'),
        (lambda: log_likelihood(GAUSSIAN, X, solver="rk45"), ValueError, "'rk45'"),
        (lambda: log_likelihood(GAUSSIAN, X, grid=[0.0, 0.5]), ValueError, "t = 0.5, not the data end"),
        (lambda: log_likelihood(GAUSSIAN, X, grid=[0.5, 1.0]), ValueError, "t = 0.5, not the noise end"),
        (lambda: log_likelihood(GAUSSIAN, X, grid=[0.0, 1.5]), ValueError, "contains 1.5"),
        (lambda: log_likelihood(GAUSSIAN, X, 0), ValueError, "steps = 0"),
        (lambda: log_likelihood(MIXED, X), ValueError, 'prediction="data" has no velocity at t = 1'),
        (lambda: log_likelihood(GAUSSIAN, X, probes=0), ValueError, "probes = 0"),
        (lambda: log_likelihood(GAUSSIAN, X, probes=2, exact=True), ValueError, "exact=True draws no probes"),
        (lambda: log_likelihood(GAUSSIAN, X, seed=2, exact=True), ValueError, "exact=True draws no probes"),
        (lambda: log_likelihood(GAUSSIAN, X, distribution="normal"), ValueError, "'normal'; it is"),
        (lambda: log_likelihood(GAUSSIAN, X, condition={"y": torch.zeros(2)}), ValueError, "'y' has 2 rows"),
        (lambda: log_likelihood(GAUSSIAN, X, grad="yes"), ValueError, "grad = 'yes'"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
