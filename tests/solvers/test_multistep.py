"""Adams-Bashforth and DEIS: coefficients, orders, errors, starts, ends of the path, gradients."""

import cmath
import math

import pytest
import torch
from oracles import Gaussian
from scipy.integrate import quad
from solver_orders import GRIDS, endpoint_error, observed_order, times

from pyflowmap import solvers
from pyflowmap.algebra import evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.interpolants import Trigonometric
from pyflowmap.sampling import sample
from pyflowmap.solvers import adams_bashforth, deis

ORACLE = Gaussian()
# solver -> order, errors at 20 and 160 steps of the uniform, shift and logit grids (from the specification)
CASES = {
    "adams_bashforth_2": (2, 2.2e-3, 3.7e-5, 2.7e-2, 5.0e-4, 4.0e-3, 9.5e-5),
    "adams_bashforth_3": (3, 1.3e-3, 2.2e-6, 1.9e-2, 2.1e-5, 4.6e-3, 1.1e-5),
    "deis_2": (2, 7.4e-3, 1.4e-4, 1.8e-2, 3.6e-4, 1.6e-2, 2.7e-4),
    "deis_3": (3, 7.8e-4, 8.8e-7, 2.0e-2, 1.7e-5, 3.4e-3, 9.9e-6),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_order_of_convergence(name, grid):
    order = CASES[name][0]
    assert solvers.named[name].order == order
    assert observed_order(solvers.named[name], grid) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("name", "start"), [(name, "low") for name in CASES])
def test_a_low_start_leaves_order_two(name, start):
    found = observed_order(solvers.named[name].using(start=start), "uniform")
    assert found == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", CASES)
def test_errors_of_the_specification(name):
    found = [endpoint_error(solvers.named[name], grid, n) for grid in ("uniform", "shift", "logit") for n in (20, 160)]
    for error, expected in zip(found, CASES[name][1:]):
        assert expected / 2 < error < expected * 2


# ---- coefficients ------------------------------------------------------------------------------------------------


def test_coefficients_of_the_specification():
    """From t = 0.3 to 0.5 with history at 0.2 and 0.1, ten digits."""
    close = lambda found, unit, expected: [w / unit for w in found] == pytest.approx(expected, abs=6e-11)  # noqa: E731
    assert close(adams_bashforth.weights_2(0.2, 0.1), 0.2, [2.0, -1.0])
    assert close(adams_bashforth.weights_3(0.2, 0.1, 0.1), 0.2, [3.1666666667, -3.3333333333, 1.1666666667])
    assert close(deis.weights_2(0.3, 0.5, 0.2), 0.5, [-2.4415895710, 1.1082562377])
    assert close(deis.weights_3(0.3, 0.5, 0.2, 0.1), 0.5, [-3.6709489768, 3.5669750494, -1.2293594059])


def test_equal_steps_have_the_textbook_weights():
    assert adams_bashforth.weights_2(0.1, 0.1) == pytest.approx([0.15, -0.05], abs=1e-15)
    assert adams_bashforth.weights_3(1.0, 1.0, 1.0) == pytest.approx([23 / 12, -16 / 12, 5 / 12], abs=1e-15)


HISTORIES = [(0.3, 0.5, 0.2, 0.1), (0.3, 0.35, 0.29, 0.05), (0.9, 1.0, 0.5, 0.0), (0.5, 0.2, 0.7, 1.0)]


