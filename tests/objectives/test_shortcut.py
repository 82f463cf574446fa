"""Shortcut models: zero residual and zero mean gradient at the exact steps, the specification's gradient, the grid."""

import pytest
import torch
from mean_gradient import feature, row_gradients, sigmas
from oracles import Gaussian

from pyflowmap import FlowMap, guidance, sample
from pyflowmap.objectives import shortcut

ORACLE = Gaussian()


def composed(level, levels, s, x):
    """Steps of 2^-level made of Euler steps of 2^-levels: the exact solution of the objective, for the Gaussian."""
    if level == levels:
        return ORACLE.velocity(x, s)
    half = 2.0 ** -(level + 1)
    first = composed(level + 1, levels, s, x)
    return 0.5 * (first + composed(level + 1, levels, s + half, x + half * first))


def exact(levels):
    def network(x, s, t):
        result, s, span = torch.zeros_like(x), s.double(), (t - s).double()
        for level in range(levels + 1):
            here = (span == 2.0**-level)[:, None]
            result = torch.where(here, composed(level, levels, s[:, None], x), result)
        return result

    return network


def data(rows):
    torch.manual_seed(0)
    return ORACLE.m + ORACLE.S * torch.randn(rows, 2, dtype=torch.float64)


def test_the_exact_steps_have_no_residual_and_others_have():
    network = exact(4)
    loss = shortcut(FlowMap(network), data(256), levels=4, bootstrap=1.0, seed=1)
    assert float(loss.raw_error.max()) < 1e-20 and set(loss.parts) == {"shortcut"}
    wrong = FlowMap(lambda x, s, t: network(x, s, t) + 0.1 * (t - s)[:, None])
    assert float(shortcut(wrong, data(256), levels=4, bootstrap=1.0, seed=1).raw_error.mean()) > 1e-4


