"""Runge-Kutta steps: orders and errors, their relatives, what they do at an end without velocity."""

import pytest
import torch
from oracles import Gaussian
from solver_orders import GRIDS, endpoint_error, observed_order, times
from torchdiffeq import odeint

from pyflowmap import solvers
from pyflowmap.flow_map import FlowMap
from pyflowmap.sampling import sample

ORACLE = Gaussian()
BY_VELOCITY = FlowMap(lambda x, s: ORACLE.velocity(x, s.double().reshape(-1, 1)), prediction="velocity")
BY_DATA = FlowMap(lambda x, s: ORACLE.data(x, s.double().reshape(-1, 1)), prediction="data")
HALF = solvers.heun_alpha.using(alpha=0.5)
# solver -> order, errors at 20 and 160 steps of the uniform, shift and logit grids (from the specification)
CASES = {
    "euler": (1, 8.3e-2, 1.1e-2, 9.6e-2, 1.3e-2, 1.1e-1, 1.6e-2),
    "midpoint": (2, 6.6e-4, 9.4e-6, 2.2e-3, 3.5e-5, 1.8e-3, 2.8e-5),
    "heun": (2, 1.7e-3, 2.3e-5, 1.1e-2, 1.6e-4, 3.9e-3, 5.0e-5),
    "edm_heun": (2, 1.1e-2, 1.6e-4, 1.7e-2, 2.7e-4, 1.7e-2, 2.6e-4),
    "rk4": (4, 1.2e-6, 2.7e-10, 3.4e-5, 6.1e-9, 6.7e-6, 1.7e-9),
    "rk4_38": (4, None),
    "heun_alpha": (2, None),
}
SPENT = {"euler": 1, "midpoint": 2, "heun": 2, "heun_alpha": 2, "edm_heun": 2, "rk4": 4, "rk4_38": 4}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_order_of_convergence(name, grid):
    order = CASES[name][0]
    assert solvers.named[name].order == order
    assert observed_order(solvers.named[name], grid) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", [name for name, (_, *errors) in CASES.items() if errors[0] is not None])
def test_errors_of_the_specification(name):
    found = [endpoint_error(solvers.named[name], grid, n) for grid in ("uniform", "shift", "logit") for n in (20, 160)]
    for error, expected in zip(found, CASES[name][1:]):
        assert expected / 2 < error < expected * 2


@pytest.mark.parametrize("name", SPENT)
def test_evaluations_and_their_times(name):
    """Every time that is asked for was announced, as the same float: else a table of times would be made again."""
    asked = []
    grid = times("rough", 4)
    solvers.named[name](lambda x, t: asked.append(t) or -x, torch.ones(2, 1), grid)
    assert len(asked) == 4 * SPENT[name] == 4 * solvers.named[name].nfe
    assert set(asked) <= set(solvers.named[name].asks(grid))


@pytest.mark.parametrize(("name", "theirs"), [("rk4_38", "rk4"), ("midpoint", "midpoint"), ("euler", "euler")])
def test_torchdiffeq_agrees(name, theirs):
    x0, grid = torch.linspace(-2, 2, 30).reshape(10, 3), [0.0, 0.1, 0.3, 0.45, 0.8, 1.0]
    field = lambda t, x: torch.cos(3 * x + t) - t * x  # noqa: E731
    expected = odeint(field, x0, torch.tensor(grid), method=theirs)[-1]
    ours = solvers.named[name](lambda x, t: field(t, x), x0, grid)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_rk4_and_its_38_sibling_are_two_methods():
    values = [endpoint_error(solvers.named[name], "uniform", 4) for name in ("rk4", "rk4_38")]
    assert abs(values[0] - values[1]) > 1e-4 * values[0]


