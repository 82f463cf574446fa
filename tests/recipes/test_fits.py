"""Objective, network and data set that do not go together are refused before any data is read."""

import pytest
import torch
from torch import nn

from pyflowmap import objectives
from pyflowmap.nn import MLP, DiT, DiTConfig, MLPConfig, UNet, UNetConfig
from pyflowmap.recipes.fits import check
from pyflowmap.training import Step


class Set:
    """Says what it holds; reading it is an error."""

    def __init__(self, shape=(2,), labels=0, mask_shape=None):
        self.shape, self.labels, self.mask_shape = shape, labels, mask_shape

    def __len__(self):
        return 10

    def batch(self, indices):
        raise AssertionError("data was read")


def network(forward):
    """A module with this forward, and a parameter."""
    module = type("Own", (nn.Module,), {"forward": forward})()
    module.weight = nn.Parameter(torch.ones(()))
    return module


good = network(lambda self, x, s, t: self.weight * x)


def test_what_fits_is_taken():
    check(Step(MLP(MLPConfig(width=8, depth=1)), objectives.progressive), Set())
    check(Step(MLP(MLPConfig(width=8, depth=1, labels=3)), objectives.lagrangian), Set(labels=3), {"label": (3, 0.1)})
    image = {"image": (1, 8, 8), "labels": 4}
    check(Step(DiT(DiTConfig(depth=1, width=16, heads=2, **image)), objectives.mean_flow), Set((1, 8, 8), 4))
    check(Step(UNet(UNetConfig(channels=8, **image)), objectives.lagrangian), Set((1, 8, 8), 4))
    check(Step(good, objectives.mean_flow), Set((3, 4)))
    single = network(lambda self, x, t: self.weight * x)
    check(Step(single, objectives.flow_matching, prediction="velocity"), Set())
    anything = network(lambda self, *times, **condition: self.weight * times[0])
    check(Step(anything, objectives.progressive), Set(labels=3, mask_shape=(2,)))
    masked = network(lambda self, x, s, t, label=None, mask=None: self.weight * x + mask)
    check(Step(masked, objectives.progressive), Set(labels=3, mask_shape=(2,)), {"mask": (0.0, 0.5)})


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: (Step(network(lambda self, x, t: x), objectives.lagrangian), Set()),
            r"Own.forward\(x, t\) takes no second time, but lagrangian hands it both ends .* prediction=\"velocity\"",
        ),
        (  # the end of the jump would be taken for a label
            lambda: (Step(network(lambda self, x, t, label=None: x), objectives.progressive), Set(labels=3)),
            r"Own.forward\(x, t, label\) takes no second time",
        ),
        (
            lambda: (Step(network(lambda self, x: x), objectives.flow_matching, prediction="velocity"), Set()),
            r"Own.forward\(x\) takes no time",
        ),
        (
            lambda: (Step(good, objectives.lagrangian), Set(labels=3)),
            r"Own.forward\(x, s, t\) has no input 'label', which the data set gives; write forward\(..., label=None\)",
        ),
        (lambda: (Step(good, objectives.lagrangian), Set(mask_shape=(2,))), "has no input 'mask'"),
        (
            lambda: (Step(MLP(MLPConfig(labels=0)), objectives.progressive), Set(labels=3)),
            "labels of 3 classes but MLP is built without a class input; set labels=3",
        ),
        (
            lambda: (Step(MLP(MLPConfig(labels=3)), objectives.progressive), Set()),
            "MLP is built for 3 classes but the data set gives no label",
        ),
        (
            lambda: (Step(MLP(MLPConfig(labels=3)), objectives.progressive), Set(labels=5)),
            "5 classes but MLP is built for 3; set labels=5",
        ),
        (
            lambda: (Step(MLP(MLPConfig(features=3)), objectives.progressive), Set()),
            r"progressive cannot evaluate MLP on a batch of shape \(4, 2\) with no condition: ",
        ),
        (
            lambda: (Step(network(lambda self, x, s, t: x[:, :1]), objectives.progressive), Set()),
            "the network returned shape",
        ),
        (
            lambda: (Step(network(lambda self, x, t: x), objectives.lagrangian, prediction="velocity"), Set()),
            'lagrangian cannot evaluate Own .* has prediction="velocity"',
        ),
        (
            lambda: (Step(good, objectives.progressive), Set(), {"label": (3, 0.1)}),
            "dropout names .* 'label'",
        ),
        (  # the null label has no place in the table
            lambda: (Step(MLP(MLPConfig(labels=3)), objectives.progressive), Set(labels=3), {"label": (4, 0.1)}),
            "progressive cannot evaluate MLP .* with the condition label: ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(make, message):
    with pytest.raises(ValueError, match=message) as error:
        check(*make())
    assert "\n" not in str(error.value)


def test_nothing_is_left_behind():
    """No random number of the run, no training mode, no running mean, no gradient."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.linear = nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)
            self.drop.eval()

        def forward(self, x, s, t):
            return self.linear(self.drop(self.norm(x)))

    step = Step(Normed(), objectives.progressive)
    before, modes = {k: v.clone() for k, v in step.state_dict().items()}, [m.training for m in step.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(step, Set())
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(v, before[k]) for k, v in step.state_dict().items())
    assert [m.training for m in step.modules()] == modes
    assert all(p.grad is None for p in step.parameters())
    with pytest.raises(ValueError, match="cannot evaluate"):
        check(Step(Normed(), objectives.progressive), Set((3,)))