def test_the_exact_steps_have_no_mean_gradient_and_the_conditional_variance_as_loss():
    x1, network, seen = data(40_000), exact(3), []

    def loss_of(theta, wrong=0.0):
        def moved(x, s, t):
            seen[:] = [s]
            return network(x, s, t) + wrong + theta[:, None] * feature(x, t)

        return shortcut(FlowMap(moved), x1, levels=3, teacher=FlowMap(network), bootstrap=0.25, seed=5)

    assert sigmas(row_gradients(loss_of, len(x1))) < 4.0
    assert sigmas(row_gradients(lambda theta: loss_of(theta, 0.05), len(x1))) > 8.0
    loss = loss_of(torch.zeros(len(x1), dtype=torch.float64))
    variance = 0.25 / ORACLE.sd(seen[0][:30_000].double()) ** 2
    assert sigmas(loss.per_sample[:30_000] - variance) < 4.0
    assert float(loss.per_sample[30_000:].max()) < 1e-20


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("guided", [False, True])
def test_the_gradient_is_the_specifications(clip, guided):
    torch.manual_seed(1)
    rows, near, levels = 24, 12, 3
    x1, x0 = torch.randn(2, rows, 3, dtype=torch.float64).unbind(0)
    label = torch.randint(5, (rows,))
    net, seen = torch.nn.Linear(6, 3).double(), []

    def network(x, s, t, label):
        if torch.is_grad_enabled():
            seen.append((x, s, t))
        return net(torch.cat([x, torch.stack([s, t, label.double()], 1).to(x)], 1))

    ours = shortcut(
        FlowMap(network), x1, x0=x0, condition={"label": label}, levels=levels, bootstrap=0.5, clip=clip, seed=2,
        guidance=guidance.cfg(1.5, null={"label": 9}) if guided else None,
    )  # fmt: skip
    found = torch.autograd.grad(ours.mean(), list(net.parameters()))

    ((x, s, t),) = seen  # the times are drawn; everything else is computed anew
    torch.testing.assert_close(x, (1 - s.double()[:, None]) * x0 + s.double()[:, None] * x1)
    assert bool((t[:near] - s[:near] == 0.125).all())
    bound = (lambda y: y.clamp(-clip, clip)) if clip else (lambda y: y)
    target = x1 - x0
    with torch.no_grad():
        for i in range(near, rows):
            span, one = t[i] - s[i], lambda y, a, b, y_label: network(y, a[None], b[None], torch.tensor([y_label]))
            middle = s[i] + span / 2

            def velocity(y, a, b, span=span, one=one, i=i):
                v = one(y, a, b, int(label[i]))
                if guided and span == 0.25:  # the first bootstrap level
                    null = one(y, a, b, 9)
                    v = null + 1.5 * (v - null)
                return v

            first = velocity(x[i : i + 1], s[i], middle)
            halfway = bound(x[i : i + 1] + span.double() / 2 * first)
            target[i] = bound((first + velocity(halfway, middle, t[i])) / 2)[0]
    assert {float(d) for d in (t - s)[near:]} == {0.25, 0.5, 1.0}
    error = (network(x, s, t, label) - target).square()
    torch.testing.assert_close(ours.per_sample, error.mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.parts["flow_matching"], error[:near].detach().mean())
    torch.testing.assert_close(ours.parts["shortcut"], error[near:].detach().mean())
    for a, b in zip(found, torch.autograd.grad(error.mean(), list(net.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_levels_and_starts_are_uniform_on_the_dyadic_grid():
    seen = []

    def network(x, s, t):
        if torch.is_grad_enabled():
            seen.append((s.double(), t.double()))
        return torch.zeros_like(x)

    shortcut(FlowMap(network), torch.zeros(64_000, 1), seed=3)
    s, t = seen[0]
    near, far = 56_000, 8_000  # 7/8
    assert bool((t[:near] - s[:near] == 2.0**-7).all()) and bool((t[near:] - s[near:] > 2.0**-7).all())
    assert bool((s / (t - s) == (s / (t - s)).round()).all()) and bool((s >= 0).all()) and bool((t <= 1).all())
    start = (s[:near] * 128).long().bincount(minlength=128).double()
    assert ((start - near / 128).square() / (near / 128)).sum() < 181.0  # chi^2, 127 degrees of freedom, 0.1 %
    level = (-(t - s)[near:].log2()).round().long().bincount(minlength=7).double()
    assert len(level) == 7 and ((level - far / 7).square() / (far / 7)).sum() < 22.5  # 6 degrees of freedom, 0.1 %


def test_the_teacher_has_no_gradient_and_rows_are_drawn_by_sample_id():
    weight = torch.ones((), requires_grad=True)
    zero = FlowMap(lambda x, s, t: 0.0 * x)
    teacher = FlowMap(lambda x, s, t: weight * x)
    assert not shortcut(zero, torch.randn(8, 3), teacher=teacher, bootstrap=1.0).per_sample.requires_grad
    fm, x1, ids = FlowMap(lambda x, s, t: torch.sin(x) * t[:, None]), torch.randn(8, 3), torch.tensor([7, 2, 4])
    for bootstrap in (0.0, 1.0):
        whole = shortcut(fm, x1, seed=4, bootstrap=bootstrap).per_sample
        part = shortcut(fm, x1[ids], seed=4, sample_ids=ids, bootstrap=bootstrap).per_sample
        torch.testing.assert_close(part, whole[ids])


def test_few_steps_follow_many():
    """What the objective's solution samples in 1, 2 and 4 jumps is what 8 Euler steps give."""
    x = torch.randn(16, 2, dtype=torch.float64)
    fm = FlowMap(exact(3))
    many = sample(fm, x, steps=8)
    for steps in (1, 2, 4):
        torch.testing.assert_close(sample(fm, x, steps=steps), many, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"levels": 0}, ValueError, "levels = 0"),
        ({"levels": 7.0}, ValueError, "levels = 7.0"),
        ({"bootstrap": 8}, ValueError, "bootstrap = 8"),
        ({"clip": 0.0}, ValueError, "clip = 0.0"),
        ({"guidance": 1.5}, TypeError, "guidance is float"),
        ({"guidance": guidance.cfg(1.5, {"y": 1}, interval=(0.1, 0.2))}, ValueError, "interval"),
        ({"sample_ids": torch.arange(4)}, ValueError, "sample_ids need a seed"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        shortcut(FlowMap(lambda x, s, t: x), torch.zeros(4, 3), **options)


def test_a_network_of_one_time():
    with pytest.raises(ValueError, match="shortcut trains the mean velocity"):
        shortcut(FlowMap(lambda x, t: x, prediction="velocity"), torch.zeros(4, 3))
