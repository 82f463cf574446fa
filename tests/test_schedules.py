"""Schedules: their formulas at hand-computed places, what they promise together, other implementations, errors."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import AysSchedules
from oracles import Gaussian

import pyflowmap as pfm
from pyflowmap import schedules

ALL = {
    "uniform": schedules.uniform,
    "shifted": lambda n: schedules.shifted(n, 3.0),
    "cosine": schedules.cosine,
    "power": schedules.power,
    "logit_uniform": schedules.logit_uniform,
    "logit_normal": schedules.logit_normal,
    "karras": schedules.karras,
    **{
        name: lambda n, name=name: schedules.align_your_steps(n, name) for name in ("sd1.5", "sdxl", "svd", "deepfloyd")
    },
}
logit = lambda t: math.log(t / (1 - t))  # noqa: E731


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 64, 1000])
@pytest.mark.parametrize("name", ALL)
def test_from_noise_to_data(name, steps):
    times = ALL[name](steps)
    assert type(times) is list and len(times) == steps + 1 and times[0] == 0.0 and times[-1] == 1.0
    assert all(type(t) is float for t in times) and all(s < t for s, t in zip(times, times[1:]))


def test_values_by_hand():
    approx = lambda *values: pytest.approx(values, abs=1e-12)  # noqa: E731
    assert schedules.uniform(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert schedules.shifted(4, 3.0) == approx(0, 0.1, 0.25, 0.5, 1)  # u/(3 - 2u)
    assert schedules.cosine(6) == approx(0, 0.5 - math.sqrt(3) / 4, 0.25, 0.5, 0.75, 0.5 + math.sqrt(3) / 4, 1)
    assert schedules.power(4, 3.0) == approx(0, 1 / 64, 1 / 8, 27 / 64, 1)
    # logit 0.1 = -log 9, so two inner points of four steps lie at -+ log 3
    assert schedules.logit_uniform(4, 0.1) == approx(0, 0.25, 0.5, 0.75, 1)
    upper = 0.6744897501960817  # the upper quartile of the normal law
    assert schedules.logit_normal(4, 0.5, 2.0) == approx(
        0, *(1 / (1 + math.exp(-0.5 - 2.0 * z)) for z in (-upper, 0.0, upper)), 1
    )
    assert schedules.karras(3, 1.0, 8.0, 3.0, from_zero=False) == approx(1 / 9, 1 / (1 + 1.5**3), 1 / 2, 1)
    assert schedules.flux_shift(256) == pytest.approx(math.exp(0.5))
    assert schedules.flux_shift(4096) == pytest.approx(math.exp(1.15))
    assert schedules.sd3_shift(4.0, 1.0) == 2.0


def test_shifts_compose_and_move_the_logit():
    for u, t in zip(schedules.uniform(9)[1:-1], schedules.shifted(9, 2.5)[1:-1]):
        assert logit(t) == pytest.approx(logit(u) - math.log(2.5), abs=1e-12)
        assert t / (2.0 + (1 - 2.0) * t) == pytest.approx(u / (5.0 + (1 - 5.0) * u), abs=1e-12)
    assert schedules.shifted(7, 1.0) == pytest.approx(schedules.uniform(7))


@pytest.mark.parametrize("name", ["uniform", "cosine", "logit_uniform", "logit_normal"])
def test_symmetric_ones_are_their_own_mirror(name):
    times = ALL[name](12)
    assert [1 - t for t in times[::-1]] == pytest.approx(times, abs=1e-12)


def test_logit_uniform_has_equal_inner_steps():
    inner = [logit(t) for t in schedules.logit_uniform(11, 1e-4)[1:-1]]
    gaps = [b - a for a, b in zip(inner, inner[1:])]
    assert gaps == pytest.approx([2 * math.log(9999) / 11] * 9, rel=1e-9)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])  # mu: a line through two points
def test_diffusers_shifts_alike(tokens, mu):
    n = 12
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)], mu=mu)
    expected = [1 - s for s in scheduler.sigmas.tolist()]
    assert schedules.shifted(n, schedules.flux_shift(tokens)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_diffusers_has_the_same_karras_levels(steps):
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(steps)
    expected = [1 / (1 + s) for s in scheduler.sigmas.tolist()]
    assert schedules.karras(steps, from_zero=False) == pytest.approx(expected, abs=1e-6)
    assert schedules.karras(steps)[1:] == schedules.karras(steps, from_zero=False)[1:]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("sd1.5", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas"), ("svd", "StableDiffusionVideoSigmas")],
)
def test_align_your_steps(name, theirs):
    levels = AysSchedules[theirs]
    expected = [1 / (1 + level) for level in levels]
    assert schedules.align_your_steps(10, name, from_zero=False) == pytest.approx(expected, abs=1e-12)
    twenty = schedules.align_your_steps(20, name, from_zero=False)
    assert twenty[::2] == pytest.approx(expected, abs=1e-12)
    for k in range(9):  # between two levels lies their geometric mean
        assert (1 - twenty[2 * k + 1]) / twenty[2 * k + 1] == pytest.approx(math.sqrt(levels[k] * levels[k + 1]))
    assert schedules.align_your_steps(10, name)[0] == 0.0


@pytest.mark.parametrize("name", ALL)
def test_sampling_along_it(name):
    oracle = Gaussian()
    fm = pfm.FlowMap(lambda x, s: oracle.data(x, s.double().reshape(-1, 1)), prediction="data")
    x0 = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    out = pfm.sample(fm, x0, grid=ALL[name](60), solver="heun")
    torch.testing.assert_close(out, oracle.jump(x0, 0.0, 1.0), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.uniform(0), "steps = 0"),
        (lambda: schedules.cosine(2.0), "steps = 2.0"),
        (lambda: schedules.karras(True), "steps = True"),
        (lambda: schedules.align_your_steps(0, "sdxl"), "steps = 0"),
        (lambda: schedules.shifted(4, 0.0), "shift = 0.0"),
        (lambda: schedules.shifted(4, math.nan), "shift = nan"),
        (lambda: schedules.flux_shift(0), "tokens = 0"),
        (lambda: schedules.sd3_shift(1.0, -1.0), "base_dims = -1.0"),
        (lambda: schedules.power(4, -2.0), "exponent = -2.0"),
        (lambda: schedules.power(1000, 400.0), "too close"),
        (lambda: schedules.logit_uniform(4, 0.5), "eps = 0.5"),
        (lambda: schedules.logit_normal(4, 0.0, 0.0), "std = 0.0"),
        (lambda: schedules.logit_normal(4, math.inf), "mean = inf"),
        (lambda: schedules.logit_normal(4, 100.0), "too close"),
        (lambda: schedules.karras(4, 80.0, 0.002), "sigma_min = 80.0 is not below"),
        (lambda: schedules.karras(4, rho=0.0), "rho = 0.0"),
        (lambda: schedules.align_your_steps(10, "flux"), "name = 'flux'; there are levels for sd1.5"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
