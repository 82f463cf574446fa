"""What is easily got wrong with schedulers: each was silent once, or ended in an error that did not help."""

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

from pyflowmap.integrations.diffusers import FlowMapScheduler, SolverScheduler


def test_a_time_per_sample_goes_with_a_time_per_frame():
    """By leading dimensions, also where there are as many frames as samples."""
    z = torch.zeros(2, 2, 1, 1, 1)
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(4)
    r = torch.tensor([0.0, 500.0])
    moved = scheduler.step(torch.ones_like(z), torch.full((2, 2), 1000.0), z, r_timestep=r).prev_sample
    assert torch.equal(moved[:, :, 0, 0, 0], torch.tensor([[-1.0, -1.0], [-0.5, -0.5]]))


@pytest.mark.parametrize("cast", [lambda t: t.bfloat16(), lambda t: t.half(), lambda t: t.round().long(), lambda t: t])
@pytest.mark.parametrize("steps", [3, 7, 30])
def test_rounded_timesteps_per_sample_still_walk_the_schedule(cast, steps):
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(steps)
    x = torch.zeros(2, 1)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones(2, 1), cast(t.expand(2)), x).prev_sample
    torch.testing.assert_close(x, torch.full((2, 1), -1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", [FlowMapScheduler, SolverScheduler])
@pytest.mark.parametrize(
    "name",
    [
        "SCMScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
        "DDPMWuerstchenScheduler",
        "IPNDMScheduler",
        "DDIMScheduler",
    ],
)
def test_configs_of_models_that_are_not_flow_matching(cls, name, tmp_path):
    theirs = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=r"no scheduler of flow matching has|belongs to a diffusion model"):
        cls.from_config(theirs.config)
    theirs.save_config(tmp_path)
    with pytest.raises(ValueError, match=r"no scheduler of flow matching has|belongs to a diffusion model"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_config_in_memory_gives_the_levels_of_the_saved_one(name, tmp_path):
    theirs = getattr(diffusers, name)(shift=3.0)
    theirs.save_config(tmp_path)
    saved = SolverScheduler.from_pretrained(tmp_path, solver="heun")
    here = SolverScheduler.from_config(theirs.config, solver="heun")
    for each in (saved, here, theirs):
        each.set_timesteps(4)
    assert torch.equal(saved.timesteps, here.timesteps)
    expected = theirs.timesteps.unique().flip(0)
    torch.testing.assert_close(here.timesteps.unique().flip(0), expected, rtol=1e-6, atol=1e-3)


def test_a_point_changed_in_place_inside_a_step():
    scheduler = SolverScheduler("heun")
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    x.mul_(2)
    with pytest.raises(ValueError, match="changed between two evaluations of one step"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_a_state_changed_in_place_between_steps_counts():
    results = []
    for in_place in (True, False):
        scheduler = SolverScheduler("euler")
        scheduler.set_timesteps(2)
        x = torch.ones(1, 2)
        x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
        x = x.mul_(2) if in_place else x * 2
        results.append(scheduler.step(x, scheduler.timesteps[1], x).prev_sample)
    assert torch.equal(*results)


def test_a_short_training_schedule_still_tells_its_entries_apart():
    scheduler = FlowMapScheduler(num_train_timesteps=1, shift=12.0)
    scheduler.set_timesteps(100)
    times, x = scheduler.timesteps.tolist(), torch.zeros(1, 2)
    for a, b in zip(times, [*times[1:], 0.0]):
        x = scheduler.step(torch.ones(1, 2), a, x, r_timestep=b).prev_sample
    torch.testing.assert_close(x, torch.full((1, 2), -1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("t", "r", "words"),
    [(500.0, -1000.0, "r_timestep is -1"), (1500.0, 0.0, "timestep is 1.5")],
)
def test_times_off_the_path(t, r, words):
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=words):
        scheduler.step(torch.ones(1, 2), t, torch.zeros(1, 2), r_timestep=r)
