"""Ancestral, Euler-Maruyama, churn and restart: golden numbers, the formulas in S, marginals, limits, noise, errors."""

import math

import pytest
import torch
from oracles import Gaussian, Mixture, slope

from pyflowmap import FlowMap, evaluate, lazy, noise, sample, solvers
from pyflowmap.interpolants import Trigonometric
from pyflowmap.solvers import driver
from pyflowmap.solvers.restart import churned_time, karras_levels, renoise_coefficients
from pyflowmap.solvers.stochastic import DIFFUSIONS, ancestral_coefficients, euler_maruyama_coefficients

ORACLE = Gaussian()
X = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64).reshape(4, 6)
# Those that draw noise whatever their options; SDE-DPM-Solver++ has tests of its own.
STOCHASTIC = ["ancestral", "euler_maruyama", "edm_heun_churn", "restart", "consistency", "ctm_gamma"]
RESTART = solvers.restart.using(intervals=((0.05, 0.5), (0.5, 2.0)), repeats=2, inner=(8, 4))


def uniform(n):
    return [k / n for k in range(n + 1)]


def z(x, stream=1, seed=5):
    return evaluate(noise(x, seed=seed, stream=stream))


def one_step(solver, s, t, x=X):
    return solvers.integrate(solver, lambda a, x, t: lazy(Mixture().velocity(a, t)), x, [s, t], seed=5)


# ---- golden numbers of the specification, D.2: from 0.3 to 0.5 -----------------------------------------------------


def test_golden_ancestral():
    a, c, n = ancestral_coefficients(0.3, 0.5, 1.0)
    up, down = 0.9035079029, 0.4285714286
    assert (a, c, n) == pytest.approx((0.5 * (1 + down), 0.5 * (0.7 - 0.3 * down), 0.5 * up), abs=1e-10)


def test_golden_churn():
    gamma = min(40 / 18, math.sqrt(2) - 1)
    there = churned_time(0.3, gamma)
    assert (gamma, there) == pytest.approx((0.4142135624, 0.2325672451), abs=1e-10)
    assert renoise_coefficients(0.3, there) == pytest.approx((0.7752241502, 0.5426569051), abs=1e-10)


def test_golden_renoise():
    assert renoise_coefficients(0.8, 0.5) == pytest.approx((0.625, 0.4841229183), abs=1e-10)
    assert renoise_coefficients(1.0, 0.25) == (0.25, 0.75)
    assert renoise_coefficients(0.4, 0.0) == (0.0, 1.0)


def test_golden_euler_maruyama():
    h = 0.2  # w = 1-t: A = 1-h, B = h(1+t), C = sqrt(2(1-t)h)
    expected = (1 - h, h * 1.3, math.sqrt(2 * 0.7 * h))
    assert euler_maruyama_coefficients(0.3, 0.5, "linear", 1.0) == pytest.approx(expected, abs=1e-15)


# ---- one step against the formula as it is published ---------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7])
def test_an_ancestral_step_in_noise_levels(eta):
    s, t = 0.3, 0.5
    S, S1 = (1 - s) / s, (1 - t) / t
    up = min(S1, eta * math.sqrt(S1**2 * (S**2 - S1**2) / S**2))
    data = Mixture().data(X, s)
    eps = (X / s - data) / S
    expected = t * (data + math.sqrt(S1**2 - up**2) * eps + up * z(X))
    torch.testing.assert_close(one_step(solvers.ancestral.using(eta=eta), s, t), expected, rtol=1e-12, atol=1e-12)


