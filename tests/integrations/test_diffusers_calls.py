"""The ready calls for networks of diffusers, each against the call that its documentation asks for, by hand."""

import pytest
import torch

import pyflowmap as pfm

diffusers = pytest.importorskip("diffusers")
from integrations import models  # noqa: E402
from integrations.models import normal  # noqa: E402

TIMES = torch.tensor([0.2, 0.7])  # ours; theirs run the other way


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_flux_takes_the_fraction_of_noise_and_its_velocity_is_turned():
    network, x = models.flux(), normal(2, 6, 4)
    condition = {
        "encoder_hidden_states": normal(2, 3, 12, seed=2),
        "pooled_projections": normal(2, 10, seed=3),
        "img_ids": normal(6, 3, seed=4),
        "txt_ids": torch.zeros(3, 3),
    }
    fm = pfm.FlowMap(network, prediction="velocity", call="flux")
    by_hand = -network(hidden_states=x, timestep=1 - TIMES, **condition).sample
    torch.testing.assert_close(fm.velocity(x, TIMES, **condition), by_hand)
    assert (fm.velocity(x, 1 - TIMES, **condition) - by_hand).abs().max() > 1e-3  # the time is seen
    batched = {key: value[None].repeat(2, 1, 1) if "ids" in key else value for key, value in condition.items()}
    torch.testing.assert_close(fm.velocity(x, TIMES, **batched), by_hand)
    one = pfm.sample(fm, x, solver="euler", grid=[0.2, 0.3], condition=batched)
    torch.testing.assert_close(one, x - 0.1 * network(x, timestep=torch.full((2,), 0.8), **condition).sample)
    with pytest.raises(ValueError, match="no img_ids"):
        fm.velocity(x, TIMES, encoder_hidden_states=condition["encoder_hidden_states"])
    with pytest.raises(TypeError, match="nonsense"):
        fm.velocity(x, TIMES, **condition, nonsense=1)  # what the network does not know is not dropped
    with pytest.raises(ValueError, match="embeds none"):
        pfm.FlowMap(network, "velocity", call=pfm.calls.flux(guidance=2.0)).velocity(x, TIMES, **condition)


def test_flux_with_an_embedded_guidance_scale():
    network, x = models.flux(guidance=True), normal(2, 6, 4)
    condition = {
        "encoder_hidden_states": normal(2, 3, 12, seed=2),
        "pooled_projections": normal(2, 10, seed=3),
        "img_ids": normal(6, 3, seed=4),
        "txt_ids": torch.zeros(3, 3),
    }
    scale = torch.tensor([3.5, 3.5])
    by_hand = -network(hidden_states=x, timestep=1 - TIMES, guidance=scale, **condition).sample
    fm = pfm.FlowMap(network, "velocity", call=pfm.calls.flux(guidance=3.5))
    torch.testing.assert_close(fm.velocity(x, TIMES, **condition), by_hand)
    plain = pfm.FlowMap(network, "velocity", call="flux")
    torch.testing.assert_close(plain.velocity(x, TIMES, guidance=scale, **condition), by_hand)
    other = fm.velocity(x, TIMES, guidance=scale + 3, **condition)
    assert (other - by_hand).abs().max() > 1e-4  # the condition's own scale wins
    with pytest.raises(ValueError, match="embeds its guidance"):
        plain.velocity(x, TIMES, **condition)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_sd3_and_wan_take_timesteps_out_of_a_thousand(name):
    network = getattr(models, name)()
    x = normal(2, 4, 8, 8) if name == "sd3" else normal(2, 4, 3, 4, 4)
    condition = {"encoder_hidden_states": normal(2, 3, 12, seed=2)}
    if name == "sd3":
        condition["pooled_projections"] = normal(2, 10, seed=3)
    fm = pfm.FlowMap(network, prediction="velocity", call=name)
    by_hand = -network(hidden_states=x, timestep=1000 * (1 - TIMES), **condition).sample
    torch.testing.assert_close(fm.velocity(x, TIMES, **condition), by_hand)
    assert (fm.velocity(x, 1 - TIMES, **condition) - by_hand).abs().max() > 1e-3


def test_anyflow_takes_both_times_for_every_frame():
    network, x = models.anyflow(), normal(2, 3, 4, 4, 4)
    condition = {"encoder_hidden_states": normal(2, 5, 12, seed=2)}
    fm = pfm.FlowMap(network, call="anyflow")
    ends = torch.tensor([0.5, 1.0])

    def by_hand(t, r):
        return network(hidden_states=x, timestep=t, r_timestep=r, **condition).sample

    timestep, r_timestep = (1000 * (1 - each)[:, None].expand(2, 3) for each in (TIMES, ends))
    u = by_hand(timestep, r_timestep)
    torch.testing.assert_close(fm.mean_velocity(x, TIMES, ends, **condition), -u)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    theirs = [
        scheduler.step(u[i : i + 1], timestep[i, 0], x[i : i + 1], r_timestep=r_timestep[i, 0]).prev_sample
        for i in range(2)
    ]
    torch.testing.assert_close(fm.jump(x, TIMES, ends, **condition), torch.cat(theirs), atol=1e-5, rtol=1e-5)
    assert (by_hand(r_timestep, timestep) - u).abs().max() > 1e-3  # the two times are told apart
    frames = torch.tensor([[0.1, 0.4, 0.9], [0.0, 0.2, 0.3]])
    moved = fm.jump(x, frames, torch.ones(2, 3), **condition)
    expected = x - (1 - frames)[:, :, None, None, None] * by_hand(1000 * (1 - frames), torch.zeros(2, 3))
    torch.testing.assert_close(moved, expected)
    with pytest.raises(ValueError, match="frames before channels"):
        fm.jump(x[:, 0], 0.0, 1.0, **condition)


def test_dit_jumps_are_the_ddim_steps_of_its_own_discrete_schedule():
    network, x = models.dit(), normal(2, 4, 8, 8)
    labels = torch.tensor([3, 10])
    call = pfm.calls.dit()
    fm = pfm.FlowMap(network, prediction="noise", interpolant=call.interpolant, call="dit")
    ddim = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(10)
    n, m = (int(each) for each in ddim.timesteps[3:5])
    alphas = ddim.alphas_cumprod.double().sqrt()
    path = call.interpolant

    def time_with(alpha):  # alpha(r) = alpha, by bisection
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if path.alpha(middle) < alpha else (low, middle)
        return low

    s, t = time_with(float(alphas[n])), time_with(float(alphas[m]))
    assert abs(float(call.step_of(torch.tensor([s], dtype=torch.float64))) - n) < 1e-4
    noise = network(x, timestep=torch.tensor([n, n]), class_labels=labels).sample[:, :4]
    theirs = ddim.step(noise, n, x).prev_sample
    torch.testing.assert_close(fm.jump(x, s, t, class_labels=labels), theirs, atol=2e-4, rtol=2e-4)
    ends = call.step_of(torch.tensor([0.0, 1.0]))
    assert 990 < ends[0] <= 999 and ends[1] == 0  # noise is the last step, data the first
    with pytest.raises(ValueError, match="interpolant=VariancePreserving"):
        pfm.FlowMap(network, prediction="noise", call="dit")
    with pytest.raises(ValueError, match='predicts "noise"'):
        pfm.FlowMap(network, prediction="velocity", interpolant=call.interpolant, call="dit")
    x1 = pfm.sample(fm, x, solver="euler", grid=[0.1, 0.4, 0.8], condition={"class_labels": labels})
    assert x1.isfinite().all()
