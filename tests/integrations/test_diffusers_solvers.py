"""SolverScheduler: the steps of pyflowmap.solvers to the bit, and diffusers' own solvers where there are such."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from integrations.models import normal  # noqa: E402
from integrations.test_diffusers_scheduler import Unread  # noqa: E402
from oracles import Gaussian  # noqa: E402

import pyflowmap as pfm  # noqa: E402
from pyflowmap import solvers  # noqa: E402
from pyflowmap.integrations.diffusers import SolverScheduler, replay  # noqa: E402

GRIDDED = [each for each in solvers.named.values() if each.takes == "velocity" and each.loop is None]
END = solvers.Port(singular=frozenset({1.0}))


def network(x, sigma):
    """Their velocity, noise - data."""
    return torch.sin(2 * x + 3 * sigma) + 0.3 * x


def field(argument, x, t):
    return -1.0 * pfm.lazy(network(argument, float(np.float32(1.0 - t))))


def run(scheduler, x, **options):
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, float(scheduler.sigmas[i])), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("solver", GRIDDED, ids=lambda solver: solver.name)
def test_the_same_steps_to_the_bit(solver):
    starts = ["low", "full"] if "start" in solver.options else [None]
    for start in starts:
        _same_steps(solver, {} if start is None else {"start": start})


def _same_steps(solver, options):
    scheduler, x = SolverScheduler(solver.name, options, seed=5, shift=3.0), normal(2, 3, 4)
    solver = solver.using(**options)
    scheduler.set_timesteps(6)
    grid = [3 * s / (1 + 2 * s) for s in (1 - k / 6 for k in range(6))]
    grid = [1.0 - float(np.float32(s)) for s in grid] + [1.0]
    ours = solvers.integrate(solver, field, x, grid, port=END, seed=5)
    assert torch.equal(run(scheduler, x), ours)
    scheduler.set_timesteps(6)  # again, and without touching what it was given
    assert torch.equal(run(scheduler, x.clone()), ours)


@pytest.mark.parametrize("solver", [s for s in GRIDDED if "start" in s.options], ids=lambda solver: solver.name)
def test_multistep_solvers_take_one_evaluation_per_step(solver):
    scheduler = SolverScheduler(solver.name)
    for steps in (1, 2, 5):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps


def test_options_reach_the_solver():
    name, option = next(((s.name, o) for s in GRIDDED for o in s.options if o == "alpha"), (None, None))
    if name is None:
        pytest.skip("no solver with an option alpha")
    made = SolverScheduler(name, {option: 0.5})
    made.set_timesteps(3)
    x = normal(2, 3)
    expected = solvers.integrate(solvers.named[name].using(alpha=0.5), field, x, [0, 1 / 3, 2 / 3, 1], port=END)
    torch.testing.assert_close(run(made, x), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(TypeError, match="no option 'beta'"):
        SolverScheduler(name, {"beta": 1})


def test_heun_is_flow_matching_heun():
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    ours = SolverScheduler("heun", shift=3.0, timestep_spacing="linspace")
    x = normal(2, 3, 4)
    for each in (ours, theirs):
        each.set_timesteps(5)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.order == theirs.order == 2
    torch.testing.assert_close(run(ours, x), run(theirs, x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("dpm_solver_pp_2m" not in solvers.named, reason="DPM-Solver++(2M) is not in this build")
def test_dpm_solver_is_diffusers_with_flow_sigmas():
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, lower_order_final=True
    )
    theirs.set_timesteps(8)
    sigmas = theirs.sigmas[:-1].double()
    ours = SolverScheduler("dpm_solver_pp_2m")
    ours.set_timesteps(sigmas=sigmas.tolist())
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), atol=1e-6, rtol=0)
    x = y = normal(2, 3, 4)
    for i in range(8):
        sigma = float(sigmas[i])
        x = ours.step(network(x, sigma), ours.timesteps[i], x).prev_sample
        y = theirs.step(network(y, sigma), theirs.timesteps[i], y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_direction_and_the_order_are_right(solver, order):
    """Against the exact flow of a Gaussian: a turned sign or time would not converge."""
    oracle, x = Gaussian(), normal(64).double().reshape(8, 8)
    errors = []
    for steps in (20, 40):
        scheduler = SolverScheduler(solver, evaluate_at_data=True)
        scheduler.set_timesteps(steps)
        z = x
        for i, t in enumerate(scheduler.timesteps):
            z = scheduler.step(-oracle.velocity(z, 1 - float(scheduler.sigmas[i])), t, z).prev_sample
        errors.append(float((z - oracle.jump(x, 0.0, 1.0)).abs().max()))
    assert errors[1] < 0.1 and abs(np.log2(errors[0] / errors[1]) - order) < 0.25


def test_a_solver_of_several_evaluations_lists_them_all():
    scheduler = SolverScheduler("heun")
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3])
    last = SolverScheduler("heun", evaluate_at_data=True)
    last.set_timesteps(3)
    assert last.timesteps.tolist() == pytest.approx([1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3, 0])


def test_one_launch_for_every_point(monkeypatch):
    launches = []
    real = replay.evaluate
    monkeypatch.setattr(replay, "evaluate", lambda *c, **k: launches.append(1) or real(*c, **k))
    for solver in ("euler", "heun"):
        scheduler = SolverScheduler(solver)
        scheduler.set_timesteps(4)
        launches.clear()
        run(scheduler, normal(2, 3))
        assert len(launches) == len(scheduler.timesteps)


def test_no_step_reads_a_tensor():
    for solver in ("euler", "heun"):
        scheduler, x, u = SolverScheduler(solver), normal(2, 3), normal(2, 3, seed=2)
        scheduler.set_timesteps(4)
        with Unread():
            for t in scheduler.timesteps:
                x = scheduler.step(u, t, x).prev_sample


def test_the_state_may_be_changed_between_steps_only():
    x = normal(2, 3)
    scheduler = SolverScheduler("euler")
    scheduler.set_timesteps(2)
    v, w = normal(2, 3, seed=2), normal(2, 3, seed=3)
    half = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    end = scheduler.step(w, scheduler.timesteps[1], 0.25 * half).prev_sample  # inpainting, say
    torch.testing.assert_close(end, 0.25 * (x - 0.5 * v) - 0.5 * w)
    scheduler.set_timesteps(2)
    half = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    half.mul_(0.25)  # or in place
    torch.testing.assert_close(scheduler.step(w, scheduler.timesteps[1], half).prev_sample, end)
    two = SolverScheduler("heun")
    two.set_timesteps(2)
    stage = two.step(v, two.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="changed between two evaluations"):
        two.step(w, two.timesteps[1], stage * 0.25)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", ["heun", "rk4", "dpm_solver_pp_2s"])
def test_a_point_written_to_inside_a_step_raises(solver, mode):
    with mode():
        scheduler, x = SolverScheduler(solver), normal(2, 3)
        scheduler.set_timesteps(3)
        point = scheduler.step(normal(2, 3, seed=2), scheduler.timesteps[0], x).prev_sample
        point.mul_(2.0)
        with pytest.raises(ValueError, match="changed between two evaluations"):
            scheduler.step(normal(2, 3, seed=3), scheduler.timesteps[1], point)


def test_a_solver_object_is_named():
    with pytest.raises(TypeError, match=r"solver='heun_alpha', solver_options=\{'alpha': 0.5\}"):
        SolverScheduler(solver=solvers.heun_alpha.using(alpha=0.5))
    with pytest.raises(TypeError, match="solver is list"):
        SolverScheduler(solver=[])


@pytest.mark.parametrize("solver", ["edm_heun", "dpm_solver_pp_sde", "edm_heun_churn"])
def test_image_to_image_of_steps_that_differ_is_refused_before_the_run(solver):
    """Pipelines begin at a multiple of `order`; the first step of these takes one evaluation, so that is inside one."""
    scheduler = SolverScheduler(solver)
    scheduler.set_timesteps(6)
    if solver != "edm_heun_churn":
        with pytest.raises(ValueError, match=r"entry 6, is inside .* begin at entry 5 or 7; image-to-image"):
            scheduler.set_begin_index(3 * scheduler.order)
        assert scheduler.begin_index is None
        scheduler.set_begin_index(5)
    else:
        scheduler.set_begin_index(6)
        with pytest.raises(ValueError, match=r"entry 5, is inside .* begin at entry 4 or 6"):
            scheduler.set_begin_index(5)


def test_starting_in_the_middle():
    x = normal(2, 3)
    for solver in ("euler", "heun"):
        grid = [0.5, 0.75, 1.0]
        expected = solvers.integrate(solvers.named[solver], field, x, grid, port=END)
        scheduler = SolverScheduler(solver)
        for begin in (True, False):
            for handed in (lambda t: t, torch.clone, float):
                scheduler.set_timesteps(4)
                start = 2 * scheduler.order
                if begin:
                    scheduler.set_begin_index(start)
                z = x
                for i, t in enumerate(scheduler.timesteps[start:]):
                    z = scheduler.step(network(z, float(scheduler.sigmas[start + i])), handed(t), z).prev_sample
                assert torch.equal(z, expected)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="inside a step of heun"):
        scheduler.step(x, scheduler.timesteps[3], x)


def test_out_of_order_raises():
    scheduler, x = SolverScheduler("heun"), normal(2, 3)
    with pytest.raises(ValueError, match="before set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(3)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="entry 1 is due"):
        scheduler.step(x, scheduler.timesteps[2], x)
    with pytest.raises(ValueError, match="none of the 5"):
        scheduler.step(x, 123.0, x)
    with pytest.raises(ValueError, match="none of the 5"):
        scheduler.step(x, scheduler.timesteps[:2], x)
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="all 5 have been taken"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_solvers_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="named ones are euler"):
        SolverScheduler("nonsense")
    with pytest.raises(ValueError, match="use FlowMapScheduler"):
        SolverScheduler("flow_map")
    adaptive = next((s.name for s in solvers.named.values() if s.loop is not None), None)
    if adaptive is not None:
        with pytest.raises(ValueError, match="chooses its own steps"):
            SolverScheduler(adaptive)


def _renoise(velocity, x, s, t, memory):
    """A stochastic step that remembers."""
    v = velocity(x, s)
    mean = x + (t - s) * v if memory is None else x + (t - s) * (1.5 * v - 0.5 * memory)
    return mean + 0.2 * (t - s) * velocity.noise(), v


def test_noise_is_that_of_the_driver_and_drawn_once(monkeypatch):
    made = solvers.Solver(_renoise, "renoise", None, 1, stochastic=True)
    monkeypatch.setitem(solvers.named, "renoise", made)
    x = normal(3, 4)
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    scheduler = SolverScheduler("renoise", seed=7)
    scheduler.set_timesteps(4)
    assert torch.equal(run(scheduler, x), solvers.integrate(made, field, x, grid, port=END, seed=7))
    drawn = []
    for seed in (1, 1, 2):
        scheduler = SolverScheduler("renoise")
        scheduler.set_timesteps(4)
        drawn.append(run(scheduler, x, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="2 generators"):
        scheduler.set_timesteps(4)
        run(scheduler, x, generator=[torch.Generator()] * 2)
    before = torch.get_rng_state()
    scheduler.set_timesteps(4)  # finding the times draws nothing from torch's generator
    assert torch.equal(before, torch.get_rng_state())


def _churn(velocity, x, s, t, memory, *, first=False):
    """Leaves the state before it asks, as the churn of EDM does."""
    away = x + 0.5 * velocity.noise() if first or s > 0.0 else x
    return away + (t - s) * velocity(away, s), memory


def test_a_step_may_leave_the_state_before_it_asks_but_not_the_first(monkeypatch):
    churn = solvers.solver(order=None, stochastic=True)(_churn)
    monkeypatch.setitem(solvers.named, "churn", churn)
    scheduler, x = SolverScheduler("churn", seed=3), normal(2, 3)
    scheduler.set_timesteps(4)
    expected = solvers.integrate(churn, field, x, [0.0, 0.25, 0.5, 0.75, 1.0], port=END, seed=3)
    assert torch.equal(run(scheduler, x), expected)
    with pytest.raises(ValueError, match="away from the state"):
        SolverScheduler("churn", {"first": True}).set_timesteps(4)


def test_times_that_depend_on_values_raise(monkeypatch):
    def wander(velocity, x, s, t, memory):
        v = velocity(x, s)
        middle = s + (t - s) * min(float(pfm.inner(v)[0]) % 1, 0.9)
        return x + (t - s) * velocity(x + (middle - s) * v, middle), memory

    monkeypatch.setitem(solvers.named, "wander", solvers.Solver(wander, "wander", 2, 2))
    scheduler, x = SolverScheduler("wander"), normal(2, 3)
    scheduler.set_timesteps(2)
    with pytest.raises(RuntimeError, match="does not ask at times that the grid alone decides"):
        run(scheduler, x)


def test_gradients_flow_through_every_evaluation():
    x = normal(2, 3).double().requires_grad_()
    scheduler = SolverScheduler("heun", evaluate_at_data=True)
    scheduler.set_timesteps(2)
    z = x
    for t in scheduler.timesteps:
        z = scheduler.step(-0.7 * z, t, z).prev_sample
    z.sum().backward()
    growth = (1 + 0.35 + 0.35**2 / 2) ** 2  # Heun's of x' = 0.7 x, h = 1/2
    torch.testing.assert_close(x.grad, torch.full_like(x, growth))


def test_saved_and_loaded(tmp_path):
    scheduler = SolverScheduler("heun", shift=2.0, seed=4, evaluate_at_data=True)
    scheduler.save_pretrained(tmp_path)
    again = SolverScheduler.from_pretrained(tmp_path)
    x = normal(2, 3)
    for each in (scheduler, again):
        each.set_timesteps(3)
    assert again.config.solver == "heun" and again.config.seed == 4
    assert torch.equal(run(again, x), run(scheduler, x))
