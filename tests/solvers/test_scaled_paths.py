"""Paths whose points are a scale times those of the linear one: states go in and come out as the model knows them."""

import math

import pytest
import torch

from pyflowmap.flow_map import FlowMap
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.sampling import sample
from pyflowmap.schedules import cosine
from pyflowmap.solvers import dopri5

PATHS = [Linear(), Trigonometric(), VariancePreserving()]
TIGHT = {control: dopri5.using(rtol=1e-8, atol=1e-10, control=control) for control in ("sample", "batch")}
path_of = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
control_of = pytest.mark.parametrize("control", list(TIGHT))


def decay(path):
    """dX/dr = -X on whatever path: X_r = X_s exp(s - r)."""
    return FlowMap(lambda x, r: -x, prediction="velocity", interpolant=path)


@path_of
@control_of
@pytest.mark.parametrize("grid", [[0.1, 0.3, 0.6, 0.9], [0.9, 0.5, 0.2], [0.3, 0.4]], ids=["up", "down", "short"])
@pytest.mark.parametrize("grad", [False, True, "checkpoint"])
def test_dopri5_gives_the_models_own_state(path, control, grid, grad):
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=bool(grad))
    exact = torch.stack([x.detach() * math.exp(grid[0] - r) for r in grid])
    end = sample(decay(path), x, grid=grid, solver=TIGHT[control], grad=grad)
    torch.testing.assert_close(end.detach(), exact[-1], rtol=1e-7, atol=1e-9)
    states = sample(decay(path), x, grid=grid, solver=TIGHT[control], grad=grad, trajectory=True)
    torch.testing.assert_close(states.detach(), exact, rtol=1e-7, atol=1e-9)
    if grad:
        (slope,) = torch.autograd.grad(end.sum(), x)
        torch.testing.assert_close(slope, torch.full_like(slope, math.exp(grid[0] - grid[-1])), rtol=1e-7, atol=0)


@path_of
@pytest.mark.parametrize("grad", [False, True])
def test_dopri5s_callback_sees_the_models_own_state(path, grad):
    x, seen = torch.tensor([[1.0, -2.0]], dtype=torch.float64), []
    sample(decay(path), x, grid=[0.2, 0.8], solver=TIGHT["batch"], grad=grad, callback=seen.append)
    assert len(seen) > 1
    for record in seen:
        torch.testing.assert_close(record["x"], x * math.exp(0.2 - record["t"]), rtol=1e-7, atol=1e-9)


@path_of
def test_a_sample_that_stopped_early_is_where_it_stopped(path):
    """X_r = X_s exp(-rate (r - s)); the larger rate needs more steps than the budget allows."""
    rate = torch.tensor([[0.1], [100.0]], dtype=torch.float64)
    fm = FlowMap(lambda x, r, rate: -rate * x, prediction="velocity", interpolant=path)
    x = torch.ones(2, 1, dtype=torch.float64)
    seen: list = []
    solver = TIGHT["sample"].using(max_nfe=90)
    with pytest.warns(RuntimeWarning, match="1 of 2 samples"):
        end = sample(fm, x, grid=[0.2, 0.8], solver=solver, condition={"rate": rate}, callback=seen.append)
    exact = torch.exp(-rate * (seen[-1]["t"] - 0.2))
    assert 0.2 < seen[-1]["t"] < 0.8
    torch.testing.assert_close(end[0], torch.exp(-rate[0] * 0.6), rtol=1e-6, atol=0)
    torch.testing.assert_close(end[1], exact[1], rtol=1e-5, atol=0)


# ---- an end without a velocity -----------------------------------------------------------------------------------


def curved(path):
    return FlowMap(lambda x, r: torch.tanh(3 * x), prediction="data", interpolant=path)


def starts(dtype):
    return torch.randn(64, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))


@path_of
@control_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_the_grid_only_the_ends_count(path, control, dtype):
    runs = [
        sample(curved(path), starts(dtype), grid=grid, solver=dopri5.using(control=control))
        for grid in ([0.0, 1.0], [0.0, 0.9, 1.0], cosine(200), [0.0, 0.99999, 1.0], [0.0, 1.0 - 1e-9, 1.0])
    ]
    for run in runs[1:]:
        assert torch.equal(run, runs[0])
    # The flow meets the data end where D(x) = x.
    torch.testing.assert_close(runs[0], torch.tanh(3 * runs[0]), rtol=0, atol=2e-3)


@path_of
@control_of
def test_times_close_to_the_end_in_a_trajectory(path, control):
    grid, solver = [0.0, 0.5, 0.9999, 0.99999, 1.0], dopri5.using(control=control)
    x, fine = starts(torch.float64), dopri5.using(control=control, rtol=1e-10, atol=1e-10, max_nfe=10_000)
    states = sample(curved(path), x, grid=grid, solver=solver, trajectory=True)
    torch.testing.assert_close(states[-1], sample(curved(path), x, grid=[0.0, 1.0], solver=solver), rtol=0, atol=2e-5)
    for k in (1, 2, 3):
        exact = sample(curved(path), x, grid=[0.0, grid[k]], solver=fine)
        torch.testing.assert_close(states[k], exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-12])
@control_of
def test_short_grids_to_the_data_end(tolerance, control):
    """b = (D - x)/(1 - t) with D constant is a straight line to D: any step is exact."""
    fm = FlowMap(lambda x, r: torch.full_like(x, 2.0), prediction="data")
    for start in (0.5, 1 - 1e-4, 1 - 1e-6):
        x = torch.ones(3, 2, dtype=torch.float64 if tolerance < 1e-7 else torch.float32)
        end = sample(fm, x, grid=[start, 1.0], solver=dopri5.using(rtol=tolerance, atol=tolerance, control=control))
        torch.testing.assert_close(end, torch.full_like(end, 2.0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="begin it further from that end"):
        sample(fm, torch.ones(3, 2), grid=[1 - 1e-14, 1.0], solver="dopri5")