W = {
    "linear": lambda t, c: c * (1 - t),
    "constant": lambda t, c: c,
    "sbdm": lambda t, c: c * (1 - t) / t,
    "decreasing": lambda t, c: 0.25 * (c * math.cos(math.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda t, c: c * math.sin(math.pi * t) ** 2,
}


@pytest.mark.parametrize("diffusion", W)
def test_a_step_of_euler_maruyama(diffusion):
    s, t, c = 0.3, 0.5, 0.8
    w, b = W[diffusion](s, c), Mixture().velocity(X, s)
    score = (s * b - X) / (1 - s)
    expected = X + (t - s) * (b + w * score) + math.sqrt(2 * w * (t - s)) * z(X)
    solver = solvers.euler_maruyama.using(diffusion=diffusion, scale=c)
    torch.testing.assert_close(one_step(solver, s, t), expected, rtol=1e-12, atol=1e-12)
    assert set(W) == set(DIFFUSIONS)


def heun_in_levels(y, S, S1):
    eps = lambda y, S: (y - Mixture().data(y / (1 + S), 1 / (1 + S))) / S  # noqa: E731
    d = eps(y, S)
    return y + (S1 - S) * (d + eps(y + (S1 - S) * d, S1)) / 2 if S1 else y + (S1 - S) * d


def test_churn_as_published():
    """Algorithm 2 of EDM in y = x/t and S, written out."""
    grid = [0.3, 0.5, 0.9, 1.0]
    gamma, y, stream = min(0.6 / 3, math.sqrt(2) - 1), X / 0.3, 0
    for s, t in zip(grid, grid[1:]):
        S, S1 = (1 - s) / s, (1 - t) / t
        if 0.2 <= S <= 50:
            stream += 1
            S, before = S * (1 + gamma), S
            y = y + math.sqrt(S**2 - before**2) * 1.1 * z(X, stream)
        y = heun_in_levels(y, S, S1)
    assert stream == 2  # at 0.9 the level, 0.11, lies below s_min
    field = lambda a, x, t: lazy(Mixture().velocity(a, t))  # noqa: E731
    solver = solvers.edm_heun_churn.using(churn=0.6, s_min=0.2, s_noise=1.1)
    torch.testing.assert_close(solvers.integrate(solver, field, X, grid, seed=5), y, rtol=1e-11, atol=1e-11)


def test_restart_as_published():
    """Down to S = 0.25, back to S = 1 twice, three Heun steps down again each time, then on."""
    grid = [0.3, 0.5, 0.9, 1.0]
    y = heun_in_levels(X / 0.3, 7 / 3, 1.0)
    y = heun_in_levels(y, 1.0, 0.25)  # 0.8 is no time of the grid: it is inserted
    for stream in (1, 2):
        y = y + math.sqrt(1.0 - 0.25**2) * 1.1 * z(X, stream)
        levels = [(1 + j / 3 * (0.25 ** (1 / 7) - 1)) ** 7 for j in range(4)]
        for S, S1 in zip(levels, levels[1:]):
            y = heun_in_levels(y, S, S1)
    y = heun_in_levels(heun_in_levels(y, 0.25, 0.1 / 0.9), 0.1 / 0.9, 0.0)
    field = lambda a, x, t: lazy(Mixture().velocity(a, t))  # noqa: E731
    solver = solvers.restart.using(intervals=((0.25, 1.0),), repeats=2, inner=3, s_noise=1.1)
    torch.testing.assert_close(solvers.integrate(solver, field, X, grid, seed=5), y, rtol=1e-11, atol=1e-11)


def test_the_times_that_restart_visits():
    visits = solvers.restart.using(intervals=((0.25, 1.0),), repeats=2, inner=1).visits([0.0, 0.5, 0.8, 1.0])
    assert visits == pytest.approx([0.0, 0.5, 0.8, 0.5, 0.8, 0.5, 0.8, 1.0])
    assert karras_levels(1.0, 0.25, 2)[1] == pytest.approx(((1 + 0.25 ** (1 / 7)) / 2) ** 7)
    two = solvers.restart.using(intervals=((0.25, 1.0), (1.0, 4.0)), repeats=(1, 2), inner=1)
    assert two.visits([0.0, 1.0]) == pytest.approx([0.0, 0.5, 0.2, 0.5, 0.2, 0.5, 0.8, 0.5, 0.8, 1.0])
    whole = solvers.restart.using(intervals=((0.0, 1.0),), inner=2).visits([0.0, 1.0])
    assert whole == pytest.approx([0.0, 1.0, 0.5, 1 / (1 + 0.5**7), 1.0])


def test_the_last_step_of_euler_maruyama():
    visits = solvers.euler_maruyama.visits
    assert visits(uniform(4)) == pytest.approx([0.0, 0.32, 0.64, 0.96, 1.0])  # linspace(1, 0.04, 4) and 0
    assert visits([0.0, 1.0]) == [0.0, 1.0] and visits([0.0, 0.2, 0.5]) == [0.0, 0.2, 0.5]
    assert visits([0.97, 0.98, 1.0]) == [0.97, 0.98, 1.0]
    assert solvers.euler_maruyama.using(final=None).visits(uniform(4)) == uniform(4)
    w, b = 0.04, Mixture().velocity(X, 0.96)
    mean = X + 0.04 * (b + w * (0.96 * b - X) / 0.04)
    torch.testing.assert_close(one_step(solvers.euler_maruyama, 0.96, 1.0), mean, rtol=1e-12, atol=1e-12)
    noisy = one_step(solvers.euler_maruyama.using(final=None), 0.96, 1.0)
    torch.testing.assert_close(noisy, mean + math.sqrt(2 * w * 0.04) * z(X), rtol=1e-12, atol=1e-12)


# ---- marginals -----------------------------------------------------------------------------------------------------


def weights(power):
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (Mixture.W, Mixture.M, Mixture.S))
    return float((w * {1: m, 2: m**2 + s**2, 4: m**4 + 6 * m**2 * s**2 + 3 * s**4}[power]).sum())


DATA = FlowMap(lambda x, s: Mixture().data(x, float(s[0])), prediction="data")
MOMENTS = [  # solver, steps: where the bias of the second moment is below two sigma of the 20,480 elements drawn
    *[(solvers.ancestral.using(eta=eta), 400) for eta in (0.5, 1.0)],
    *[(solvers.euler_maruyama.using(diffusion=name, final=None), 400) for name in DIFFUSIONS],
    (solvers.euler_maruyama.using(final=0.01), 400),
    (solvers.edm_heun_churn, 160),
    (RESTART, 40),
]


@pytest.mark.parametrize(("solver", "steps"), MOMENTS, ids=lambda each: getattr(each, "name", each))
def test_moments_of_the_mixture(solver, steps):
    x0 = evaluate(noise(torch.empty(16, 1280, dtype=torch.float64), seed=3))
    x1 = sample(DATA, x0, steps, solver=solver, seed=4)
    n, m1, m2, m4 = x1.numel(), *map(weights, (1, 2, 4))
    assert abs(float(x1.mean()) - m1) < 4 * math.sqrt((m2 - m1**2) / n)
    assert abs(float(x1.square().mean()) - m2) < 4 * math.sqrt((m4 - m2**2) / n)


COEFFICIENTS = {
    **{f"ancestral {eta}": lambda s, t, eta=eta: ancestral_coefficients(s, t, eta) for eta in (0.3, 1.0)},
    **{name: lambda s, t, name=name: euler_maruyama_coefficients(s, t, name, 0.8) for name in DIFFUSIONS},
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_variance_converges_with_order_one(name):
    """For Gaussian data a step is linear in x, so the law after N steps is known without drawing anything."""
    steps, errors = [100, 200, 400, 800], []
    for n in steps:
        mean, variance = 0.0, 1.0
        for s, t in zip(uniform(n), uniform(n)[1:]):
            a, c, deviation = COEFFICIENTS[name](s, t)
            gain = (s * ORACLE.S**2 - (1 - s)) / ORACLE.sd(s) ** 2  # b = m + (x - s m) gain
            mean = (a + c * gain) * mean + c * ORACLE.m * (1 - s * gain)
            variance = (a + c * gain) ** 2 * variance + deviation**2
        assert mean == pytest.approx(ORACLE.m, abs=1e-12)
        errors.append(abs(variance - ORACLE.S**2))
    assert errors[-1] < 3e-3 and slope([1 / n for n in steps], errors) > 0.9


# ---- limits --------------------------------------------------------------------------------------------------------


def test_without_noise_they_are_the_deterministic_ones():
    field = lambda x, t: Mixture().velocity(x, t)  # noqa: E731
    grid = [0.0, 0.1, 0.35, 0.8, 0.99]
    euler = solvers.euler(field, X, grid)
    assert torch.equal(solvers.ancestral(field, X, grid, eta=0.0), euler)
    assert torch.equal(solvers.euler_maruyama(field, X, grid, scale=0.0), euler)
    churned = solvers.edm_heun_churn(field, X, grid, churn=0.0)
    torch.testing.assert_close(churned, solvers.restart(field, X, grid, intervals=()), rtol=0, atol=0)


def test_order_of_heun_in_noise_levels():
    start, errors = torch.tensor([[-2.0, 0.0, 1.0]], dtype=torch.float64), []
    end = torch.tensor([[-1.668721132631, 0.249653887895, 1.452106672171]], dtype=torch.float64)
    steps = [40, 80, 160, 320]
    for n in steps:
        grid = [0.05 + 0.9 * k / n for k in range(n + 1)]
        errors.append(float((solvers.edm_heun_churn(Mixture().velocity, start, grid, churn=0.0) - end).abs().max()))
    assert slope([1 / n for n in steps], errors) == pytest.approx(2.0, abs=0.2)


def test_coefficients_are_finite_and_small_next_to_the_ends():
    for s, t in ((0.0, 1.0), (0.0, 1e-12), (1e-300, 1e-3), (0.5, 1.0), (1 - 1e-12, 1.0), (0.5, 1 - 1e-15)):
        a, c, n = ancestral_coefficients(s, t, 1.0)
        assert all(map(math.isfinite, (a, c, n))) and 0 <= n <= 1 and abs(a) <= 1 and abs(c) <= 1
        for name in DIFFUSIONS:
            if name != "sbdm" or s == 0.0 or s > 0.1:
                assert all(math.isfinite(each) for each in euler_maruyama_coefficients(s, t, name, 1.0))
    assert ancestral_coefficients(0.0, 0.25, 1.0) == pytest.approx((0.25, 0.25, 0.75))  # t D + (1-t) z, D = x + b
    assert ancestral_coefficients(0.5, 1.0, 1.0) == (1.0, 0.5, 0.0)  # D
    assert euler_maruyama_coefficients(0.0, 0.25, "sbdm", 1.0) == (1.0, 0.25, 0.0)


NETWORKS = {
    "velocity": FlowMap(lambda x, s: ORACLE.velocity(x, s.to(x).reshape(-1, 1)), prediction="velocity"),
    "data": FlowMap(lambda x, s: ORACLE.data(x, s.to(x).reshape(-1, 1)), prediction="data"),
}
SOLVERS = [
    *[solvers.named[name] for name in STOCHASTIC],
    *[solvers.euler_maruyama.using(diffusion=name) for name in DIFFUSIONS],
    RESTART,
]


@pytest.mark.parametrize("prediction", NETWORKS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_from_noise_to_data_is_finite(solver, prediction, dtype):
    x0 = torch.randn(3, 5, dtype=dtype)
    for steps in (1, 2, 9) if solver.name != "restart" else (9,):
        x1 = sample(NETWORKS[prediction], x0, steps, solver=solver, seed=0)
        assert x1.isfinite().all() and x1.dtype == dtype
    assert not torch.equal(x1, sample(NETWORKS[prediction], x0, 9, solver=solver, seed=1))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: each.name)
def test_another_path_is_the_linear_one(solver):
    path, r = Trigonometric(), [0.0, 0.2, 0.4, 0.5, 0.8, 0.9, 1.0]
    t = [path.linear_time(each) for each in r]
    fm = FlowMap(
        lambda x, r: ORACLE.data(x / path.scale(float(r[0])), path.linear_time(float(r[0]))), "data", interpolant=path
    )
    expected = sample(NETWORKS["data"], X, grid=t, solver=solver, seed=5)
    torch.testing.assert_close(sample(fm, X, grid=r, solver=solver, seed=5), expected, rtol=1e-5, atol=1e-5)


# ---- noise and the driver ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: each.name)
@pytest.mark.parametrize("grad", [False, True, "checkpoint"])
def test_noise_depends_on_seed_and_sample_alone(solver, grad):
    flow, ids = NETWORKS["velocity"], torch.tensor([6, 0, 3])
    whole = sample(flow, (8, 5), 5, seed=3, solver=solver, grad=grad)
    assert torch.equal(sample(flow, (3, 5), 5, seed=3, sample_ids=ids, solver=solver), whole[ids])
    assert not torch.equal(whole, sample(flow, (8, 5), 5, seed=4, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: each.name)
def test_gradients_are_those_of_the_same_path(solver):
    """dx1/dw by backward, recomputed or not, is the difference quotient of runs with the same noise."""

    def run(w, grad):
        fm = FlowMap(lambda x, s: torch.tanh(w * x), prediction="velocity")
        return sample(fm, X, 5, solver=solver, grad=grad, seed=1).square().sum()

    grads = []
    for grad in (True, "checkpoint"):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        run(w, grad).backward()
        grads.append(float(w.grad))
    assert grads[0] == pytest.approx(grads[1], rel=1e-14)
    low, high = (float(run(torch.tensor(0.7 + d, dtype=torch.float64), False)) for d in (-1e-5, 1e-5))
    assert grads[0] == pytest.approx((high - low) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: each.name)
def test_one_launch_for_each_evaluation(solver, monkeypatch):
    launches, calls, steps = [], [], 9
    monkeypatch.setattr(driver, "evaluate", lambda *c, **k: launches.append(len(c)) or evaluate(*c, **k))
    fm = FlowMap(lambda x, s: calls.append(1) or 0.1 * x, prediction="velocity")
    sample(fm, torch.randn(3, 5), steps, solver=solver, seed=0)
    visits = solver.visits(uniform(steps))
    back = sum(t < s for s, t in zip(visits, visits[1:]))  # jumps towards noise: a launch, no evaluation
    assert len(launches) == len(calls) + back
    expected = solver.nfe * (len(visits) - 1 - back)
    assert len(calls) == expected - (solver.name in ("edm_heun_churn", "restart"))  # their last step is Euler's
    assert (back > 0) == (solver.name in ("edm_heun_churn", "restart"))


# ---- errors --------------------------------------------------------------------------------------------------------

FALLING = [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *[
            (lambda name=name: sample(NETWORKS["velocity"], X, grid=FALLING, solver=name), f"{name} draws noise.*rises")
            for name in STOCHASTIC
        ],
        (lambda: solvers.ancestral.using(eta=-0.1), "eta = -0.1"),
        (lambda: solvers.ancestral.using(eta=math.nan), "eta = nan"),
        (lambda: solvers.euler_maruyama.using(diffusion="cosine"), "'cosine'; it is one of linear, constant"),
        (lambda: solvers.euler_maruyama.using(scale=-1.0), "scale = -1"),
        (lambda: solvers.euler_maruyama.using(final=1.0), "final = 1.0"),
        (lambda: solvers.edm_heun_churn.using(churn=-1.0), "churn = -1"),
        (lambda: solvers.edm_heun_churn.using(s_min=2.0, s_max=1.0), "s_min = 2.0, s_max = 1.0"),
        (lambda: solvers.edm_heun_churn.using(s_noise=-1.0), "s_noise = -1"),
        (lambda: solvers.restart.using(intervals=((1.0, 0.1),)), r"interval \(1.0, 0.1\)"),
        (lambda: solvers.restart.using(intervals=(0.1, 1.0)), "interval 0.1; it is"),
        (lambda: solvers.restart.using(inner=2.5), "inner = 2.5"),
        (lambda: solvers.restart.using(repeats=0), "repeats = 0"),
        (lambda: solvers.restart.using(inner=(2, 3)), r"inner = \(2, 3\)"),
        (lambda: one_step(solvers.restart, 0.1, 0.5), r"\(0.01, 1\) leaves the grid, .* are 1 to 9"),
        (lambda: solvers.restart.steps_for(40), "restart visits more times than its grid has"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
