"""What a guidance is given, and what one of one's own must do: each mistake is said, none is rounded away."""

import pytest
import torch
from guidance_cases import LABEL, NULL, curved, flat

from pyflowmap.editing import flow_edit
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import Guidance, apg, autoguidance, cfg, cfg_zero, skip_layer
from pyflowmap.sampling import sample


@pytest.mark.parametrize(
    "interval, words",
    [
        ((200, 800), "linear times in"),
        ((-0.1, 0.5), "linear times in"),
        (("a", "b"), "linear times in"),
        ((0.1, float("nan")), "linear times in"),
        ((False, True), "linear times in"),
        (0.5, "a pair of linear times"),
        ("ab", "a pair of linear times"),
        ((0.1, 0.5, 0.8), "a pair of linear times"),
        ((0.8, 0.1), "the lower time comes first"),
    ],
)
def test_intervals_that_are_none(interval, words):
    for make in (cfg, apg, cfg_zero):
        with pytest.raises(ValueError, match=words):
            make(2.0, NULL, interval=interval)
    for make in (autoguidance, skip_layer):
        with pytest.raises(ValueError, match=words):
            make(2.0, flat, interval=interval)


@pytest.mark.parametrize(
    "null, words",
    [
        (10.7, r"= 10.7 but the condition has dtype torch.int64; give a whole number"),
        (float("inf"), "give a whole number"),
        ([10, 10], "is list but the condition is a tensor"),
        ("none", "is str but the condition is a tensor"),
        (torch.tensor(10.0), "has dtype torch.float32 but the condition torch.int64"),
        (torch.tensor([1, 2, 3]), r"has shape \(3,\) but the condition \(2,\)"),
    ],
)
def test_nulls_that_would_be_changed(null, words):
    fm = FlowMap(curved, prediction="velocity")
    with pytest.raises(ValueError, match=words):
        sample(fm, torch.zeros(2, 3), 2, condition={"label": LABEL}, guidance=cfg(2.0, {"label": null}))


def test_nulls_that_are_what_they_say():
    fm, x, seen = FlowMap(curved, prediction="velocity"), torch.randn(2, 3), []
    for null in (10, 10.0, torch.tensor(10), torch.tensor([10, 10]), torch.tensor([10, 10], dtype=torch.int32)):
        seen.append(sample(fm, x, 2, solver="euler", condition={"label": LABEL}, guidance=cfg(2.0, {"label": null})))
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_what_a_guidance_of_ones_own_gets_wrong():
    class Own(Guidance):
        def __init__(self, call):
            self.call = call

        def __call__(self, ask, x, s, t):
            return self.call(ask)

    fm, x = FlowMap(curved, prediction="velocity"), torch.zeros(2, 3)
    y = {"label": LABEL}
    for solver in ("euler", "flow_map"):
        for call, kind, words in (
            (lambda ask: ask(0, 1)[0], ValueError, r"Own asks for condition 1 but names 1; let conditions\("),
            (lambda ask: ask(-1)[0], ValueError, "Own asks for condition -1"),
            (lambda ask: ask(0), TypeError, r"Own returned list, .* `v, = ask\(0\)`"),
            (lambda ask: None, TypeError, "Own returned NoneType"),
        ):
            with pytest.raises(kind, match=words):
                sample(fm, x, 2, solver=solver, condition=y, guidance=Own(call))
            with pytest.raises(kind, match=words):
                flow_edit(fm, x, 2, source=y, target=y, guidance_target=Own(call), seed=0)
