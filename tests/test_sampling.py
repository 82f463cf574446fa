"""Solvers and the driver: orders of convergence, exact solutions, memory, buffers, grids, errors."""

import pytest
import torch
from oracles import MIXTURE_FLOW, Gaussian, Mixture, slope

from pyflowmap import solvers
from pyflowmap.algebra import evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg
from pyflowmap.interpolants import Interpolant, Trigonometric, VariancePreserving
from pyflowmap.sampling import sample

ORACLE = Gaussian()
FLOW = FlowMap(ORACLE.mean_velocity)


def uniform(n, start=0.0, end=1.0):
    return [start + (end - start) * k / n for k in range(n + 1)]


def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v


def ab3(velocity, x, s, t, memory):  # memory is a tuple that shifts
    v, h = velocity(x, s), t - s
    if memory is None:
        return x + h * velocity(x + h / 2 * v, s + h / 2), (v, None, 1)
    old, older, count = memory
    if older is None:
        return x + h * (1.5 * v - 0.5 * old), (v, old, count + 1)
    return x + h / 12 * (23.0 * v - 16.0 * old + 5.0 * older), (v, old, count + 1)


@pytest.mark.parametrize(("solver", "order"), [(solvers.euler, 1), (solvers.heun, 2), ("ab2", 2), ("ab3", 3)])
def test_order_of_convergence(solver, order):
    start, end = (torch.tensor([values], dtype=torch.float64) for values in MIXTURE_FLOW)
    steps = [40, 80, 160, 320] if order < 3 else [20, 40, 80, 160]

    def run(grid):
        if isinstance(solver, str):
            return solvers.integrate(
                {"ab2": ab2, "ab3": ab3}[solver],
                lambda argument, x, t: lazy(Mixture().velocity(argument, t)),
                start,
                grid,
            )
        return solver(Mixture().velocity, start, grid)

    errors = [float((run(uniform(n, 0.05, 0.95)) - end).abs().max()) for n in steps]
    assert slope([1 / n for n in steps], errors) == pytest.approx(order, abs=0.2 if order < 3 else 0.4)


def test_declared_evaluations_are_those_spent():
    for each in solvers.named.values():
        if each.loop is not None or each.plan is not None:  # those choose their own times
            continue
        calls = []
        fm = FlowMap(lambda x, s, t, calls=calls: calls.append(1) or 0 * x)
        sample(fm, torch.zeros(1, 2), grid=uniform(6, 0.1, 0.9), solver=each)
        if each.name not in ("dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_3"):  # their starts depend on the grid
            assert len(calls) == each.starting + 6 * each.nfe, each.name


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_exact_flow_map_needs_any_number_of_steps(steps):
    x0 = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(sample(FLOW, x0, steps), ORACLE.jump(x0, 0.0, 1.0), rtol=1e-6, atol=1e-6)


def test_backward_grid_inverts():
    x0 = torch.randn(6, 3, dtype=torch.float64)
    x1 = sample(FLOW, x0, 5)
    torch.testing.assert_close(sample(FLOW, x1, grid=[1.0, 0.6, 0.1, 0.0]), x0, rtol=1e-5, atol=1e-5)
    there = sample(FLOW, x0, grid=uniform(200), solver="heun")
    back = sample(FLOW, there, grid=uniform(200)[::-1], solver="heun")
    torch.testing.assert_close(back, x0, rtol=1e-4, atol=1e-4)


def test_the_verb_and_the_solver_drive_the_same_step_bit_for_bit():
    x0 = torch.randn(6, 3)
    for name in ("euler", "heun"):
        direct = getattr(solvers, name)(lambda x, t: FLOW.velocity(x, t), x0, uniform(5))
        assert torch.equal(direct, sample(FLOW, x0, 5, solver=name))
        assert torch.equal(direct, sample(FLOW, x0, 5, solver=solvers.named[name]))
        assert torch.equal(direct, sample(FLOW, x0, 5, solver=solvers.named[name].step))
    assert torch.equal(solvers.flow_map(FLOW.jump, x0, uniform(3)), sample(FLOW, x0, 3))


