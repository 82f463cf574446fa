"""`dopri5`: its order, its tolerance, torchdiffeq's steps, and what only it promises: samples that do not mix."""

import warnings

import pytest
import torch
from oracles import MIXTURE_FLOW, Gaussian, Mixture, slope

from pyflowmap import solvers
from pyflowmap.algebra import lazy, per_sample
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg
from pyflowmap.interpolants import Trigonometric
from pyflowmap.sampling import sample
from pyflowmap.solvers import dopri5

CONTROLS = ("sample", "batch")


def uniform(n, start=0.0, end=1.0):
    return [start + (end - start) * k / n for k in range(n + 1)]


def turning(x, t):
    """Smooth, and harder for some x than for others; times float or (B,)."""
    t = per_sample(torch.as_tensor(t, dtype=x.dtype).expand(x.shape[0]), x)
    return 2 * torch.sin(3 * x) * torch.cos(8 * t) + torch.cos(x) - x * t


def elementary(x, t):
    """Only sums and products: the same bits wherever a row lies."""
    t = per_sample(torch.as_tensor(t, dtype=x.dtype).expand(x.shape[0]), x)
    return x * (1.0 + 20.0 * t * (1.0 - t)) - x * x * x


def mixture(x, t):
    t = per_sample(t, x)
    return (Mixture().data(x, t[..., None]) - x) / (1 - t)


def states(rows=6, columns=4, dtype=torch.float64):
    return torch.linspace(-3, 3, rows * columns, dtype=dtype).reshape(rows, columns)


# ---- the pair ----------------------------------------------------------------------------------------------------


def fixed(velocity, x, grid, control="sample"):
    """Every step of the grid taken, whatever its error."""
    lax = dict(rtol=1e9, atol=1e9, first_step=1.0, max_nfe=100_000)
    run = dopri5(velocity, x, grid, **lax, control=control, trajectory=True)
    return run.x[-1]


@pytest.mark.parametrize("control", CONTROLS)
def test_order_with_forced_steps(control):
    start = states()
    exact = fixed(turning, start, uniform(1000), control)
    steps = [20, 40, 80, 160]
    errors = [float((fixed(turning, start, uniform(n), control) - exact).abs().max()) for n in steps]
    assert 4.8 < slope([1 / n for n in steps], errors) < 6.6


@pytest.mark.parametrize("velocity", [Mixture().velocity, turning], ids=["mixture", "turning"])
def test_the_bare_step_is_the_loops(velocity):
    start, grid = states(), uniform(10, 0.05, 0.95)
    bare = solvers.integrate(dopri5.step, lambda argument, x, t: lazy(velocity(argument, t)), start, grid)
    torch.testing.assert_close(fixed(velocity, start, grid, "batch"), bare, rtol=1e-13, atol=1e-13)


def test_errors_of_the_specification():
    """D.3: 5.2e-7, 5.5e-9, 8.8e-11 for 10, 20, 40 steps, the largest over 41 starts; and the known flow of three."""
    start = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    exact = fixed(mixture, start, uniform(400, 0.05, 0.95))
    for n, golden in ((10, 5.2e-7), (20, 5.5e-9), (40, 8.8e-11)):
        error = float((fixed(mixture, start, uniform(n, 0.05, 0.95)) - exact).abs().max())
        assert golden / 2 < error < golden * 2
    start, end = (torch.tensor([each], dtype=torch.float64) for each in MIXTURE_FLOW)
    torch.testing.assert_close(fixed(mixture, start, uniform(40, 0.05, 0.95)), end, rtol=0, atol=2e-11)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_error_follows_the_tolerance(control):
    start = states()
    exact = fixed(turning, start, uniform(1000))
    tolerances = [1e-3, 1e-5, 1e-7, 1e-9]
    runs = [dopri5(turning, start, [0.0, 1.0], rtol=tol, atol=tol, control=control) for tol in tolerances]
    errors = [float((run.x - exact).abs().max()) for run in runs]
    assert all(run.converged.all() and run.nfe <= 1000 for run in runs)
    assert 0.8 < slope(tolerances, errors) < 1.2
    assert all(error < 200 * tol for error, tol in zip(errors, tolerances))
    assert [run.nfe for run in runs] == sorted(run.nfe for run in runs)


