"""UniPC: golden coefficients, orders with and without the corrector, agreement with diffusers, ends, launches."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, Mixture, slope

from pyflowmap.algebra import evaluate
from pyflowmap.flow_map import FlowMap
from pyflowmap.interpolants import Trigonometric, VariancePreserving
from pyflowmap.sampling import sample
from pyflowmap.solvers import unipc_1, unipc_2, unipc_3
from pyflowmap.solvers.exponential import between
from pyflowmap.solvers.unipc import coefficients, rho

MIXTURE, ORACLE = Mixture(), Gaussian()
START = torch.linspace(-2, 2, 41, dtype=torch.float64)[None]
SOLVERS = (unipc_1, unipc_2, unipc_3)


def uniform(n):
    return [0.05 + 0.9 * k / n for k in range(n + 1)]


def shifted(n):
    return [0.05 + 0.9 * (k / n) / (3 - 2 * k / n) for k in range(n + 1)]


def logit(n):
    end = math.log(19)
    return [1 / (1 + math.exp(end - 2 * end * k / n)) for k in range(n + 1)]


def rough(n):
    return [0.05, *(0.05 + 0.9 * (k + 0.3 * math.sin(2.4 * k)) / n for k in range(1, n)), 0.95]


def exact_flow(x, start, end):
    b, n = MIXTURE.velocity, 500
    for k in range(n):
        s, t = start + (end - start) * k / n, start + (end - start) * (k + 1) / n
        h, m = t - s, (s + t) / 2
        k1 = b(x, s)
        k2 = b(x + h / 2 * k1, m)
        k3 = b(x + h / 2 * k2, m)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + b(x + h * k3, t))
    return x


@pytest.fixture(scope="module")
def exact():
    return exact_flow(START, 0.05, 0.95)


# ---- coefficients ----------------------------------------------------------------------------------------------------

# of the step 0.3 -> 0.5 after 0.2 and 0.1: from the specification
GOLDEN = [
    (1, "bh1", -0.8472978604, [], [0.5]),
    (2, "bh1", -0.8472978604, [0.5], [0.0678915586, 0.3163737127]),
    (3, "bh1", -0.8472978604, [0.9251097055, -0.5408444342], [0.1514747241, -0.0527351060, 0.2855256532]),
    (1, "bh2", -0.5714285714, [], [0.5]),
    (2, "bh2", -0.5714285714, [0.5], [0.1006676516, 0.4691098473]),
    (3, "bh2", -0.5714285714, [1.3717260797, -0.8019485808], [0.2246023668, -0.0781940994, 0.4233692314]),
]


@pytest.mark.parametrize(("order", "variant", "B", "predictor", "corrector"), GOLDEN)
def test_golden_coefficients(order, variant, B, predictor, corrector):
    h = between(0.3, 0.5)
    r = tuple(between(0.3, s) / h for s in (0.2, 0.1)[: order - 1])
    assert r == pytest.approx((-0.6361357982, -1.5932138862)[: order - 1], abs=5e-11)
    got = rho(h, r, variant)
    assert got[0] == pytest.approx(B, abs=5e-11)
    assert got[1] == pytest.approx(predictor, abs=5e-10) and got[2] == pytest.approx(corrector, abs=5e-10)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_step_is_the_published_one(order, variant):
    """Predict 0.2 -> 0.3, correct there, predict -> 0.5: by the formulas as published, keeping the state before."""
    past = [0.2, 0.1, 0.06][:order]
    D = dict(zip([0.3, *past], [0.7, -0.4, 0.9, 0.2]))
    x = 0.33

    def published(x, s, t, before, weights, end=None):
        h = between(s, t)
        r = tuple(between(s, each) / h for each in before)
        B, predictor, corrector = rho(h, r, variant)
        total = sum(w * (D[each] - D[s]) / ratio for w, each, ratio in zip((predictor, corrector)[weights], before, r))
        if end is not None:
            total += corrector[-1] * (end - D[s])
        return (1 - t) / (1 - s) * x - t * math.expm1(-h) * D[s] - t * B * total

    before = past[1:order]
    predicted = published(x, 0.2, 0.3, before, 0)
    corrected = published(x, 0.2, 0.3, before, 1, D[0.3])
    expected = published(corrected, 0.3, 0.5, past[: order - 1], 0)
    a, *c = coefficients(0.3, 0.5, tuple(past), order, order, variant)
    got = a * predicted + sum(weight * D[t] for weight, t in zip(c, [0.3, *past]))
    assert got == pytest.approx(expected, rel=1e-12)


# ---- orders and errors -----------------------------------------------------------------------------------------------

ORDERS = [
    *[(each.using(variant=variant), p + 1) for p, each in enumerate(SOLVERS, 1) for variant in ("bh1", "bh2")],
    *[(each.using(corrector=False), p) for p, each in enumerate(SOLVERS, 1)],
]


@pytest.mark.parametrize("grid", [uniform, rough, logit])
@pytest.mark.parametrize(
    ("solver", "order"), ORDERS, ids=lambda v: f"{v.name}-{v.options['variant']}" if hasattr(v, "name") else v
)
def test_order_of_convergence(solver, order, grid, exact):
    steps = [80, 160, 320] if order < 4 else [160, 320, 640]
    errors = [float((solver(MIXTURE.velocity, START, grid(n)) - exact).abs().max()) for n in steps]
    assert slope([1 / n for n in steps], errors) == pytest.approx(order, abs=0.3)
    assert solver.order == order or not solver.options["corrector"]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_order_from_the_noise_end(solver):
    """lambda = -inf there: the first step's formula is its limit, and D(0) is no history. However fine a uniform grid
    is, its first steps stay long in lambda, with an error c h^2 of small c that the higher orders come to see."""
    end = exact_flow(START, 0.0, 0.9)
    steps = [80, 160, 320]
    errors = [
        float((solver(MIXTURE.velocity, START, [0.9 * k / n for k in range(n + 1)]) - end).abs().max()) for n in steps
    ]
    assert (
        slope([1 / n for n in steps], errors) > min(solver.order, 3) - 0.3
        and errors[-1] < (5e-4, 1e-5, 1e-6)[SOLVERS.index(solver)]
    )


ERRORS = [  # at 20 and 160 steps, uniform, shifted, logit: from the specification, where the last state is corrected
    (unipc_2, (3.9e-3, 1.2e-5, 5.2e-2, 2.3e-4, 3.4e-3, 8.4e-6)),
    (unipc_3, (4.6e-3, 1.2e-6, 8.3e-2, 6.3e-5, 7.0e-4, 1.7e-7)),
]


@pytest.mark.parametrize(("solver", "expected"), ERRORS, ids=lambda v: getattr(v, "name", ""))
def test_errors_have_the_known_size(solver, expected, exact):
    for (grid, n), error in zip([(g, n) for g in (uniform, shifted, logit) for n in (20, 160)], expected):
        times = [*grid(n), 0.95 + 1e-11]  # a step of no length corrects the state at 0.95
        got = float((solver(MIXTURE.velocity, START, times) - exact).abs().max())
        assert error / 2 < got < error * 2, (grid.__name__, n, got)


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_agrees_with_diffusers(order, lower, variant):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0,
        solver_order=order, solver_type=variant, lower_order_final=lower, final_sigmas_type="zero",
    )  # fmt: skip
    count = 9
    scheduler.set_timesteps(count)
    if not lower or variant == "bh1":  # to sigma = 0 theirs is then 0 * inf, NaN (bh1: B = -inf). Ours is D
        scheduler.sigmas[-1] = 0.01
    scheduler.sigmas[0] = 0.98  # theirs, 1 - 1e-6, has lost its digits in float32
    grid = [1.0 - each for each in scheduler.sigmas.double().tolist()]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    field = lambda x, t: MIXTURE.velocity(x, t).float()  # noqa: E731
    theirs = x
    for k, tau in enumerate(scheduler.timesteps):
        theirs = scheduler.step(-field(theirs, grid[k]), tau, theirs).prev_sample
    options = {} if order == 1 else {"lower_order_final": lower}
    if order == 3:
        options["start"] = "low"
    ours = SOLVERS[order - 1].using(variant=variant, **options)(field, x, grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- whole runs ------------------------------------------------------------------------------------------------------

ALL = [
    *SOLVERS,
    unipc_1.using(variant="bh1"),
    unipc_2.using(variant="bh1"),
    unipc_2.using(corrector=False, lower_order_final=True),
    unipc_3.using(start="low", lower_order_final=True),
]
NAMES = [f"{s.name}-{'-'.join(map(str, s.options.values()))}" for s in ALL]


def model(kind, path=None):
    def network(x, r):
        r = r.double().reshape(-1, 1)
        t, x = (r, x) if path is None else (path.linear_time(r), x / path.scale(r))
        if kind == "data":
            return ORACLE.data(x, t)
        if path is None:
            return ORACLE.velocity(x, t)
        x1 = ORACLE.data(x, t)
        return path.alpha_derivative(r) * x1 + path.sigma_derivative(r) * (x1 - ORACLE.velocity(x, t))

    return FlowMap(network, prediction=kind, **({} if path is None else {"interpolant": path}))


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
@pytest.mark.parametrize("kind", ["velocity", "data"])
@pytest.mark.parametrize("path", [None, Trigonometric(), VariancePreserving()], ids=["linear", "trigonometric", "vp"])
def test_a_whole_run_from_noise_to_data(solver, kind, path):
    x0 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, scale = (0.0, 1.0) if path is None else (path.linear_time(0.0), path.scale(0.0))
    x1 = sample(model(kind, path), x0, 48, solver=solver)
    torch.testing.assert_close(x1, ORACLE.jump(x0 / scale, t, 1.0), rtol=0, atol=0.06)
    assert sample(model(kind, path), x0, 1, solver=solver).isfinite().all()


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
def test_the_last_step_to_the_data_is_the_data_prediction(solver):
    seen = []

    def data(x, s):
        seen.append(ORACLE.data(x, s.double().reshape(-1, 1)))
        return seen[-1]

    x1 = sample(FlowMap(data, prediction="data"), torch.randn(5, 3, dtype=torch.float64), 5, solver=solver)
    torch.testing.assert_close(x1, seen[-1], rtol=1e-12, atol=1e-12)


def test_one_launch_per_evaluation(monkeypatch):
    """State and D; 7 passes for UniPC-3: it reads x, b, D_1, D_2, D_3 (no x before the step), and writes two."""
    launches = []
    from pyflowmap.solvers import driver

    def spy(*combinations, **k):
        launches.append((len({id(x) for c in combinations for x in c.operands}), len(combinations)))
        return evaluate(*combinations, **k)

    monkeypatch.setattr(driver, "evaluate", spy)
    unipc_3.using(start="low")(lambda x, t: -x, torch.randn(3, 4), uniform(7))
    assert launches == [(2, 2), (3, 2), (4, 2), (5, 2), (5, 2), (5, 2), (5, 1)]


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
def test_a_budget_is_spent_to_the_evaluation(solver):
    for nfe in range(1, 16):
        calls = []
        fm = FlowMap(lambda x, s, calls=calls: calls.append(1) or 0 * x, prediction="velocity")
        try:
            sample(fm, torch.zeros(1, 2), solver=solver, nfe=nfe)
        except ValueError as refused:
            assert f"nfe = {nfe} can't be met" in str(refused) and not calls
        else:
            assert len(calls) == nfe
    assert unipc_2.steps_for(9) == 9 and unipc_3.steps_for(12) == 6


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
def test_the_times_asked_are_announced(solver):
    for grid in (uniform(5), [0.0, *uniform(4), 1.0]):
        asked = set()
        solver(lambda x, t, asked=asked: asked.add(t) or -x, torch.zeros(2, 3), grid)
        assert asked <= set(solver.asks(grid))


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
def test_gradients_and_buffers_do_not_change_the_result(solver):
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fm = FlowMap(lambda x, s: torch.tanh(w * x), prediction="velocity")
    grads = []
    for grad in (True, "checkpoint"):
        w.grad = None
        out = sample(fm, x0, 6, solver=solver, grad=grad)
        torch.testing.assert_close(out, sample(fm, x0, 6, solver=solver), rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        grads.append(w.grad.clone())
    assert torch.equal(*grads)
    moved = []
    for by in (1e-5, -1e-5):
        near = FlowMap(lambda x, s, by=by: torch.tanh((0.7 + by) * x), prediction="velocity")
        moved.append(float(sample(near, x0, 6, solver=solver).square().sum()))
    assert float(grads[0]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("solver", ALL, ids=NAMES)
def test_backward_from_data_to_noise(solver):
    x1 = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
    grid = [k / 40 for k in range(40, -1, -1)]
    assert all(s > t for s, t in pairwise(grid))
    back = solver(lambda x, t: ORACLE.velocity(x, t), x1, grid)
    torch.testing.assert_close(back, (x1 - 0.7) / 0.5, rtol=0, atol=0.05)


def test_bad_options():
    with pytest.raises(ValueError, match="variant = 'heun'; it is 'bh1' or 'bh2'"):
        unipc_2.using(variant="heun")
    with pytest.raises(ValueError, match="corrector = None; it is True or False"):
        unipc_1.using(corrector=None)
    with pytest.raises(ValueError, match="start = 'slow'; it is 'full' or 'low'"):
        unipc_3.using(start="slow")
    with pytest.raises(ValueError, match="lower_order_final = 'yes'; it is False or True"):
        unipc_3.using(lower_order_final="yes")