def test_heun_by_hand_in_float32():
    x0 = torch.randn(4, 3)
    x, grid = x0, uniform(4)
    for s, t in zip(grid, grid[1:]):
        k1 = -x
        k2 = -(x + (t - s) * k1)
        x = x + (t - s) / 2 * (k1 + k2)
    torch.testing.assert_close(solvers.heun(lambda x, t: -x, x0, grid), x)


def test_a_solver_of_ones_own():
    x0 = torch.randn(6, 3, dtype=torch.float64)
    by_hand, old, grid = x0, None, uniform(8)
    for s, t in zip(grid, grid[1:]):
        v = FLOW.velocity(by_hand, s)
        by_hand = by_hand + (t - s) * (v if old is None else 1.5 * v - 0.5 * old)
        old = v
    torch.testing.assert_close(sample(FLOW, x0, 8, solver=ab2), by_hand, rtol=1e-12, atol=1e-12)


# ---- the driver --------------------------------------------------------------------------------------------------


def test_the_noise_is_never_written_and_networks_may_return_their_input():
    x0 = torch.randn(3, 4)
    kept = x0.clone()
    for step in (solvers.euler.step, solvers.heun.step, ab2, ab3):
        same = solvers.integrate(step, lambda argument, x, t: lazy(argument), x0, uniform(6))
        fresh = solvers.integrate(step, lambda argument, x, t: lazy(argument.clone()), x0, uniform(6))
        torch.testing.assert_close(same, fresh)
        assert torch.equal(x0, kept)


def test_stages_do_not_share_a_buffer():
    def two_stages(velocity, x, s, t, memory):  # the network returns its argument: both must live until the update
        a, b = velocity(2.0 * x, s), velocity(3.0 * x, t)
        return 1.0 * a + 10.0 * b, memory

    x0 = torch.randn(3, 4)
    torch.testing.assert_close(
        solvers.integrate(two_stages, lambda argument, x, t: lazy(argument), x0, [0.0, 1.0]), 32.0 * x0
    )


def test_the_loop_allocates_once(monkeypatch):
    outs = []
    from pyflowmap.solvers import driver

    def spy(*combinations, out=None, dtype=None):
        outs.append([each.data_ptr() for each in (out if isinstance(out, tuple) else (out,))])
        return evaluate(*combinations, out=out, dtype=dtype)

    monkeypatch.setattr(driver, "evaluate", spy)
    solvers.integrate(ab2, lambda argument, x, t: lazy(-argument), torch.randn(3, 4), uniform(10))
    assert len(outs) == 10  # one launch per step: state and memory together
    assert len({pointer for pair in outs for pointer in pair}) == 4  # two rings of two
    outs.clear()
    solvers.integrate(solvers.heun.step, lambda argument, x, t: lazy(-argument), torch.randn(3, 4), uniform(10))
    assert len(outs) == 20 and len({p for pair in outs for p in pair}) == 4


def test_callback_keeps_its_states_and_sees_the_grid():
    records = []
    x0 = torch.randn(3, 4)
    grid = [0.0, 0.2, 0.5, 1.0]
    end = sample(FLOW, x0, grid=grid, solver="heun", callback=records.append)
    states = sample(FLOW, x0, grid=grid, solver="heun", trajectory=True)
    assert [(r["step"], r["s"], r["t"], r["nfe"]) for r in records] == [
        (1, 0.0, 0.2, 2),
        (2, 0.2, 0.5, 4),
        (3, 0.5, 1.0, 6),
    ]
    assert states.shape == (4, 3, 4) and torch.equal(states[0], x0) and torch.equal(states[-1], end)
    for record, state in zip(records, states[1:]):
        assert torch.equal(record["x"], state)