@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8])
def test_the_steps_of_torchdiffeq(tol):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    start, counts = states(), {"accept": 0, "reject": 0, "nfe": 0}

    class Field:
        def __call__(self, t, x):
            counts["nfe"] += 1
            return turning(x, float(t))

        def callback_accept_step(self, *_):
            counts["accept"] += 1

        def callback_reject_step(self, *_):
            counts["reject"] += 1

    theirs = torchdiffeq.odeint(Field(), start, torch.tensor([0.0, 1.0]).double(), rtol=tol, atol=tol, method="dopri5")
    ours = dopri5(turning, start, [0.0, 1.0], rtol=tol, atol=tol, error="shampine", control="batch")
    assert (ours.accepted, ours.rejected, ours.nfe) == (counts["accept"], counts["reject"], counts["nfe"])
    # They step over the end and interpolate back, of order 4.
    assert float((ours.x - theirs[-1]).abs().max()) < max(1e-5, 10 * tol)


def test_shampines_estimate_is_a_wider_tolerance():
    run = lambda **options: dopri5(turning, states(), [0.0, 1.0], **options)  # noqa: E731
    ours = run(error="shampine", rtol=2e-6, atol=2e-6, first_step=0.01)
    wider = run(rtol=3e-6, atol=3e-6, first_step=0.01)
    torch.testing.assert_close(ours.x, wider.x, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.accepted, wider.accepted) and torch.equal(ours.rejected, wider.rejected)


# ---- samples that do not mix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_does_not_depend_on_its_batch(dtype):
    x = torch.randn(13, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2
    whole = dopri5(elementary, x, [0.0, 1.0])
    assert len(set(whole.accepted.tolist())) > 1  # they do take different steps
    for rows in ([3], [12, 0], [5, 6, 7, 8, 9, 10, 11]):
        part = dopri5(elementary, x[rows], [0.0, 1.0])
        assert torch.equal(part.x, whole.x[rows])
        for name in ("converged", "accepted", "rejected", "t"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])


def test_a_sample_takes_the_steps_of_a_batch_of_one():
    whole = dopri5(turning, states(), [0.0, 1.0])
    for row in range(6):
        alone = dopri5(turning, states()[row : row + 1], [0.0, 1.0], control="batch")
        torch.testing.assert_close(whole.x[row : row + 1], alone.x, rtol=1e-13, atol=1e-13)
        assert (int(whole.accepted[row]), int(whole.rejected[row])) == (alone.accepted, alone.rejected)


def test_mixed_stiffness_costs_less_per_sample():
    centres = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)[:, None]
    width = 0.03

    def peaks(x, t):  # one each, at times of their own; the exact change is known
        t = torch.as_tensor(t, dtype=x.dtype).expand(8)[:, None]
        return (1.0 / (1.0 + ((t - centres) / width) ** 2)).expand_as(x)

    exact = width * (torch.atan((1 - centres) / width) + torch.atan(centres / width))
    zero, tolerances = torch.zeros(8, 2).double(), dict(rtol=1e-7, atol=1e-7)
    runs = {control: dopri5(peaks, zero, [0.0, 1.0], control=control, **tolerances) for control in CONTROLS}
    for run in runs.values():
        torch.testing.assert_close(run.x, exact.expand(8, 2), rtol=0, atol=1e-6)
    assert runs["sample"].nfe < 0.6 * runs["batch"].nfe


@pytest.mark.parametrize("control", CONTROLS)
def test_a_budget_that_runs_out_is_said_and_not_raised(control):
    run = dopri5(turning, states(), [0.0, 1.0], rtol=1e-9, atol=1e-9, max_nfe=100, control=control)
    assert run.nfe <= 100 < run.nfe + 6
    assert not run.converged.any() and run.x.isfinite().all()
    assert run.converged.shape == (6,) and "6 of 6 samples" in run.explain()
    times = torch.as_tensor(run.t)
    assert (times > 0).all() and (times < 1).all()
    # The state is that of the time named.
    reached = dopri5(turning, states()[2:3], [0.0, float(times.expand(6)[2])], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.x[2:3], reached.x, rtol=1e-6, atol=1e-6)
    full = dopri5(turning, states(), [0.0, 1.0], rtol=1e-9, atol=1e-9, control=control)
    assert full.converged.all() and full.explain() is None and (torch.as_tensor(full.t) == 1).all()


def test_some_converge():
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0]]).double()  # 0 is a fixed point: nothing to do
    run = dopri5(elementary, x, [0.0, 1.0], rtol=1e-11, atol=1e-11, max_nfe=60)
    assert run.converged.tolist() == [True, False] and torch.equal(run.x[0], x[0])
    with pytest.warns(RuntimeWarning, match=r"1 of 2 samples .* stopped at t = 0\.\d+ after 56"):
        fm = FlowMap(lambda x, s, t: elementary(x, s), prediction="velocity", call="start_and_end")
        sample(fm, x, solver=dopri5.using(rtol=1e-11, atol=1e-11, max_nfe=60))


