"""FlowMapScheduler against the formula, and against diffusers' own schedulers where those are right."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402
from integrations.models import normal  # noqa: E402

from pyflowmap.integrations.diffusers import FlowMapScheduler  # noqa: E402

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def network(x, timestep):
    """Any function of state and time that is not linear in either."""
    return torch.sin(2 * x + timestep / 300) + 0.3 * x


def run(scheduler, x, steps=4, **schedule):
    scheduler.set_timesteps(steps, **schedule)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.float()), t, x, return_dict=False)[0]
    return x


def test_without_diffusers_the_error_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "pyflowmap.integrations.diffusers")
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"pyflowmap\[diffusers\]\""):
        importlib.import_module("pyflowmap.integrations.diffusers")


def test_pyflowmap_does_not_import_diffusers():
    code = "import sys, pyflowmap, pyflowmap.integrations; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_trailing_levels_are_those_of_anyflow(shift, steps):
    ours, theirs = FlowMapScheduler(shift=shift), FlowMapEulerDiscreteScheduler(shift=shift)
    given = [1 - k / steps**1.1 for k in range(steps)]
    for schedule in ({}, {"sigmas": given}, {"timesteps": [1000 * s for s in given]}):
        for each in (ours, theirs):
            each.set_timesteps(steps, **schedule)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), atol=2e-7, rtol=0)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), atol=2e-4, rtol=0)
    assert ours.timesteps.dtype == torch.float32
    assert ours.num_inference_steps == steps


@pytest.mark.parametrize(
    "config, schedule",
    [
        ({}, {}),
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.7}),
        ({"shift": 2.0, "shift_terminal": 0.1}, {}),
        ({"shift": 3.0, "num_train_timesteps": 500}, {}),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_linspace_levels_are_those_of_flow_matching_to_the_bit(config, schedule, given):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowMapScheduler.from_config(theirs.config)
    assert ours.config.timestep_spacing == "linspace"
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, atol=2e-4, rtol=0)  # of training
    for steps in (2, 5, 28):
        sigmas = {"sigmas": [1 - k / steps for k in range(steps)]} if given else {}
        for each in (ours, theirs):
            each.set_timesteps(steps, **schedule, **sigmas)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_golden_levels():
    scheduler = FlowMapScheduler(shift=3.0)
    scheduler.set_timesteps(4)  # 3 s / (1 + 2 s) at s = 1, 3/4, 1/2, 1/4
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 900.0, 750.0, 500.0]))
    scheduler.set_shift(1.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0


@pytest.mark.parametrize(
    "schedule, message",
    [
        ({}, "neither"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "1 levels are given"),
        ({"sigmas": [0.2, 0.8]}, "do not fall"),
        ({"sigmas": [1.0, 0.0]}, "without the final 0"),
        ({"sigmas": [1.5, 0.5]}, "at most 1"),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000.0, 400.0]}, "both given and differ"),
    ],
)
def test_schedules_that_make_no_sense_raise(schedule, message):
    with pytest.raises(ValueError, match=message):
        FlowMapScheduler().set_timesteps(**schedule)


def test_configs():
    with pytest.raises(ValueError, match="needs mu"):
        FlowMapScheduler(use_dynamic_shifting=True).set_timesteps(4)
    for wrong in ({"time_shift_type": "cubic"}, {"timestep_spacing": "leading"}, {"shift": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlowMapScheduler(**wrong)
    for key in ("use_karras_sigmas", "invert_sigmas", "stochastic_sampling"):  # silently dropped, they would mislead
        with pytest.raises(ValueError, match=key):
            FlowMapScheduler.from_config(FlowMatchEulerDiscreteScheduler(**{key: True}).config)
    with pytest.raises(ValueError, match="diffusion model"):
        FlowMapScheduler.from_config(diffusers.DDIMScheduler().config)
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert FlowMapScheduler.from_config(unipc.config).config.shift == 3.0  # Wan's


def test_saved_and_loaded(tmp_path):
    scheduler = FlowMapScheduler(shift=2.5, timestep_spacing="linspace", shift_terminal=0.05)
    scheduler.save_pretrained(tmp_path)
    again = FlowMapScheduler.from_pretrained(tmp_path)
    assert {k: again.config[k] for k in scheduler.config if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    x = normal(2, 3)
    assert torch.equal(run(again, x), run(scheduler, x))
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)  # and back to diffusers' own
    assert theirs.config.shift == 2.5


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_runs_as_anyflows_and_as_flow_matching(shift):
    x = normal(2, 3, 4)
    torch.testing.assert_close(
        run(FlowMapScheduler(shift=shift), x), run(FlowMapEulerDiscreteScheduler(shift=shift), x).float(), **CLOSE
    )
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(run(FlowMapScheduler.from_config(theirs.config), x), run(theirs, x), **CLOSE)


def test_any_time_to_any_other():
    ours, theirs = FlowMapScheduler(shift=3.0), FlowMapEulerDiscreteScheduler(shift=3.0)
    x, u = normal(2, 3, seed=2), normal(2, 3)
    for each in (ours, theirs):
        each.set_timesteps(4)
    for t, r in ((1000.0, 0.0), (750.0, 500.0), (640.5, 123.25), (500.0, 500.0), (100.0, 0.125)):
        expected = theirs.step(u, t, x, r_timestep=r).prev_sample
        torch.testing.assert_close(ours.step(u, t, x, r_timestep=r).prev_sample, expected.float(), **CLOSE)
        given = ours.step(u, torch.tensor(t), x, r_timestep=torch.tensor(r)).prev_sample
        torch.testing.assert_close(given, x + (r - t) / 1000 * u, **CLOSE)


def test_every_sample_and_every_frame_may_have_its_own_times():
    scheduler = FlowMapScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x, u = normal(3, 2, 5, seed=2), normal(3, 2, 5)
    for shape in ((3,), (3, 2)):
        t = 1000 * torch.rand(shape)
        r = t * torch.rand(shape)
        exact = x.double() + ((r - t).double() / 1000).reshape(*shape, *[1] * (3 - len(shape))) * u.double()
        moved = scheduler.step(u, t, x, r_timestep=r).prev_sample
        torch.testing.assert_close(moved.double(), exact, atol=1e-6, rtol=1e-6)
    # without r: each row to the next level below its own; 0 is a clean frame and stays
    rows = torch.tensor([[1000.0, 900.0], [750.0, 600.0], [0.0, 500.0]])
    below = torch.tensor([[900.0, 750.0], [500.0, 500.0], [0.0, 0.0]])
    moved = scheduler.step(u, rows, x).prev_sample
    torch.testing.assert_close(moved, x + ((below - rows) / 1000)[..., None] * u, **CLOSE)
    assert torch.equal(moved[2, 0], x[2, 0])
    for wrong in (torch.rand(2), torch.rand(3, 5), torch.rand(3, 2, 5)):
        with pytest.raises(ValueError, match="leading dimensions"):
            scheduler.step(u, 1000 * wrong, x, r_timestep=0.0)


def test_a_time_per_sample_beside_one_per_frame():
    """B == F: nothing but the axis tells them apart."""
    x, u = normal(2, 2, 5, seed=2).double(), normal(2, 2, 5).double()
    rows, frames = torch.tensor([200.0, 500.0]), torch.tensor([[1000.0, 900.0], [800.0, 700.0]])
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(4)
    moved = scheduler.step(u, frames, x, r_timestep=rows).prev_sample
    for b in range(2):
        for f in range(2):
            step = (rows[b] - frames[b, f]).item() / 1000
            torch.testing.assert_close(moved[b, f], x[b, f] + step * u[b, f], atol=1e-6, rtol=0)
    moved = scheduler.step(u, torch.tensor([1000.0, 600.0]), x, r_timestep=frames / 2).prev_sample
    exact = x + (frames / 2000 - torch.tensor([[1.0], [0.6]])).double()[..., None] * u
    torch.testing.assert_close(moved, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [3, 7, 40])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_rounded_timesteps_are_the_entries_they_came_from(kind, rows, steps):
    """From noise to data along a constant velocity the steps add up to -1, whatever the dtype of the timesteps."""
    scheduler, x = FlowMapScheduler(shift=0.9), torch.zeros(rows, 1, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    levels = []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones_like(x), t.expand(rows).to(kind), x).prev_sample
        levels.append(1 + float(x[0, 0]))
    torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_timesteps_that_rounding_merged_raise(rows):
    scheduler, x = FlowMapScheduler(), torch.zeros(rows, 1)
    scheduler.set_timesteps(300)
    with pytest.raises(ValueError, match=r"1000 and 996\.667 .* cannot be told apart in torch.bfloat16"):
        scheduler.step(x, scheduler.timesteps[1].expand(rows).bfloat16(), x)
    moved = scheduler.step(x + 1, torch.full((rows,), 996.0).bfloat16(), x, r_timestep=0.0).prev_sample
    torch.testing.assert_close(moved, x - 0.996)  # r_timestep needs no schedule


def test_a_short_training_schedule_has_near_timesteps():
    """num_train_timesteps = 1, levels 8e-4 apart: each r_timestep is its own entry and not the one being left."""
    scheduler, x = FlowMapScheduler(num_train_timesteps=1, shift=12.0), torch.zeros(1, 2)
    scheduler.set_timesteps(100)
    times = scheduler.timesteps.tolist()
    for t, r in zip(times, [*times[1:], 0.0]):
        x = scheduler.step(torch.ones_like(x), t, x, r_timestep=r).prev_sample
    torch.testing.assert_close(x, -torch.ones_like(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "t, r, message",
    [
        (500.0, 700.0, "r_timestep lies 200 above timestep"),
        (torch.tensor([800.0, 500.0]), 700.0, "r_timestep lies 200 above timestep"),
        (1000.0, torch.tensor([1000.0, 1001.0]), "r_timestep = 1001"),
        (1000.0, -1000.0, "r_timestep = -1000"),
        (1500.0, 0.0, "timestep = 1500"),
        (torch.tensor([1000.0, float("nan")]), 0.0, "timestep = nan"),
    ],
)
def test_times_that_no_jump_has_raise(t, r, message):
    scheduler, x = FlowMapScheduler(), normal(2, 3)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        scheduler.step(x, t, x, r_timestep=r)
    if "lies" not in message and "r_" not in message:
        with pytest.raises(ValueError, match=message):
            scheduler.scale_noise(x, t, x)


FOREIGN = [
    "SCMScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "IPNDMScheduler",
    "DDPMWuerstchenScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "LTXEulerAncestralRFScheduler",
    "DDIMScheduler",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("saved", [False, True])
def test_configs_of_other_models_are_refused(name, saved, tmp_path):
    theirs = getattr(diffusers, name)()
    if saved:
        theirs.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{name} (has|belongs)"):
            FlowMapScheduler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(the config|Scheduler) (has|belongs)"):
        FlowMapScheduler.from_config(type(theirs).from_pretrained(tmp_path).config if saved else theirs.config)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMapEulerDiscreteScheduler"])
def test_a_config_of_shift_alone_is_theirs_or_refused(name, tmp_path):
    theirs = getattr(diffusers, name)(shift=3.0)
    with pytest.raises(ValueError, match="pass timestep_spacing="):
        FlowMapScheduler.from_config(theirs.config)
    theirs.save_pretrained(tmp_path)
    spacing = "linspace" if "Heun" in name else "trailing"
    theirs.set_timesteps(4)
    wanted = theirs.sigmas.float().unique()
    for ours in (
        FlowMapScheduler.from_pretrained(tmp_path),
        FlowMapScheduler.from_config(type(theirs).from_pretrained(tmp_path).config),
        FlowMapScheduler.from_config(theirs.config, timestep_spacing=spacing),
    ):
        ours.set_timesteps(4)
        torch.testing.assert_close(ours.sigmas.unique(), wanted, atol=1e-6, rtol=0)


def test_where_diffusers_own_is_wrong():
    """FlowMapEulerDiscreteScheduler looks the first of several times up, and uses it for all of them."""
    ours, theirs = FlowMapScheduler(), FlowMapEulerDiscreteScheduler()
    for each in (ours, theirs):
        each.set_timesteps(4)
    x, u = torch.zeros(2, 3), torch.ones(2, 3)
    t, r = torch.tensor([1000.0, 600.0]), torch.zeros(2)
    right = torch.tensor([-1.0, -0.6])[:, None].expand(2, 3)
    torch.testing.assert_close(ours.step(u, t, x, r_timestep=r).prev_sample, right)
    assert not torch.allclose(theirs.step(u, t, x, r_timestep=r).prev_sample.float(), right)
    # it rounds the timestep to the dtype of the sample before it uses it: 998.5 becomes 1000, and no data is left
    one, zero = torch.ones(1, 3, dtype=torch.bfloat16), torch.zeros(1, 3, dtype=torch.bfloat16)
    kept = torch.full((1, 3), 0.0015).to(torch.bfloat16)
    torch.testing.assert_close(ours.scale_noise(one, torch.tensor([998.5]), zero), kept)
    assert (theirs.scale_noise(one, torch.tensor([998.5]), zero) == 0).all()
    # it rounds the state to the dtype of the network's output: here a step is lost altogether
    x, v = torch.full((1, 3), 256.0), torch.full((1, 3), -1.0, dtype=torch.bfloat16)
    assert (ours.step(v, 1000.0, x, r_timestep=900.0).prev_sample == 256.1).all()
    assert (theirs.step(v, 1000.0, x, r_timestep=900.0).prev_sample == 256).all()

    # it steps before there is a schedule, and drops timesteps where sigmas are given too
    assert FlowMapEulerDiscreteScheduler().step(v, 1000.0, x) is not None
    theirs.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000.0, 400.0])
    assert theirs.timesteps.tolist() == [1000.0, 500.0]


def test_out_of_order_and_before_the_schedule_raise():
    scheduler, x = FlowMapScheduler(), normal(2, 3)
    with pytest.raises(ValueError, match="before set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(4)
    first, second, third, last = scheduler.timesteps
    scheduler.step(x, first, x)
    assert scheduler.step_index == 1
    for wrong in (first, third, first.clone(), 1000.0):
        with pytest.raises(ValueError, match="entry 1 is due"):
            scheduler.step(x, wrong, x)
    with pytest.raises(ValueError, match="give r_timestep"):
        scheduler.step(x, 700.0, x)
    for t in (second, third.clone(), float(last)):
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 4 have been taken"):
        scheduler.step(x, last, x)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="entry 2 is due"):
        scheduler.step(x, scheduler.timesteps[0], x)
    moved = scheduler.step(x, scheduler.timesteps[2:][0], x).prev_sample
    torch.testing.assert_close(moved, 0.75 * x)
    with pytest.raises(ValueError, match="begin_index = 4"):
        scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="shapes"):
        scheduler.step(x[:, :2], scheduler.timesteps[3], x)


def test_index_for_timestep():
    scheduler = FlowMapScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 1, 2, 3]
    assert scheduler.index_for_timestep(750.0) == 2
    assert scheduler.index_for_timestep(7.0, torch.tensor([9.0, 7.0])) == 1
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.index_for_timestep(700.0)


class Unread(TorchDispatchMode):
    """Raises where a tensor is read by the host: on a GPU each such place waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_tensor():
    scheduler, x, u = FlowMapScheduler(), normal(2, 3, 4), normal(2, 3, 4, seed=2)
    scheduler.set_timesteps(4)
    with Unread():
        for t in scheduler.timesteps:
            x = scheduler.step(u, t, x).prev_sample
        for t in (torch.rand(2), torch.rand(2, 3)):
            scheduler.step(u, 900 * t, x)
            scheduler.step(u, 900 * t, x, r_timestep=500 * t)
            scheduler.scale_noise(x, 900 * t, u)
        scheduler.scale_noise(x, scheduler.timesteps[1], u)
        with pytest.raises(AssertionError, match="local_scalar"):
            float(x[0, 0, 0])