@pytest.mark.parametrize("trajectory", [False, True])
def test_gradients_through_sampling(trajectory):
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    fm = FlowMap(lambda x, s: w * x, prediction="velocity")
    out = sample(fm, x0, 4, solver="heun", grad=True, trajectory=trajectory)
    (out[-1] if trajectory else out).sum().backward()
    h = 0.25
    factor = 1 + h * 0.7 + (h * 0.7) ** 2 / 2  # of one Heun step on x' = w x
    slope_ = 4 * factor**3 * (h + h * h * 0.7) * float(x0.detach().sum())
    torch.testing.assert_close(x0.grad, torch.full_like(x0, factor**4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(w.grad, torch.tensor(slope_, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert not sample(fm, x0, 4, solver="heun").requires_grad


def test_seed_and_sample_ids():
    whole = sample(FLOW, (8, 5), 2, seed=3)
    ids = torch.tensor([6, 0, 3])
    assert torch.equal(sample(FLOW, (3, 5), 2, seed=3, sample_ids=ids), whole[ids])
    assert torch.equal(whole, sample(FLOW, (8, 5), 2, seed=3)) and not torch.equal(
        whole, sample(FLOW, (8, 5), 2, seed=4)
    )
    assert not torch.equal(sample(FLOW, (8, 5), 2), sample(FLOW, (8, 5), 2))  # no constant seed
    assert whole.dtype == torch.float32


def test_empty_batch():
    assert sample(FLOW, (0, 5), 2, seed=0).shape == (0, 5)


@pytest.mark.parametrize(
    ("solver", "where"), [("flow_map", "step 3 of 4"), ("euler", "step 3 of 4"), ("heun", "step 2 of 4")]
)
def test_nan_is_reported_with_its_step(solver, where):
    def network(x, s, t):  # bad from t = 0.5 on; Heun looks there one step earlier
        return torch.where(s.reshape(-1, 1) >= 0.5, torch.nan, 1.0) * torch.ones_like(x)

    with pytest.raises(FloatingPointError, match=where):
        sample(FlowMap(network), torch.zeros(2, 3), 4, solver=solver)
    with pytest.raises(FloatingPointError, match="before the first step"):
        sample(FLOW, torch.full((2, 3), torch.inf), 4)


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sample(FLOW, GOOD, 0), ValueError, "steps = 0"),
        (lambda: sample(FLOW, GOOD, True), ValueError, "steps = True"),
        (lambda: sample(FLOW, GOOD, grid=[0.0]), ValueError, "at least two"),
        (lambda: sample(FLOW, GOOD, grid=[0.0, 0.5, 0.5]), ValueError, "strictly monotone"),
        (lambda: sample(FLOW, GOOD, grid=[0.0, 0.6, 0.5]), ValueError, "strictly monotone"),
        (lambda: sample(FLOW, GOOD, grid=[0.0, float("nan")]), ValueError, "contains nan"),
        (lambda: sample(FLOW, GOOD, grid=[0.0, 2.0]), ValueError, r"contains 2"),
        (lambda: sample(FLOW, GOOD, solver="rk45"), ValueError, "'rk45'.*heun"),
        (lambda: sample(FLOW, GOOD, solver=3), TypeError, "solver is int"),
        (lambda: sample(lambda x: x, GOOD), TypeError, "pfm.FlowMap"),
        (lambda: sample(FLOW, GOOD.long()), TypeError, "int64"),
        (lambda: sample(FLOW, GOOD, seed=3), ValueError, "seed = 3"),
        (lambda: sample(FLOW, (2, -3)), ValueError, r"\(2, -3\)"),
        (lambda: sample(FLOW, GOOD, condition={"label": torch.zeros(3)}), ValueError, "'label' has 3 rows"),
        (lambda: sample(FLOW, GOOD, guidance=3.0), TypeError, "pfm.guidance.cfg"),
        (lambda: sample(FLOW, GOOD, cuda_graph=True), ValueError, "CUDA"),
        (lambda: sample(FLOW, GOOD, solver=lambda v, x, s, t, m: (GOOD, m)), TypeError, "lazy combination"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- other paths -------------------------------------------------------------------------------------------------

PATHS = [Trigonometric(), VariancePreserving()]


def on_path(path, kind):
    """The Gaussian oracle as a network on `path`: the same data and noise predictions at x/(alpha + sigma)."""

    def network(x, r):
        r = r.double().reshape(-1, 1)
        t, x = path.linear_time(r), x / path.scale(r)
        x1 = ORACLE.data(x, t)
        x0 = (x - t * x1) / (1.0 - t)
        a, g, n = path.alpha(r), path.sigma(r), path.alpha(r) ** 2 + path.sigma(r) ** 2
        return {
            "velocity": lambda: path.alpha_derivative(r) * x1 + path.sigma_derivative(r) * x0,
            "data": lambda: x1,
            "noise": lambda: x0,
            "score": lambda: -x0 / g,
            "ddpm_v": lambda: a * x0 - g * x1,  # n = 1 on these paths
        }[kind]() + 0.0 * n

    return FlowMap(network, prediction=kind, interpolant=path)


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "ddpm_v"])
@pytest.mark.parametrize("path", PATHS, ids=["trigonometric", "vp"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_every_path_is_the_linear_one(path, kind, solver):
    r = [0.1, 0.3, 0.55, 0.9]
    t = [path.linear_time(each) for each in r]
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = solvers.named[solver](lambda x, t: ORACLE.velocity(x, t), x / path.scale(r[0]), t) * path.scale(r[-1])
    got = sample(on_path(path, kind), x, grid=r, solver=solver)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)  # the network's times are float32
    seen = []
    sample(on_path(path, kind), x, grid=r, solver=solver, callback=seen.append)
    assert [round(each["t"], 9) for each in seen] == r[1:]
    torch.testing.assert_close(seen[-1]["x"], got)


@pytest.mark.parametrize("path", PATHS, ids=["trigonometric", "vp"])
def test_linear_time_and_its_inverse(path):
    for r in (0.0, 1e-3, 0.2, 0.5, 0.9, 0.999, 1.0):
        t = path.linear_time(r)
        assert path.model_time(t) == pytest.approx(r, abs=1e-12)
        assert float(path.model_time(torch.tensor(t, dtype=torch.float64))) == pytest.approx(r, abs=1e-9)
        assert Interpolant.model_time(path, t) == pytest.approx(r, abs=1e-9)  # bisection


def test_heun_ends_with_euler_where_there_is_no_velocity():
    fm = FlowMap(lambda x, s: ORACLE.data(x, s.double().reshape(-1, 1)), prediction="data")
    x = torch.randn(4, 3, dtype=torch.float64)
    middle = sample(fm, x, grid=[0.0, 0.5], solver="heun")
    torch.testing.assert_close(sample(fm, x, 2, solver="heun"), ORACLE.data(middle, 0.5), rtol=1e-6, atol=1e-6)


# ---- half precision, slots, noise, checkpoints, NaN ----------------------------------------------------------------


def test_the_state_stays_float32_under_a_half_precision_network():
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 6).bfloat16()
    seen = []

    def call(network, x, s, t, condition):
        seen.append(x.dtype)
        return network(x)

    fm = FlowMap(network, prediction="velocity", call=call)
    x = torch.randn(5, 6)
    out = sample(fm, x, 200, solver="euler")
    by_hand = x
    for _ in range(200):
        by_hand = by_hand + 0.005 * network(by_hand.bfloat16()).float()
    assert set(seen) == {torch.bfloat16} and out.dtype == torch.float32
    torch.testing.assert_close(out, by_hand, rtol=1e-5, atol=1e-5)


def noisy(velocity, x, s, t, memory):
    return x + (t - s) * velocity(x, s) + 0.1 * velocity.noise(), memory


@pytest.mark.parametrize("grad", [False, True, "checkpoint"])
def test_noise_of_steps_depends_on_seed_and_sample_alone(grad):
    whole = sample(FLOW, (8, 5), 3, seed=3, solver=noisy, grad=grad)
    ids = torch.tensor([6, 0, 3])
    assert torch.equal(sample(FLOW, (3, 5), 3, seed=3, sample_ids=ids, solver=noisy), whole[ids])
    assert not torch.equal(whole, sample(FLOW, (8, 5), 3, seed=4, solver=noisy))
    assert not torch.equal(sample(FLOW, (8, 5), 3, solver=noisy), sample(FLOW, (8, 5), 3, solver=noisy))


@pytest.mark.parametrize("step", [noisy, ab3], ids=["noisy", "ab3"])
def test_checkpointing_gives_the_same_gradient(step):
    grads = []
    for grad in (True, "checkpoint"):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
        fm = FlowMap(lambda x, s, w=w: torch.tanh(w * x), prediction="velocity")
        sample(fm, x0, 5, solver=step, grad=grad, seed=1).square().sum().backward()
        grads.append((x0.grad, w.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_nan_names_its_samples_and_spares_the_others():
    def network(x, s, t):
        bad = (s >= 0.5) & (torch.arange(len(x)) == 1)
        return torch.where(bad.reshape(-1, 1), torch.nan, 1.0) * torch.ones_like(x)

    with pytest.raises(FloatingPointError, match=r"sample 1 \(of 3\).*step 3 of 4"):
        sample(FlowMap(network), torch.zeros(3, 2), 4)
    with pytest.warns(RuntimeWarning, match=r"sample 1 \(of 3\).*step 3 of 4"):
        out = sample(FlowMap(network), torch.zeros(3, 2), 4, on_nan="keep")
    assert torch.equal(out[[0, 2]], torch.ones(2, 2)) and out[1].isnan().all()


def test_a_budget_of_evaluations():
    calls = []
    fm = FlowMap(lambda x, s, t: calls.append(1) or 0 * x)
    sample(fm, torch.zeros(1, 2), solver="heun", nfe=6)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="nfe = 7 can't be met: heun takes 2 evaluations per step; 6 or 8 can"):
        sample(fm, torch.zeros(1, 2), solver="heun", nfe=7)
    with pytest.raises(ValueError, match=r"nfe = 1 can't be met.*; 2 can"):
        sample(fm, torch.zeros(1, 2), solver="heun", nfe=1)
    with pytest.raises(ValueError, match="with a grid"):
        sample(fm, torch.zeros(1, 2), solver="heun", nfe=2, grid=[0.0, 1.0])


def test_options_of_a_solver():
    @solvers.solver(order=1, nfe=1)
    def scaled(velocity, x, s, t, memory, *, by=1.0):
        return x + (by * (t - s)) * velocity(x, s), memory

    x = torch.zeros(2, 3)
    assert float(scaled(lambda x, t: torch.ones_like(x), x, [0.0, 1.0], by=3.0)[0, 0]) == 3.0
    assert float(sample(FlowMap(lambda x, s, t: torch.ones_like(x)), x, 2, solver=scaled.using(by=2.0))[0, 0]) == 2.0
    with pytest.raises(TypeError, match="no option 'bye'; it has by"):
        scaled.using(bye=2.0)
    with pytest.raises(TypeError, match="heun has no option 'alpha'; it has none"):
        solvers.heun.using(alpha=2.0)


def test_the_loop_allocates_nothing_under_half_precision_and_slots():
    """Eight steps ask torch for as many tensors of the state's size as four do."""
    network = torch.nn.Linear(60, 60).bfloat16()
    fixed = torch.zeros(2000, 60, dtype=torch.bfloat16)
    fm = FlowMap(network, prediction="velocity", call=lambda network, x, s, t, condition: fixed[: len(x)])
    guide, label = cfg(2.0, null={"label": 1}), torch.zeros(1000)

    def allocations(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            sample(fm, torch.zeros(1000, 60), steps, solver=ab2, condition={"label": label}, guidance=guide)
        own = [e for e in found.events() if e.name in ("aten::empty", "aten::empty_strided")]
        return sum(e.cpu_memory_usage >= 2000 * 60 for e in own)  # bytes: the smallest is an argument in bfloat16

    assert allocations(8) == allocations(4) < 10


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_pp_2m", "unipc_3"])
def test_a_workspace_serves_run_after_run(solver):
    """With `out` as well, a second run asks torch for no tensor of the state's size, and spoils no earlier result."""
    x, y = torch.randn(3, 4000), torch.randn(3, 4000)
    each, grid, space = solvers.named[solver], uniform(5, 0.1, 0.9), solvers.Workspace()
    v = torch.randn(3, 4000)  # the network allocates nothing either
    run = lambda x, **options: each(lambda x, t: v[: len(x)], x, grid, **options)  # noqa: E731
    first, second = run(x), run(y)
    kept = run(x, workspace=space)
    assert torch.equal(kept, first) and torch.equal(run(y, workspace=space), second) and torch.equal(kept, first)
    out = torch.empty_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        assert run(y, out=out, workspace=space) is out and torch.equal(out, second)
    sizes = [e.cpu_memory_usage for e in found.events() if e.name in ("aten::empty", "aten::empty_strided")]
    assert all(size < 4 * x.numel() for size in sizes)
    assert torch.equal(run(x[:2], workspace=space), first[:2])  # another shape: other buffers
    with pytest.raises(ValueError, match="grad records"):
        run(x, out=out, grad=True)
    with pytest.raises(ValueError, match=r"out is \(2, 4000\)"):
        run(x, out=out[:2])
