"""Jumps with noise put back: multistep consistency and CTM's gamma sampling against an exact flow map."""

import math

import pytest
import torch
from oracles import Gaussian

from pyflowmap import FlowMap, evaluate, lazy, noise, sample, solvers
from pyflowmap.interpolants import Trigonometric
from pyflowmap.solvers.flow_map import ctm_coefficients

ORACLE = Gaussian()
FLOW = FlowMap(ORACLE.mean_velocity)
X = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64).reshape(4, 6)
JUMPS = [
    solvers.consistency,
    *[solvers.ctm_gamma.using(gamma=gamma) for gamma in (0.3, 0.8, 1.0)],
    *[solvers.ctm_gamma.using(gamma=gamma, published=True) for gamma in (0.5, 1.0)],
]


def name_of(each):
    return each.name + "".join(f" {value}" for value in each.options.values())


def z(x, stream=1):
    return evaluate(noise(x, seed=5, stream=stream))


def test_golden_numbers():  # the specification, D.2, to t = 0.5
    assert ctm_coefficients(0.3, 0.5, 0.5, False) == pytest.approx((0.5358983849, 0.9330127019, 0.25), abs=1e-10)
    assert ctm_coefficients(0.3, 0.5, 1.0, False) == (1.0, 0.5, 0.5)
    for published in (False, True):
        assert ctm_coefficients(0.3, 1.0, 0.5, published) == (1.0, 1.0, 0.0)
        assert ctm_coefficients(0.0, 1e-9, 1.0, published)[1:] == pytest.approx((0.0, 1.0), abs=1e-8)


@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("t", [1e-6, 0.4, 0.9, 0.9985])
def test_the_noise_level_afterwards_is_that_of_the_grid(gamma, published, t):
    between, scale, deviation = ctm_coefficients(0.0, t, gamma, published)
    assert t <= between <= 1.0 and scale * between == pytest.approx(t, rel=1e-12)
    assert (scale * (1 - between)) ** 2 + deviation**2 == pytest.approx((1 - t) ** 2, rel=1e-12)
    S = (1 - t) / t  # the authors' code, in S: std = sqrt(S_t^2 - s^2)
    if published and S > 0.002:
        s = math.sqrt(1 - gamma**2) * (S - 0.002) + 0.002
        assert (1 - between) / between == pytest.approx(s, rel=1e-6)
        assert deviation == pytest.approx(t * math.sqrt(S**2 - s**2), rel=1e-6)
    elif published:
        assert (between, scale, deviation) == (t, 1.0, 0.0)


def test_steps_by_hand():
    field = lambda a, x, s, t: lazy(ORACLE.jump(a, s, t))  # noqa: E731
    run = lambda solver: solvers.integrate(solver, field, X, [0.2, 0.5, 1.0], seed=5)  # noqa: E731
    there = 0.5 * ORACLE.jump(X, 0.2, 1.0) + 0.5 * z(X)
    torch.testing.assert_close(run(solvers.consistency), ORACLE.jump(there, 0.5, 1.0), rtol=1e-12, atol=1e-12)
    level = math.sqrt(1 - 0.6**2) * 1.0  # S at t = 0.5 is 1
    y = ORACLE.jump(X, 0.2, 1 / (1 + level)) * (1 + level) + 0.6 * z(X)
    expected = ORACLE.jump(0.5 * y, 0.5, 1.0)
    torch.testing.assert_close(run(solvers.ctm_gamma.using(gamma=0.6)), expected, rtol=1e-12, atol=1e-12)


def test_the_ends_of_gamma():
    for steps in (1, 3):
        same = sample(FLOW, X, steps, solver=solvers.ctm_gamma.using(gamma=0.0), seed=2)
        assert torch.equal(same, sample(FLOW, X, steps))
        one = sample(FLOW, X, steps, solver=solvers.ctm_gamma.using(gamma=1.0), seed=2)
        assert torch.equal(one, sample(FLOW, X, steps, solver="consistency", seed=2))


@pytest.mark.parametrize("solver", JUMPS, ids=name_of)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_flow_map_gives_exact_moments_in_any_number_of_steps(solver, steps):
    x0 = evaluate(noise(torch.empty(32, 2048, dtype=torch.float64), seed=steps))
    states = sample(FLOW, x0, steps, solver=solver, seed=7, trajectory=True)
    n = x0.numel()
    for k, x in enumerate(states):  # every state, not the last alone
        deviation = ORACLE.sd(k / steps)
        assert abs(float(x.mean()) - k / steps * ORACLE.m) < 4 * deviation / math.sqrt(n)
        assert abs(float(x.var()) - deviation**2) < 4 * deviation**2 * math.sqrt(2 / n)
    if steps > 1:  # noise came in: the end is not the flow of the start
        assert float((states[-1] - ORACLE.jump(x0, 0.0, 1.0)).abs().mean()) > 0.02


def test_the_network_is_asked_for_the_jumps_of_the_paper():
    asked = []

    def network(x, s, t):
        asked.append((round(float(s[0]), 6), round(float(t[0]), 6)))
        return 0 * x

    sample(FlowMap(network), X, 2, solver="consistency", seed=0)
    assert asked == [(0.0, 1.0), (0.5, 1.0)]
    asked.clear()
    sample(FlowMap(network), X, 2, solver="ctm_gamma", seed=0)
    assert asked == [(0.0, 0.535898), (0.5, 1.0)]
    assert solvers.ctm_gamma.asks([0.3, 0.5]) == pytest.approx([0.3, 0.5, 0.5358983849])
    assert solvers.consistency.asks([0.3, 0.5]) == [0.3, 0.5, 1.0]


def test_on_another_path_the_data_is_the_same():
    path, grid = Trigonometric(), [0.0, 0.3, 0.7, 1.0]

    def network(x, r, q):  # the mean velocity of the same Gaussian on the trigonometric path
        a, b = path.linear_time(float(r[0])), path.linear_time(float(q[0]))
        there = ORACLE.jump(x / path.scale(float(r[0])), a, b) * path.scale(float(q[0]))
        return (there - x) / (q - r).double().reshape(-1, 1)

    linear = [path.linear_time(r) for r in grid]
    for solver in JUMPS:
        got = sample(FlowMap(network, interpolant=path), X, grid=grid, solver=solver, seed=5)
        torch.testing.assert_close(got, sample(FLOW, X, grid=linear, solver=solver, seed=5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_bad_gamma(gamma):
    with pytest.raises(ValueError, match=rf"gamma = {gamma}; it lies in \[0, 1\]"):
        solvers.ctm_gamma.using(gamma=gamma)
