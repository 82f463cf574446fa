"""Real pipelines of diffusers, with small random transformers, our schedulers in place of theirs."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from diffusers import (  # noqa: E402
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from integrations import models, pipelines  # noqa: E402
from integrations.models import normal  # noqa: E402

import pyflowmap as pfm  # noqa: E402
from pyflowmap import solvers  # noqa: E402
from pyflowmap.integrations.diffusers import FlowMapScheduler, SolverScheduler  # noqa: E402

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def flux(scheduler):
    made = pipelines.load("FluxPipeline")(scheduler, None, None, None, None, None, models.flux(guidance=True))
    made.options = dict(
        prompt_embeds=normal(2, 3, 12, seed=2),
        pooled_prompt_embeds=normal(2, 10, seed=3),
        latents=normal(2, 16, 4),
        height=64,
        width=64,
        num_inference_steps=4,
    )
    return made


def sd3(scheduler):
    load = pipelines.load("StableDiffusion3Pipeline")
    made = load(models.sd3(), scheduler, None, None, None, None, None, None, None)
    made.options = dict(
        prompt_embeds=normal(2, 3, 12, seed=2),
        pooled_prompt_embeds=normal(2, 10, seed=3),
        negative_prompt_embeds=normal(2, 3, 12, seed=4),
        negative_pooled_prompt_embeds=normal(2, 10, seed=5),
        latents=normal(2, 4, 8, 8),
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    return made


def wan(scheduler):
    made = pipelines.load("WanPipeline")(None, None, None, scheduler, models.wan())
    made.options = dict(
        prompt_embeds=normal(1, 3, 12, seed=2),
        negative_prompt_embeds=normal(1, 3, 12, seed=4),
        latents=normal(1, 4, 3, 4, 4),
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    return made


def anyflow(scheduler):
    load = pipelines.load("AnyFlowPipeline")
    made = load(None, None, models.anyflow(), None, scheduler)
    made.options = dict(
        prompt_embeds=normal(1, 5, 12, seed=2),
        latents=normal(1, 4, 3, 4, 4),
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
    )
    return made


def run(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{**pipeline.options, **options}, output_type="latent", return_dict=False)[0]


FLOW_MATCHING = [
    (flux, {"use_dynamic_shifting": True, "shift": 3.0}),
    (flux, {}),
    (sd3, {"shift": 3.0}),
    (wan, {"shift": 5.0}),
]


@pytest.mark.parametrize("pipeline, config", FLOW_MATCHING, ids=lambda v: getattr(v, "__name__", None))
def test_flow_map_scheduler_is_their_euler(pipeline, config):
    made = pipeline(FlowMatchEulerDiscreteScheduler(**config))
    theirs = run(made)
    assert (theirs - made.options["latents"]).abs().max() > 0.1  # something happened
    made.scheduler = FlowMapScheduler.from_config(made.scheduler.config)
    torch.testing.assert_close(run(made), theirs, **CLOSE)
    made.scheduler = SolverScheduler.from_config(made.scheduler.config, solver="euler")
    torch.testing.assert_close(run(made), theirs, **CLOSE)


@pytest.mark.parametrize("pipeline", [sd3, wan])
def test_heun_is_their_heun(pipeline):
    made = pipeline(FlowMatchHeunDiscreteScheduler(shift=3.0))
    theirs = run(made)
    made.scheduler = SolverScheduler("heun", shift=3.0, timestep_spacing="linspace")
    torch.testing.assert_close(run(made), theirs, **CLOSE)
    euler = run(pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    assert (euler - theirs).abs().max() > 1e-3  # the second evaluations count


@pytest.mark.parametrize("order", [1, 2])
def test_a_pipeline_that_starts_in_the_middle(order):
    """It hands over the last half of `timesteps` and says nothing about where that begins."""
    theirs = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)[order - 1](shift=3.0)
    made = pipelines.load("WanVideoToVideoPipeline")(None, None, models.wan(), None, theirs)
    made.options = wan(theirs).options | dict(strength=0.5, num_inference_steps=6)
    del made.options["num_frames"]
    expected = run(made)
    full = run(made, strength=1.0)
    assert (full - expected).abs().max() > 1e-2
    made.scheduler = SolverScheduler(("euler", "heun")[order - 1], shift=3.0, timestep_spacing="linspace")
    torch.testing.assert_close(run(made), expected, **CLOSE)


@pytest.mark.skipif("dpm_solver_pp_2m" not in solvers.named, reason="DPM-Solver++(2M) is not in this build")
def test_dpm_solver_is_their_dpm_solver():
    class Unrounded(diffusers.DPMSolverMultistepScheduler):
        """Theirs asks the network at the timestep cut to a whole number, 665 for 0.666, but steps from 0.666."""

        def set_timesteps(self, *given, **named):
            super().set_timesteps(*given, **named)
            self.timesteps = self.sigmas[:-1].float() * 1000

    theirs = Unrounded(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made = sd3(theirs)
    expected = run(made)
    sigmas = theirs.sigmas[:-1].tolist()
    made.scheduler = SolverScheduler("dpm_solver_pp_2m")
    torch.testing.assert_close(run(made, num_inference_steps=None, sigmas=sigmas), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("solver", [s.name for s in solvers.named.values() if s.takes == "velocity" and not s.loop])
def test_every_solver_runs_in_a_pipeline(solver):
    made = sd3(SolverScheduler(solver, seed=1, shift=3.0))
    options = made.options
    grid = [1.0 - s for s in [*(3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)), 0.0]]
    fm = pfm.FlowMap(made.transformer, prediction="velocity", call="sd3")
    guidance = pfm.guidance.cfg(
        3.0,
        null={
            "encoder_hidden_states": options["negative_prompt_embeds"],
            "pooled_projections": options["negative_pooled_prompt_embeds"],
        },
    )
    condition = {
        "encoder_hidden_states": options["prompt_embeds"],
        "pooled_projections": options["pooled_prompt_embeds"],
    }
    chosen = solvers.named[solver]
    if "start" in chosen.options:
        chosen = chosen.using(start="low")
    seed = {"seed": 1} if chosen.stochastic else {}
    with torch.no_grad():
        ours = pfm.sample(
            fm, options["latents"], grid=grid, solver=chosen, condition=condition, guidance=guidance, **seed
        )
    made.scheduler = SolverScheduler(solver, seed=1, shift=3.0, evaluate_at_data=True)  # as pfm.sample does
    torch.testing.assert_close(run(made), ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"num_inference_steps": 1}, {"use_mean_velocity": False}, {"sigmas": [1.0, 0.4]}]
)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_anyflow(shift, options):
    made = anyflow(FlowMapEulerDiscreteScheduler(shift=shift))
    theirs = run(made, **options)
    made.scheduler = FlowMapScheduler.from_config(made.scheduler.config, timestep_spacing="trailing")
    torch.testing.assert_close(run(made, **options), theirs.float(), **CLOSE)


def test_anyflow_is_the_flow_map_under_our_own_driver():
    made = anyflow(FlowMapScheduler(shift=5.0))
    fm = pfm.FlowMap(made.transformer, call="anyflow")
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    start = made.options["latents"].transpose(1, 2)
    with torch.no_grad():
        ours = pfm.sample(
            fm,
            start.contiguous(),
            grid=[1 - s for s in sigmas],
            condition={"encoder_hidden_states": made.options["prompt_embeds"]},
        )
    torch.testing.assert_close(run(made), ours.transpose(1, 2), **CLOSE)


def test_anyflow_with_frames_given_continues_them():
    given = normal(1, 1, 4, 4, 4, seed=8)
    made = anyflow(FlowMapEulerDiscreteScheduler())
    theirs = run(made, video_latents=given)
    made.scheduler = FlowMapScheduler()
    ours = run(made, video_latents=given)
    torch.testing.assert_close(ours, theirs.float(), **CLOSE)
    torch.testing.assert_close(ours[:, :, 0], given[:, 0])


@pytest.mark.parametrize("pipeline", [flux, sd3, anyflow])
def test_a_pipeline_is_saved_and_loaded_with_our_scheduler(tmp_path, pipeline):
    ours = FlowMapScheduler(shift=3.0) if pipeline is anyflow else SolverScheduler("heun", shift=3.0)
    made = pipeline(ours)
    made.save_pretrained(tmp_path)
    others = {name: each for name, each in made.components.items() if name != "scheduler"}
    again = type(made).from_pretrained(tmp_path, **others)
    assert type(again.scheduler) is type(ours) and again.scheduler.config.shift == 3.0
    again.options = made.options
    torch.testing.assert_close(run(again), run(made), **CLOSE)


def test_callbacks_between_steps_see_and_change_the_state():
    made = sd3(FlowMapScheduler(shift=3.0))
    seen = []

    def halve(pipeline, i, t, given):
        seen.append(given["latents"].clone())
        return {"latents": 0.5 * given["latents"]}

    by_solver = sd3(SolverScheduler("euler", shift=3.0))
    first = run(made, callback_on_step_end=halve)
    torch.testing.assert_close(run(by_solver, callback_on_step_end=halve), first, **CLOSE)
    assert len(seen) == 8
