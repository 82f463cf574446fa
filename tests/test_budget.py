"""`nfe=`: what is asked for is what the network is called, or it is refused before it is called at all."""

import re
from dataclasses import dataclass

import pytest
import torch

from pyflowmap import solvers
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.sampling import sample

NAMES = [name for name, each in solvers.named.items() if each.loop is None and each.plan is None]
PATHS = [Linear(), Trigonometric(), VariancePreserving()]


def spend(solver, nfe, prediction, path=Linear(), guidance=None):
    """The calls of the network, or those that are offered in place of `nfe`."""
    calls = []

    def network(x, *times, label=None):
        calls.append(1)
        return torch.tanh(x)

    fm = FlowMap(network, prediction=prediction, interpolant=path, call=None)
    options = {"guidance": guidance, "condition": {"label": torch.zeros(1)}} if guidance else {}
    try:
        sample(fm, torch.ones(1, 1), nfe=nfe, solver=solver, **options)
    except ValueError as refused:
        found = re.search(rf"nfe = {nfe} can't be met: .*; ([0-9 or]+) can", str(refused))
        assert found and not calls, str(refused)
        return [int(each) for each in found[1].split(" or ")]
    return len(calls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_budget_is_spent_to_the_evaluation_or_refused_with_ones_that_are(name, path):
    jumps = solvers.named[name].takes == "jump"
    for prediction in ("mean_velocity",) if jumps else ("velocity", "data"):
        if prediction == "velocity" and isinstance(path, VariancePreserving):
            prediction = "ddpm_v"  # an infinite velocity at the data end is nothing to be asked for
        met = 0
        for nfe in (1, 4, 7, 8, 10):
            got = spend(name, nfe, prediction, path)
            if isinstance(got, int):
                assert got == nfe, (name, prediction, nfe)
                met += 1
                continue
            assert nfe not in got
            assert [spend(name, other, prediction, path) for other in got] == got
        assert met or name in ("rk4",) or solvers.named[name].starting, (name, prediction)


def test_what_was_asked_and_not_spent():
    assert spend("heun", 7, "data") == 7  # no second evaluation at the data end
    assert spend("heun", 8, "data") == [7, 9]
    assert spend("heun", 8, "velocity") == 8
    assert spend("heun", 8, "velocity", guidance=cfg(2.0, null={"label": 1.0})) == 8


def test_options_and_paths_that_cannot_be_keys():
    @solvers.solver(order=1, nfe=2)
    def lists(velocity, x, s, t, memory, *, weights=(0.5, 0.5)):
        a, b = weights
        return x + (t - s) * (a * velocity(x, s) + b * velocity(x, t)), memory

    assert spend(lists.using(weights=[0.5, 0.5]), 6, "velocity") == 6

    @dataclass(eq=True)  # and so without a hash
    class Own(Trigonometric.__mro__[1]):
        alpha, sigma = Trigonometric.alpha, Trigonometric.sigma
        alpha_derivative, sigma_derivative = Trigonometric.alpha_derivative, Trigonometric.sigma_derivative

    assert spend("heun", 6, "velocity", Own()) == 6


def test_a_step_that_says_less_than_it_spends():
    @solvers.solver(order=1, nfe=1)
    def twice(velocity, x, s, t, memory):
        return x + 0.5 * (t - s) * velocity(x, s) + 0.5 * (t - s) * velocity(x, s), memory

    assert spend(twice, 6, "velocity") == 6
    assert spend(twice, 7, "velocity") == [6, 8]
