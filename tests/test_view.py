"""What a step may ask of the field, at which times, and what the network may do with them."""

import math

import pytest
import torch

from pyflowmap import solvers
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg
from pyflowmap.interpolants import Linear, Trigonometric
from pyflowmap.sampling import sample

LINEAR, TRIGONOMETRIC = Linear(), Trigonometric()
DECAY = FlowMap(lambda x, t: -x, prediction="velocity")


def at_the_end(velocity, x, s, t, memory):
    return x + (t - s) * velocity(x, t), memory


def at_both_ends(velocity, x, s, t, memory):
    return x + 0.5 * (t - s) * velocity(x, s) + 0.5 * (t - s) * velocity(x, t), memory


def by_hand(step, x, grid):
    """The same steps on the trigonometric path for the data prediction tanh, in float64 and by the definitions."""
    alpha, sigma = (lambda r: math.sin(0.5 * math.pi * r)), (lambda r: math.cos(0.5 * math.pi * r))
    for r, q in zip(grid, grid[1:]):
        t = {each: alpha(each) / (alpha(each) + sigma(each)) for each in (r, q)}
        here = x / (alpha(r) + sigma(r))  # on the linear path

        def velocity(each, here=here, t=t):  # (D - x)/(1 - t), D of the model's own state there
            return (math.tanh((alpha(each) + sigma(each)) * here) - here) / (1.0 - t[each])

        total = velocity(q) if step is at_the_end else 0.5 * (velocity(r) + velocity(q))
        x = (here + (t[q] - t[r]) * total) * (alpha(q) + sigma(q))
    return x


@pytest.mark.parametrize("step", [at_the_end, at_both_ends])
@pytest.mark.parametrize("grad", [False, True, "checkpoint"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_state_may_be_asked_at_another_time(step, grad, packed):
    fm = FlowMap(lambda x, t, label=None: torch.tanh(x), prediction="data", interpolant=TRIGONOMETRIC)
    options = {"condition": {"label": torch.zeros(1)}, "guidance": cfg(2.0, null={"label": 1.0})} if packed else {}
    for grid in ([0.1, 0.5, 0.9], [0.0, 0.4, 0.8], [0.9, 0.5, 0.1]):
        x = torch.ones(1, 1, dtype=torch.float64)
        got = sample(fm, x, grid=grid, solver=step, grad=grad, **options)
        assert got.item() == pytest.approx(by_hand(step, 1.0, grid), rel=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_recorded_states_keep_their_scale_where_the_other_times_is_one(grad):
    """scale(1) = 1 says nothing of the state at s, whose scale is not 1."""
    fm = FlowMap(lambda x, t: torch.tanh(x), prediction="noise", interpolant=TRIGONOMETRIC)

    def step(velocity, x, s, t, memory):
        return x + (t - s) * velocity(x, 1.0), memory

    here = 1.0 / (2 * math.sin(math.pi / 4))  # at r = 0.5; at 1 the noise prediction gives b = x - P
    expected = here + (1.0 - 0.5) * (here - math.tanh(here))
    x = torch.ones(1, 1, dtype=torch.float64)
    assert sample(fm, x, grid=[0.5, 1.0], solver=step, grad=grad).item() == pytest.approx(expected, rel=1e-12)


# ---- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "dopri5", at_the_end])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_network_that_writes_to_its_time_is_told(solver, mode):
    fm = FlowMap(lambda x, t: -x * t.mul_(1000)[:, None] / 1000, prediction="velocity")
    with mode(), pytest.raises(RuntimeError, match="changed its time argument in place"):
        sample(fm, torch.ones(1, 1), solver=solver)


def test_a_network_that_writes_to_the_end_of_its_jump_is_told():
    fm = FlowMap(lambda x, s, t: -x * t.add_(1.0)[:, None])
    with pytest.raises(RuntimeError, match="changed its time argument in place"):
        sample(fm, torch.ones(1, 1), 2)


@pytest.mark.parametrize("solver", ["euler", "dopri5", at_the_end])
def test_times_are_as_wide_as_what_the_network_is_given(solver):
    seen = set()
    fm = FlowMap(lambda x, t: (seen.add((x.dtype, t.dtype)), -x)[1], prediction="velocity")
    sample(fm, torch.ones(2, 1, dtype=torch.float64), solver=solver)
    assert seen == {(torch.float64, torch.float64)}
    for argument in (torch.float32, torch.bfloat16):
        seen.clear()
        sample(fm, torch.ones(2, 1, dtype=torch.float64), solver=solver, dtype=argument)
        assert seen == {(argument, torch.float32)}


@pytest.mark.parametrize("path", [LINEAR, TRIGONOMETRIC])
@pytest.mark.parametrize("control", ["sample", "batch"])
def test_a_tight_tolerance_is_met_in_double_precision(path, control):
    """dX/dr = 3 cos(7 r): X_r = X_0 + 3/7 sin(7 r)."""
    fm = FlowMap(lambda x, r: 3 * torch.cos(7 * r)[:, None].expand_as(x), prediction="velocity", interpolant=path)
    solver = solvers.dopri5.using(rtol=1e-11, atol=1e-11, control=control)
    end = sample(fm, torch.zeros(2, 1, dtype=torch.float64), grid=[0.0, 0.9], solver=solver)
    torch.testing.assert_close(end, torch.full_like(end, 3 / 7 * math.sin(6.3)), rtol=0, atol=1e-9)


# ---- a wrong number of times -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LINEAR, TRIGONOMETRIC])
@pytest.mark.parametrize("grad", [False, True])
def test_a_step_with_a_wrong_number_of_times_is_told(path, grad):
    def two(velocity, x, s, t, memory):
        return x + (t - s) * velocity(x, s, t), memory

    def none(velocity, x, s, t, memory):
        return x + (t - s) * velocity(x), memory

    fm = FlowMap(lambda x, s, t: -x, interpolant=path)
    x = torch.ones(1, 1)
    with pytest.raises(TypeError, match=r"gave its velocity 2 times; it is velocity\(x, t\).*takes=\"jump\""):
        sample(fm, x, solver=two, grad=grad)
    with pytest.raises(TypeError, match=r"gave its velocity (no|0) times?; it is velocity\(x, t\)"):
        sample(fm, x, solver=none, grad=grad)

    def one(jump, x, s, t, memory):
        return jump(x, s), memory

    with pytest.raises(TypeError, match=r"gave its jump 1 times; it is jump\(x, s, t\)"):
        sample(fm, x, solver=solvers.solver(takes="jump")(one), grad=grad)


# ---- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "dopri5", "adams_bashforth_2"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trajectory", [False, True])
def test_what_a_callback_writes_to_is_its_own(solver, grad, trajectory):
    x, options = torch.ones(2, 1), {"solver": solver, "grad": grad, "trajectory": trajectory}
    plain = sample(DECAY, x, 3, **options)
    written = sample(DECAY, x, 3, callback=lambda record: record["x"].zero_(), **options)
    assert torch.equal(plain, written) and torch.equal(x, torch.ones(2, 1))
