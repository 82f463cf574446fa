"""ESD: exact maps have no residual, gradients are those of the formula with its stop-gradients."""

import pytest
import torch
from objectives.plain import Tiny, assert_same, data, gradients, pairs
from oracles import Gaussian

from pyflowmap import FlowMap, weights
from pyflowmap.interpolants import Trigonometric
from pyflowmap.objectives import eulerian

ORACLE = Gaussian()
EXACT = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t))
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
STOPS = pytest.mark.parametrize("stop", ["spatial", "teacher", "none"])


@STOPS
@pytest.mark.parametrize("teacher", [None, VELOCITY], ids=["itself", "the formula"])
def test_the_exact_map_does_not_end_elsewhere(stop, teacher):
    if teacher is not None and stop == "none":
        pytest.skip("a teacher has no gradient")
    x1, x0 = data(64)
    options = {"x0": x0, "times": lambda x: pairs(64), "diagonal": 0.0, "teacher": teacher, "stop_gradient": stop}
    assert float(eulerian(EXACT, x1, **options).raw_error.max()) < 1e-20
    bent = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t) + 0.1 * t[:, None])
    assert float(eulerian(bent, x1, **options).raw_error.mean()) > 1e-3


def plain(network, x1, x0, s, t, n, stop, teacher):
    """Boffi et al. 2025, ESD, the released stop-gradients: the residual of d_s X + sg(grad X . b)."""
    x, b = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0
    near = (network(x[:n], s[:n], s[:n]) - b[:n]).square().sum(1)
    x, s, t = x[n:], s[n:], t[n:]

    def jump(x, s):
        return x + (t - s)[:, None] * network(x, s, t)

    v = network(x, s, s) if teacher is None else teacher(x, s)
    v = v if stop == "none" else v.detach()
    one = torch.ones_like(s)
    if stop == "spatial":
        _, along_time = torch.func.jvp(lambda s: jump(x, s), (s,), (one,))
        _, along_space = torch.func.jvp(lambda x: jump(x, s), (x,), (v,))
        residual = along_time + along_space.detach()
    else:
        _, residual = torch.func.jvp(jump, (x, s), (v, one))
    return torch.cat([near, residual.square().sum(1)])


@STOPS
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_gradients(stop, adaptive, given):
    if given and stop == "none":
        pytest.skip("a teacher has no gradient")
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    weight = weights.adaptive(p=0.7, c=0.1) if adaptive else weights.constant(norm="sum")
    ours = eulerian(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), weight=weight, diagonal=0.25,
                    stop_gradient=stop, teacher=VELOCITY if given else None)  # fmt: skip
    teacher = (lambda x, s: ORACLE.velocity(x, s[:, None])) if given else None
    error = plain(network, x1, x0, s, t, 3, stop, teacher)
    assert_same(ours, error / (error.detach() + 0.1) ** 0.7 if adaptive else error, network)
    torch.testing.assert_close(ours.parts["eulerian"], error[3:].detach().mean() / 3)


def test_the_three_gradients_differ_and_the_losses_do_not():
    network, (x1, x0), (s, t) = Tiny(), data(12), pairs(12)
    found = [
        eulerian(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), diagonal=0.0, stop_gradient=stop)
        for stop in ("spatial", "teacher", "none")
    ]
    g = [torch.cat([each.reshape(-1) for each in gradients(network, loss.mean())]) for loss in found]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        torch.testing.assert_close(found[i].per_sample, found[j].per_sample)
        assert float((g[i] - g[j]).norm()) > 0.02 * float(g[i].norm())


def test_off_the_diagonal_there_is_no_dropout_and_the_modes_are_put_back():
    network, modes = Tiny(dropout=0.5).train(), []
    network.body[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    x1, x0 = data(8)
    one, two = (eulerian(FlowMap(network), x1, x0=x0, diagonal=0.0, times=lambda x: pairs(8)) for _ in range(2))
    assert torch.equal(one.per_sample, two.per_sample) and one.per_sample.requires_grad
    assert not any(modes) and all(m.training for m in network.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_gradient": "full"}, "stop_gradient = 'full'; it is one of spatial, teacher, none"),
        ({"stop_gradient": "none", "teacher": VELOCITY}, '"none" with a teacher'),
        ({"diagonal": 75}, "diagonal = 75"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        eulerian(FlowMap(Tiny()), torch.zeros(4, 3), **options)
    with pytest.raises(ValueError, match="eulerian trains the mean velocity"):
        eulerian(VELOCITY, torch.zeros(4, 3))
    other = FlowMap(VELOCITY.network, prediction="velocity", interpolant=Trigonometric())
    with pytest.raises(ValueError, match=r"the teacher's path is Trigonometric.*the flow map's Linear"):
        eulerian(FlowMap(Tiny()), torch.zeros(4, 3), teacher=other)