def test_the_alpha_family():
    """alpha = 1/2 is midpoint, 1 Heun, bit for bit up to the order of the sums; 2/3 is Ralston's."""
    x0, grid = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3), times("rough", 5)
    run = lambda solver: solver(lambda x, t: torch.cos(3 * x + t), x0, grid)  # noqa: E731
    torch.testing.assert_close(run(HALF), run(solvers.midpoint), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(run(solvers.heun_alpha.using(alpha=1.0)), run(solvers.heun), rtol=1e-13, atol=1e-13)
    x, (s, t) = torch.tensor([[0.3]], dtype=torch.float64), (0.2, 0.5)
    k1 = torch.cos(3 * x + s)
    k2 = torch.cos(3 * (x + 0.2 * k1) + s + 0.2)
    by_hand = x + 0.3 * (k1 / 4 + 3 * k2 / 4)
    found = solvers.heun_alpha(lambda x, t: torch.cos(3 * x + t), x, [s, t])
    torch.testing.assert_close(found, by_hand, rtol=1e-14, atol=1e-14)
    for alpha in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha = .*; it lies in \(0, 1\]"):
            solvers.heun_alpha.using(alpha=alpha)


def test_edm_heun_is_heun_in_the_noise_level():
    """Against Karras et al.'s algorithm itself, in y = x/t and S = (1-t)/t, with the Gaussian's denoiser."""
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    grid = [0.1, 0.25, 0.6, 0.7, 1.0]
    y, levels = x0 / grid[0], [(1 - t) / t for t in grid]
    denoise = lambda y, S: ORACLE.data(y / (1 + S), 1 / (1 + S))  # noqa: E731
    for S, lower in zip(levels, levels[1:]):
        d = (y - denoise(y, S)) / S
        euler = y + (lower - S) * d
        y = euler if lower == 0 else y + (lower - S) * (d + (euler - denoise(euler, lower)) / lower) / 2
    torch.testing.assert_close(solvers.edm_heun(ORACLE.velocity, x0, grid), y, rtol=1e-12, atol=1e-12)


def test_edm_heun_knows_one_path_only():
    with pytest.raises(ValueError, match=r"from t = 0.5 to 2; it works on the linear path"):
        solvers.edm_heun(lambda x, t: -x, torch.ones(1, 1), [0.5, 2.0])


@pytest.mark.parametrize("name", SPENT)
def test_backward_grids_invert(name):
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    solver, steps = solvers.named[name], 4000 if name == "euler" else 400
    grid = [k / steps for k in range(steps + 1)]
    if name == "edm_heun":  # its steps are those of the noise level, infinite at 0
        grid = [(k / steps) ** 2 for k in range(steps + 1)]
    there = solver(ORACLE.velocity, x0, grid)
    torch.testing.assert_close(there, ORACLE.jump(x0, 0.0, 1.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solver(ORACLE.velocity, there, grid[::-1]), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", [BY_VELOCITY, BY_DATA], ids=["velocity", "data"])
@pytest.mark.parametrize("name", SPENT)
@pytest.mark.parametrize("grad", [False, True])
def test_whole_runs_from_noise_to_data(name, model, grad):
    """The last step of a network that predicts data keeps off t = 1 and costs the run no order."""
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    out = [sample(model, x0, n, solver=name, grad=grad) for n in (1, 10, 20)]
    errors = [float((x - ORACLE.jump(x0, 0.0, 1.0)).abs().max()) for x in out]
    assert errors[2] < {1: 0.08, 2: 0.005, 4: 1e-6}[solvers.named[name].order]
    assert errors[0] < 2.0


@pytest.mark.parametrize("name", ["heun", "edm_heun", "rk4", "rk4_38"])
def test_an_end_without_velocity_costs_no_order(name):
    """Directly on [0.05, 1] in float64, where the port says that there is none at 1."""
    x0 = torch.linspace(-2, 2, 41, dtype=torch.float64)[None]
    exact, order = ORACLE.jump(x0, 0.05, 1.0), solvers.named[name].order
    port = solvers.Port(singular=frozenset({1.0}))

    def field(x, t):
        assert t != 1.0
        return ORACLE.velocity(x, t)

    errors = [
        float((solvers.named[name](field, x0, times("uniform", n, 0.05, 1.0), port=port) - exact).abs().max())
        for n in (80, 160)
    ]
    assert errors[0] / errors[1] > 2 ** (order - 0.5)