@pytest.mark.parametrize("control", CONTROLS)
def test_a_sample_that_fails_leaves_the_others_alone(control):
    x = states()

    def broken(x, t):
        v, late = turning(x, t), torch.as_tensor(t, dtype=x.dtype).expand(len(x)) > 0.4
        v[2] = torch.where(late[2], torch.nan, v[2])
        return v

    others = [0, 1, 3, 4, 5]
    with pytest.warns(RuntimeWarning, match=r"the state of sample 2 \(of 6\) became NaN or infinite in step \d+ of an"):
        run = dopri5(broken, x, [0.0, 1.0], control=control, on_nan="keep")
    assert run.converged.tolist() == [True, True, False, True, True, True]
    assert run.x[2].isnan().all() and run.x[others].isfinite().all()
    if control == "sample":
        torch.testing.assert_close(run.x[others], dopri5(turning, x, [0.0, 1.0]).x[others], rtol=1e-12, atol=1e-12)
        assert 0 < float(run.t[2]) < 0.41
    exact = fixed(turning, x, uniform(1000))
    torch.testing.assert_close(run.x[others], exact[others], rtol=1e-3, atol=1e-3)
    with pytest.raises(FloatingPointError, match=r"sample 2 \(of 6\)"):
        dopri5(broken, x, [0.0, 1.0], control=control)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_field_without_any_velocity_ends_at_once(control):
    with pytest.warns(RuntimeWarning, match="every sample"):
        run = dopri5(lambda x, t: x * torch.nan, states(), [0.0, 1.0], control=control, on_nan="keep")
    assert run.nfe <= 8 and not run.converged.any()