def test_noise_is_added_along_the_line():
    scheduler, x, noise = FlowMapScheduler(shift=3.0), normal(2, 3, 4), normal(2, 3, 4, seed=2)
    for t in (250.0, torch.tensor(250.0), torch.tensor([250.0, 800.0]), torch.tensor([[0, 1000, 250]] * 2)):
        sigma = torch.as_tensor(t).double() / 1000
        sigma = sigma.reshape(*sigma.shape, *[1] * (3 - sigma.dim()))
        exact = (1 - sigma) * x + sigma * noise
        torch.testing.assert_close(scheduler.scale_noise(x, t, noise).double(), exact, atol=1e-6, rtol=1e-6)
        assert torch.equal(scheduler.add_noise(x, noise, t), scheduler.scale_noise(x, t, noise))
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowMapScheduler.from_config(theirs.config)
    for each in (ours, theirs):
        each.set_timesteps(4)
    t = ours.timesteps[1:2].repeat(2)
    torch.testing.assert_close(ours.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise), **CLOSE)


def test_precision_and_gradients():
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(3)
    x = normal(2, 3).double().requires_grad_()
    u = normal(2, 3, seed=2).double().requires_grad_()
    moved = scheduler.step(u, scheduler.timesteps[0], x).prev_sample
    assert moved.dtype == torch.float64
    moved.sum().backward()
    step = float(scheduler.sigmas[1]) - 1.0
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(u.grad, torch.full_like(x, step))
    half = scheduler.step(u.detach().bfloat16(), scheduler.timesteps[1], x.detach().float()).prev_sample
    assert half.dtype == torch.float32