@pytest.mark.parametrize(("s", "t", "s1", "s2"), HISTORIES)
def test_weights_are_integrals_of_the_lagrange_basis(s, t, s1, s2):
    """Numerically, forward and backward: int L_j for Adams-Bashforth, t int -tau^-2 L_j for DEIS."""
    for nodes in ((s, s1), (s, s1, s2)):

        def basis(u, j, nodes=nodes):
            return math.prod((u - n) / (nodes[j] - n) for n in nodes if n != nodes[j])

        plain = [quad(basis, s, t, (j,), epsabs=1e-14)[0] for j in range(len(nodes))]
        weighted = [quad(lambda u, j: -t * basis(u, j) / u**2, s, t, (j,), epsabs=1e-14)[0] for j in range(len(nodes))]
        if len(nodes) == 2:
            found = adams_bashforth.weights_2(t - s, s - s1), deis.weights_2(s, t, s1)
        else:
            found = adams_bashforth.weights_3(t - s, s - s1, s1 - s2), deis.weights_3(s, t, s1, s2)
        assert found[0] == pytest.approx(plain, rel=1e-9, abs=1e-12)
        assert found[1] == pytest.approx(weighted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("h", [1e-2, 1e-4, 1e-6])
def test_short_steps_keep_their_digits(h):
    """The weights grow as the step shrinks and cancel in every sum over a polynomial; that sum keeps its digits."""
    s, t, s1, s2 = 0.4, 0.4 + h, 0.4 - h, 0.4 - 2 * h
    for found, count in ((deis.weights_2(s, t, s1), 2), (deis.weights_3(s, t, s1, s2), 3)):
        nodes = (s, s1, s2)[:count]
        for power in range(count):
            value = math.fsum(w * (n - s) ** power for w, n in zip(found, nodes))
            exact = t * quad(lambda u, p=power: -((u - s) ** p) / u**2, s, t, epsabs=0, epsrel=1e-13)[0]
            # relative to the first moment: what the higher ones add to the state
            assert value == pytest.approx(exact, rel=1e-6, abs=1e-13 * h)


def test_the_limit_at_the_noise_end():
    """A step back to t = 0 ends at the noise that the polynomial extrapolates to; nothing is 0/0."""
    assert deis.weights_2(0.2, 0.0, 0.3) == pytest.approx([3.0, -2.0], abs=1e-14)
    assert deis.weights_3(0.2, 0.0, 0.3, 0.4) == pytest.approx([6.0, -8.0, 3.0], abs=1e-13)


# ---- steps -------------------------------------------------------------------------------------------------------


def spent(name, steps, start):
    asked = []
    grid = times("rough", steps)
    solver = solvers.named[name].using(start=start)
    solver(lambda x, t: asked.append(t) or -x, torch.ones(2, 1), grid)
    assert set(asked) <= set(solver.asks(grid))
    return len(asked)


@pytest.mark.parametrize("name", CASES)
def test_evaluations(name):
    assert spent(name, 6, "low") == 6
    assert spent(name, 6, "full") == 6 + solvers.named[name].starting
    fm, calls = FlowMap(lambda x, s, t: calls.append(1) or 0 * x), []
    sample(fm, torch.zeros(1, 2), solver=name, nfe=12)
    assert len(calls) == 12
    with pytest.raises(ValueError, match="start = 'half'; it is"):
        solvers.named[name].using(start="half")


def test_adams_bashforth_is_exact_on_polynomials_in_time():
    """Order 2 integrates a velocity linear in t exactly, order 3 a quadratic one, on any grid."""
    x0 = torch.tensor([[0.5]], dtype=torch.float64)
    for name, power in (("adams_bashforth_2", 1), ("adams_bashforth_3", 2), ("adams_bashforth_3", 1)):
        out = solvers.named[name](lambda x, t, p=power: (p + 1) * t**p + 0 * x, x0, times("rough", 7, 0.0, 1.0))
        assert float(out) == pytest.approx(1.5, abs=1e-14)


@pytest.mark.parametrize(("name", "history"), [("deis_2", (0.3,)), ("deis_3", (0.3, 0.25))])
@pytest.mark.parametrize("t", [0.7, 1.0, 0.0])
def test_deis_is_exact_on_noise_polynomial_in_time(name, history, t):
    """eps = a + b t (+ c t^2) gives x = A t + a - b t log t - c t^2; one step with its history in place."""
    A, a, b, c = 0.4, 0.7, -1.3, 2.1 if len(history) == 2 else 0.0
    eps = lambda u: a + b * u + c * u * u  # noqa: E731
    exact = lambda u: A * u + a - (b * u * math.log(u) if u else 0.0) - c * u * u  # noqa: E731
    field = lambda value: lazy(torch.tensor([[value]], dtype=torch.float64))  # noqa: E731
    s, memory = 0.5, tuple(each for u in history for each in (field(eps(u)), u))
    step = solvers.named[name].step
    x_next, remembered = step(lambda x, u: field((exact(u) - eps(u)) / u), field(exact(s)), s, t, memory)
    assert float(evaluate(x_next)) == pytest.approx(exact(t), abs=1e-13)
    assert float(evaluate(remembered[0])) == pytest.approx(eps(s), abs=1e-14) and remembered[1] == s


@pytest.mark.parametrize("name", CASES)
def test_history_is_kept_not_copied(name, monkeypatch):
    from pyflowmap.solvers import driver

    written = []
    run = driver.evaluate
    monkeypatch.setattr(driver, "evaluate", lambda *c, **k: written.append(len(c)) or run(*c, **k))
    solvers.named[name](lambda x, t: -x, torch.randn(3, 4), times("uniform", 8))
    # Per step one launch: the state and the newest of the history; after the last step nothing is remembered.
    assert written[-4:] == [2, 2, 2, 1]


@pytest.mark.parametrize("start", ["full", "low"])
@pytest.mark.parametrize("kind", ["velocity", "data"])
@pytest.mark.parametrize("name", CASES)
def test_whole_runs_from_noise_to_data(name, kind, start):
    own = ORACLE.velocity if kind == "velocity" else ORACLE.data
    model = FlowMap(lambda x, s: own(x, s.double().reshape(-1, 1)), prediction=kind)
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    solver = solvers.named[name].using(start=start)
    one, two, out = (sample(model, x0, n, solver=solver) for n in (1, 2, 40))
    assert one.isfinite().all() and two.isfinite().all()
    torch.testing.assert_close(out, ORACLE.jump(x0, 0.0, 1.0), rtol=0, atol=5e-3)
    recorded = [sample(model, x0, 40, solver=solver, grad=grad) for grad in (True, "checkpoint")]
    for each in recorded:
        torch.testing.assert_close(each, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_another_path_is_the_linear_one(name):
    """The history lies on the linear path, whatever the model's: here x_r = sin(pi r/2) x1 + cos(pi r/2) x0."""
    path = Trigonometric()
    model = FlowMap(
        lambda x, r: ORACLE.data(x / path.scale(r.double())[:, None], path.linear_time(r.double())[:, None]),
        prediction="data",
        interpolant=path,
    )
    x, r = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3), [0.1, 0.2, 0.35, 0.6, 0.7, 0.9]
    grid = [path.linear_time(each) for each in r]
    expected = solvers.named[name](ORACLE.velocity, x / path.scale(r[0]), grid) * path.scale(r[-1])
    torch.testing.assert_close(sample(model, x, grid=r, solver=name), expected, rtol=2e-5, atol=2e-5)  # float32 times


@pytest.mark.parametrize("name", ["deis_2", "deis_3"])
def test_deis_keeps_its_digits_near_the_noise(name):
    """A float32 state along times that grow by factors: the coefficients stay near 1 though 1/t is large."""
    grid = [0.0, *(1e-6 * 1.3**k for k in range(52)), 1.0]
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    exactly = solvers.named[name](ORACLE.velocity, x0, grid)
    rounded = solvers.named[name](lambda x, t: ORACLE.velocity(x.double(), t).float(), x0.float(), grid)
    torch.testing.assert_close(rounded.double(), exactly, rtol=0, atol=3e-6)


def test_where_deis_is_stable_near_the_noise():
    """There eps = x, and x' = (1 - w_1 - w_2) x + w_1 x_{-1} + w_2 x_{-2}: its roots beside 1 say how errors grow."""

    def largest(ratio, order):
        if order == 2:
            return abs(deis.weights_2(1.0, ratio, 1 / ratio)[1])
        _, w1, w2 = deis.weights_3(1.0, ratio, 1 / ratio, ratio**-2)
        # after division by (z - 1): z^2 + (w_1 + w_2) z + w_2
        return max(abs(cmath.sqrt((w1 + w2) ** 2 / 4 - w2) * sign - (w1 + w2) / 2) for sign in (1, -1))

    assert largest(2.2, 2) < 1 < largest(2.25, 2) and largest(1.4, 3) < 1 < largest(1.45, 3)


@pytest.mark.parametrize("name", CASES)
def test_backward_grids_invert(name):
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    grid = [k / 800 for k in range(801)]
    there = solvers.named[name](ORACLE.velocity, x0, grid)
    torch.testing.assert_close(there, ORACLE.jump(x0, 0.0, 1.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solvers.named[name](ORACLE.velocity, there, grid[::-1]), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_start_keeps_off_a_time_without_velocity(name):
    def field(argument, x, t):
        assert t != 1.0
        return lazy(ORACLE.velocity(argument, t))

    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    for grid in ([0.5, 1.0], [0.5, 0.8, 1.0]):
        port = solvers.Port(singular=frozenset({1.0}))
        out = solvers.integrate(solvers.named[name], field, x0, grid, port=port)
        torch.testing.assert_close(out, ORACLE.jump(x0, 0.5, 1.0), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Of a run through its history: central differences."""
    w, x0 = torch.tensor([0.4, 1.3], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def run(w, grad="checkpoint"):
        fm = FlowMap(lambda x, s: torch.cos(w[0] * x + w[1]), prediction="velocity")
        return sample(fm, x0, 5, solver=name, grad=grad).square().sum()

    for grad in (True, "checkpoint"):
        assert torch.autograd.gradcheck(lambda w, grad=grad: run(w, grad), w.clone().requires_grad_())