# ---- grids, trajectories, callbacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_backward_grid_inverts(control):
    there = dopri5(turning, states(), [0.0, 1.0], rtol=1e-9, atol=1e-9, control=control).x
    back = dopri5(turning, there, [1.0, 0.0], rtol=1e-9, atol=1e-9, control=control)
    assert back.converged.all() and (torch.as_tensor(back.t) == 0).all()
    torch.testing.assert_close(back.x, states(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_trajectory_hits_every_time(control):
    grid = [0.0, 0.013, 0.5, 0.51, 1.0]
    run = dopri5(turning, states(), grid, rtol=1e-9, atol=1e-9, control=control, trajectory=True)
    assert run.x.shape == (5, 6, 4) and torch.equal(run.x[0], states())
    for t, x in zip(grid[1:], run.x[1:]):
        torch.testing.assert_close(x, fixed(turning, states(), uniform(400, 0.0, t)), rtol=0, atol=1e-6)
    crowded = [0.0, 0.5, 0.5 + 1e-6, 1.0]  # a step cut short by a time does not shorten those after it
    nfe = [dopri5(turning, states(), each, control=control, trajectory=True).nfe for each in (crowded, [0.0, 0.5, 1.0])]
    assert nfe[0] <= nfe[1] + 6
    ends = dopri5(turning, states(), grid, rtol=1e-9, atol=1e-9, control=control)  # inner times cost nothing
    assert ends.nfe == dopri5(turning, states(), [0.0, 1.0], rtol=1e-9, atol=1e-9, control=control).nfe < run.nfe


@pytest.mark.parametrize("control", CONTROLS)
def test_callback_and_progress(control):
    seen = []
    run = dopri5(turning, states(), [0.0, 1.0], control=control, callback=seen.append, progress=True)
    assert torch.equal(seen[-1]["x"], run.x) and seen[-1]["nfe"] == run.nfe and seen[-1]["t"] == 1.0
    assert [each["step"] for each in seen] == list(range(1, len(seen) + 1))
    assert all(a["t"] == b["s"] for a, b in zip(seen, seen[1:])) and seen[0]["s"] == 0.0
    assert len({each["x"].data_ptr() for each in seen}) == len(seen)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_noise_is_never_written_and_networks_may_return_their_input(control):
    x = states(dtype=torch.float32)
    kept = x.clone()
    same = dopri5(lambda x, t: x, x, [0.0, 1.0], control=control, first_step=0.9)
    fresh = dopri5(lambda x, t: x.clone(), x, [0.0, 1.0], control=control, first_step=0.9)
    torch.testing.assert_close(same.x, fresh.x)
    assert same.nfe == fresh.nfe and torch.equal(x, kept)
    torch.testing.assert_close(same.x, x * torch.e, rtol=1e-4, atol=1e-5)
    idle = dopri5(lambda x, t: 0 * x, x, [0.0, 1.0], control=control)
    assert torch.equal(idle.x, x) and idle.x.data_ptr() != x.data_ptr()


def test_empty_batches_and_samples_of_one_number():
    for shape in ((0, 3), (3, 0), (0,)):
        run = dopri5(lambda x, t: x, torch.zeros(shape), [0.0, 1.0])
        assert run.x.shape == shape and run.converged.all() and run.nfe == 0
    run = dopri5(lambda x, t: -x, torch.ones(3).double(), [0.0, 1.0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.x, torch.full((3,), -1.0).double().exp(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("control", CONTROLS)
def test_seven_launches_per_step(control, monkeypatch):
    from pyflowmap.solvers import adaptive, stages

    launches = []
    for module, name in ((stages, "evaluate"), (adaptive, "evaluate"), (adaptive, "error_norm")):
        whole = getattr(module, name)
        spy = lambda *args, whole=whole, **named: launches.append(1) or whole(*args, **named)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    run = dopri5(turning, states(1), [0.0, 1.0], control=control)
    tried = int(run.accepted) + int(run.rejected)
    assert run.nfe == 2 + 6 * tried
    assert len(launches) == 7 * tried + 4  # and to begin: one argument, three norms


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("grad", [True, "checkpoint"])
def test_gradients_against_finite_differences(grad, control):
    x0 = states(3, 2)
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def end(rate, x, **options):
        field = lambda x, t: turning(x, t) * rate - 0.1 * x * x * x  # noqa: E731
        tolerances = dict(rtol=1e-8, atol=1e-8, first_step=0.5, control=control)
        return dopri5(field, x, [0.0, 0.7], **tolerances, **options)

    x = x0.clone().requires_grad_()
    run = end(rate, x, grad=grad)
    assert torch.as_tensor(run.rejected).sum() > 0  # a step that was tried in vain leaves no trace
    by_rate, by_x = torch.autograd.grad((run.x**2).sum(), (rate, x))
    loss = lambda rate, x: float((end(rate, x).x ** 2).sum())  # noqa: E731
    d = 1e-4
    torch.testing.assert_close(float(by_rate), (loss(1.3 + d, x0) - loss(1.3 - d, x0)) / (2 * d), rtol=1e-4, atol=1e-4)
    for place in ((0, 0), (2, 1)):
        up, down = x0.clone(), x0.clone()
        up[place] += d
        down[place] -= d
        numeric = (loss(1.3, up) - loss(1.3, down)) / (2 * d)
        torch.testing.assert_close(float(by_x[place]), numeric, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run.x.detach(), end(1.3, x0).x, rtol=1e-12, atol=1e-12)
    path = end(rate, x, grad=grad, trajectory=True)
    assert path.x.requires_grad and path.x.shape == (2, 3, 2)


# ---- in the verb -----------------------------------------------------------------------------------------------------

ORACLE = Gaussian()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_a_network_that_predicts_data(path, control):
    """It has no velocity at the data end, and is never asked there."""
    asked = []

    def network(x, r):
        asked.append(float(r.max()))
        r = r.double()
        r = r if path == "linear" else Trigonometric().linear_time(r)
        scale = 1.0 if path == "linear" else 1.0 / (r**2 + (1 - r) ** 2).sqrt()  # alpha + sigma in linear time
        return ORACLE.data(x / per_sample(torch.as_tensor(scale).expand(len(x)), x), per_sample(r, x)).to(x.dtype)

    options = {} if path == "linear" else {"interpolant": Trigonometric()}
    fm = FlowMap(network, prediction="data", call="single_time", **options)
    x0 = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = sample(fm, x0, solver=dopri5.using(control=control, rtol=1e-6, atol=1e-6))
    torch.testing.assert_close(result, ORACLE.jump(x0, 0.0, 1.0), rtol=0, atol=2e-5)
    assert max(asked) < 1.0
    with pytest.raises(ValueError, match="the grid starts at 1"):
        sample(fm, x0, grid=[1.0, 0.0], solver="dopri5")


def conditional(x, s, t, label):
    return per_sample(label.to(x.dtype) - 1.0 - s.to(x.dtype), x) * x.clone()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
def test_guidance(control, batched):
    fm = FlowMap(conditional)
    x0 = torch.randn(6, 3, dtype=torch.float64)
    label = torch.arange(6.0).double() / 6
    options = dict(condition={"label": label}, guidance=cfg(2.0, null={"label": 0.0}, batched=batched))
    result = sample(fm, x0, solver=dopri5.using(control=control, rtol=1e-7, atol=1e-7), **options)
    exact = x0 * torch.exp(2.0 * label - 1.0 - 0.5)[:, None]  # the guided rate, integrated
    torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5)


def test_a_guidance_that_compares_times():
    fm, x0 = FlowMap(conditional), torch.randn(6, 3)
    label = torch.arange(6.0) / 6
    guidance = cfg(2.0, null={"label": 0.0}, interval=(0.2, 0.6))
    with pytest.raises(TypeError, match=r'control="batch"'):
        sample(fm, x0, solver="dopri5", condition={"label": label}, guidance=guidance)
    chosen = dopri5.using(control="batch", rtol=1e-6)
    result = sample(fm, x0, solver=chosen, condition={"label": label}, guidance=guidance)
    exact = x0 * torch.exp(1.4 * label - 1.5)[:, None]
    torch.testing.assert_close(result, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("control", CONTROLS)
def test_half_precision_networks_and_trajectories(control):
    fm = FlowMap(conditional)
    x0, label = torch.randn(6, 3), torch.arange(6.0) / 6
    path = sample(
        fm,
        x0,
        grid=[0.0, 0.5, 1.0],
        condition={"label": label},
        solver=dopri5.using(control=control, rtol=1e-2, atol=1e-2),
        dtype=torch.bfloat16,
        trajectory=True,
    )
    assert path.dtype == torch.float32 and path.shape == (3, 6, 3)
    for t, x in zip((0.5, 1.0), path[1:]):
        exact = x0 * torch.exp((label - 1.0) * t - t * t / 2)[:, None]
        torch.testing.assert_close(x, exact, rtol=3e-2, atol=3e-2)


def test_the_verb_and_the_solver_agree_bit_for_bit():
    fm, x0 = FlowMap(ORACLE.mean_velocity), torch.randn(6, 3)
    for control in CONTROLS:
        chosen = dopri5.using(control=control)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = sample(fm, x0, solver=chosen)
        assert torch.equal(result, chosen(lambda x, t: fm.velocity(x, t), x0, [0.0, 1.0]).x)


def test_bad_options():
    for options, words in (
        ({"rtol": -1.0}, "rtol"),
        ({"atol": 0.0}, "where the state is 0"),
        ({"error": "hairer"}, "classical"),
        ({"control": "row"}, '"sample"'),
        ({"max_nfe": 7}, "at least 8"),
        ({"first_step": 0.0}, "first_step"),
    ):
        with pytest.raises(ValueError, match=words):
            dopri5.using(**options)
    with pytest.raises(ValueError, match="max_nfe instead"):
        sample(FlowMap(ORACLE.mean_velocity), torch.randn(2, 3), nfe=20, solver="dopri5")


def test_a_wrong_tableau_cannot_be_used():
    from pyflowmap.solvers.adaptive import adaptive
    from pyflowmap.solvers.dopri5 import TABLEAU

    for wrong in (TABLEAU._replace(c=(*TABLEAU.c[:3], 0.7, *TABLEAU.c[4:])), TABLEAU._replace(error=(0.1,) * 7)):
        with pytest.raises(ValueError, match="tableau"):
            adaptive(wrong)


def test_the_classical_order_conditions():
    """Of the step (order 5) and of its companion b - e (order 4): the trees with one branch, and sum b_i c_i^k."""
    from pyflowmap.solvers.dopri5 import TABLEAU

    c = torch.tensor(TABLEAU.c, dtype=torch.float64)
    a = torch.tensor([[*row, *[0.0] * (7 - len(row))] for row in TABLEAU.a], dtype=torch.float64)
    b, e = a[-1], torch.tensor(TABLEAU.error, dtype=torch.float64)
    for weights, order in ((b, 5), (b - e, 4)):
        tall = torch.ones(7, dtype=torch.float64)
        for k in range(order):
            assert float(weights @ c**k) == pytest.approx(1 / (k + 1), abs=1e-14)
            assert float(weights @ tall) == pytest.approx(1 / torch.arange(1, k + 2).prod().item(), abs=1e-14)
            tall = a @ tall
    assert abs(float((b - e) @ c**4) - 1 / 5) > 1e-4  # and no more: else the pair says nothing
