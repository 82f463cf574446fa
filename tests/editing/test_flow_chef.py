"""FlowChef against plain loops in float64 with explicit inner steps; adjoints; what stays known stays known."""

import math
import sys

import pytest
import torch
from oracles import Gaussian

import pyflowmap as pfm
from pyflowmap.editing import Blur, Downsample, LinearOperator, Loss, Mask, flow_chef
from pyflowmap.interpolants import Trigonometric, VariancePreserving

SHAPE = (3, 2, 8, 8)
MATRIX = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROW = LinearOperator(
    lambda x: x @ MATRIX.to(x), lambda r: r @ MATRIX.to(r).T, float(torch.linalg.matrix_norm(MATRIX, 2)) ** 2
)
OPERATORS = {
    "blur": Blur([0.2, 0.5, 0.3]),
    "blur 2-d": Blur(torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) - 0.3),
    "gaussian": Blur.gaussian(0.8),
    "downsample": Downsample(2),
    "downsample 4": Downsample(4),
    "own": ROW,
}
LABEL = torch.tensor([1.0, 2.0, 3.0])


def random(shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(x, s, label):
    return torch.sin(2.0 * x + label.to(x).reshape(-1, 1, 1, 1)) - s.to(x).reshape(-1, 1, 1, 1) * x


def model(net=network, **options):
    return pfm.FlowMap(net, prediction="velocity", **options)


def by_hand(x, grid, gradient, rate, inner, until=1.0, w=1.0):
    """The paper's loop, one gradient step after the other, each moving x itself."""
    for s, t in zip(grid, grid[1:]):
        time = torch.full((len(x),), s, dtype=torch.promote_types(x.dtype, torch.float32))
        null = network(x, time, 0 * LABEL)
        v = null + w * (network(x, time, LABEL) - null)
        if s < until:
            for _ in range(inner):
                x = x - rate * gradient(x + (1 - s) * v)
        x = x + (t - s) * v
    return x


GRID = [0.0, 0.1, 0.35, 0.7, 1.0]


@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 8, 8), (3, 1, 8, 8)])
def test_the_closed_form_is_inner_explicit_steps(inner, strength, w, shape):
    m = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m = m * (m > 0.4)
    x, y = random(), random(seed=1)
    guidance = pfm.guidance.cfg(w, null={"label": 0.0}) if w != 1.0 else None
    got = flow_chef(model(), x, y, Mask(m), grid=GRID, strength=strength, inner=inner, condition={"label": LABEL},
                    guidance=guidance, until=0.7)  # fmt: skip
    expected = by_hand(x, GRID, lambda D: m * (D - y), strength, inner, 0.7, w)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("strength, inner", [(0.4, 1), (1.0, 3), (1.6, 2)])
def test_linear_operators_against_explicit_steps(name, strength, inner):
    A, x = OPERATORS[name], random()
    y = A.forward(random(seed=1))

    def gradient(D):  # of 1/2 |A D - y|^2, from autograd and not from the adjoint
        D = D.detach().requires_grad_()
        return torch.autograd.grad(0.5 * (A.forward(D) - y).square().sum(), D)[0]

    got = flow_chef(model(), x, y, A, grid=GRID, strength=strength, inner=inner, condition={"label": LABEL})
    expected = by_hand(x, GRID, gradient, strength / A.norm_squared, inner)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    as_loss = Loss(lambda D, y: 0.5 * (A.forward(D) - y).square().flatten(1).sum(1))
    by_loss = flow_chef(model(), x, y, as_loss, grid=GRID, strength=strength / A.norm_squared, inner=inner,
                        condition={"label": LABEL})  # fmt: skip
    torch.testing.assert_close(by_loss, expected, rtol=1e-11, atol=1e-11)


def test_any_differentiable_loss_and_no_gradient_through_the_network():
    x, y = random(), torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    norms = Loss(lambda D, y: (D.tanh().flatten(1).mean(1) - y).square())
    tracked = []

    def watched(x, s, label):
        tracked.append(torch.is_grad_enabled())
        return network(x, s, label)

    def gradient(D):
        D = D.detach().requires_grad_()
        return torch.autograd.grad((D.tanh().flatten(1).mean(1) - y).square().sum(), D)[0]

    options = {"grid": GRID, "strength": 20.0, "inner": 2, "condition": {"label": LABEL}}
    got = flow_chef(model(watched), x, y, norms, **options)
    torch.testing.assert_close(got, by_hand(x, GRID, gradient, 20.0, 2), rtol=1e-12, atol=1e-12)
    assert not any(tracked)


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoints(name):
    A, x = OPERATORS[name], random()
    y = A.forward(x)
    r = random(y.shape, seed=1)
    assert float((y * r).sum()) == pytest.approx(float((x * A.adjoint(r)).sum()), rel=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_norms(name):
    """norm_squared bounds the largest eigenvalue of A'A, by power iteration; tight ones have A A' = norm_squared."""
    A, x = OPERATORS[name], random((1, 1, 8, 8))
    for _ in range(300):
        x = A.adjoint(A.forward(x / x.norm()))
    top = float(x.norm())
    assert 0.2 * A.norm_squared < top <= A.norm_squared * (1 + 1e-9)  # a kernel of both signs is bounded loosely
    r = random(A.forward(x).shape)
    assert torch.allclose(A.forward(A.adjoint(r)), A.norm_squared * r, rtol=1e-12) == A.tight


def test_blur_is_a_convolution():
    kernel = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1.0
    assert torch.equal(Blur(kernel).forward(x)[0, 0, 1:4, 1:4], kernel)
    assert float(Blur.gaussian(1.0).kernel.sum()) == pytest.approx(1.0)


# ---- what it is for ----------------------------------------------------------------------------------------------


def test_inpainting_keeps_known_pixels_and_its_error_is_the_strength_s():
    m = torch.zeros(1, 1, 8, 8)
    m[..., :4] = 1.0
    y, fm = random(seed=1, dtype=torch.float32), model()
    run = lambda k, n=1: flow_chef(  # noqa: E731
        fm, SHAPE, y, Mask(m), steps=8, strength=k, inner=n, condition={"label": LABEL}, seed=0
    )
    errors = [float(((run(k) - y) * m).abs().max()) for k in (0.5, 0.9, 0.99, 1.0)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[2] < 0.05
    assert errors[3] < 2e-6
    assert float(((run(0.9, 5) - y) * m).abs().max()) < 1e-4
    unsteered = pfm.sample(fm, SHAPE, 8, solver="euler", condition={"label": LABEL}, seed=0)
    assert float(((unsteered - y) * m).abs().max()) > 0.5
    torch.testing.assert_close(run(1.0) * (1 - m), unsteered * (1 - m))  # this network sees one pixel at a time


def test_super_resolution_meets_its_measurement():
    y = Downsample(2).forward(random(seed=1, dtype=torch.float32))
    got = flow_chef(model(), SHAPE, y, Downsample(2), steps=8, strength=1.0, condition={"label": LABEL}, seed=0)
    torch.testing.assert_close(Downsample(2).forward(got), y, rtol=0, atol=2e-6)


def test_strength_means_the_same_at_any_resolution():
    """A Gaussian's field acts on each pixel alone: doubling the image changes nothing."""
    fm = pfm.FlowMap(lambda x, s: Gaussian().velocity(x, s.reshape(-1, 1, 1, 1)), prediction="velocity")
    small, y = random((1, 1, 4, 4)), random((1, 1, 4, 4), seed=1)
    big = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    for of_small, of_big, y_big in (
        (Mask(torch.ones(1, 1, 1, 1)), Mask(torch.ones(1, 1, 1, 1)), big(y)),
        (Downsample(2), Downsample(4), None),
    ):
        measured = y if y_big is not None else Downsample(2).forward(y)
        a = flow_chef(fm, small, measured, of_small, steps=5, strength=0.4)
        b = flow_chef(fm, big(small), measured if y_big is None else y_big, of_big, steps=5, strength=0.4)
        torch.testing.assert_close(b, big(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [Trigonometric(), VariancePreserving()])
def test_any_path(path):
    def on_path(X, r, label):
        r = float(r[0])
        a, g = path.alpha(r), path.sigma(r)
        x, t = X / (a + g), a / (a + g)
        b = network(x, torch.full((len(x),), t, dtype=torch.float64), label)
        return x + (1 - t) * b

    m, x, y = (random(seed=3) > 0).double(), random(), random(seed=1)
    linear = [0.05, 0.3, 0.7, 0.95]
    options = {"strength": 0.7, "inner": 2, "condition": {"label": LABEL}}
    fm = pfm.FlowMap(on_path, prediction="data", interpolant=path)
    scale = path.scale(path.model_time(0.05))
    for operator, target in ((Mask(m), y), (Downsample(2), Downsample(2).forward(y))):
        got = flow_chef(fm, scale * x, target, operator, grid=[path.model_time(t) for t in linear], **options)
        expected = flow_chef(model(), x, target, operator, grid=linear, **options)
        torch.testing.assert_close(got / path.scale(path.model_time(0.95)), expected, rtol=2e-6, atol=2e-6)


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("inner", [1, 5])
def test_one_launch_per_masked_step(monkeypatch, w, inner):
    module, masked, other = sys.modules["pyflowmap.editing.flow_chef"], [], []

    def spy_combine(inputs, *arguments, **options):
        masked.append(len(inputs))
        return pfm.ops.combine(inputs, *arguments, **options)

    def spy_evaluate(*combinations, out=None, dtype=None):
        other.append(1)
        return pfm.evaluate(*combinations, out=out, dtype=dtype)

    monkeypatch.setattr(module, "combine", spy_combine)
    monkeypatch.setattr(module, "evaluate", spy_evaluate)
    guidance = pfm.guidance.cfg(w, null={"label": 0.0}) if w != 1.0 else None
    noise, y = random(dtype=torch.float32), random(seed=1, dtype=torch.float32)
    flow_chef(model(), noise, y, Mask(torch.ones(1, 1, 8, 8)), steps=6, strength=0.5, inner=inner,
              condition={"label": LABEL}, guidance=guidance)  # fmt: skip
    assert masked == [3 if w == 1.0 else 4] * 6  # x, the outputs and y, each read once
    assert len(other) == 1  # the first argument
    masked.clear(), other.clear()
    flow_chef(model(), noise, Downsample(2).forward(noise), Downsample(2), steps=6, strength=0.5, inner=inner,
              condition={"label": LABEL}, guidance=guidance)  # fmt: skip
    assert len(other) == 1 + 3 * 6 and not masked  # data prediction, residual, step: whatever `inner` is


def test_callback_seeds_half_precision_and_kept_noise():
    seen, noise = [], random(dtype=torch.float32)
    kept, fm = noise.clone(), model()
    options = {"steps": 4, "strength": 0.5, "condition": {"label": LABEL}}
    mask = Mask((random(seed=2) > 0).float())
    y = random(seed=1, dtype=torch.float32)
    got = flow_chef(fm, noise, y, mask, callback=seen.append, **options)
    assert torch.equal(noise, kept) and torch.equal(seen[-1]["x"], got)
    assert [r["nfe"] for r in seen] == [1, 2, 3, 4]
    assert len({r["x"].data_ptr() for r in seen}) == 4  # the caller's to keep
    assert torch.equal(flow_chef(fm, noise, y, mask, **options), got)
    torch.testing.assert_close(flow_chef(fm, noise, y.double(), mask, **options), got)  # the noise says the dtype
    a = flow_chef(fm, SHAPE, y, mask, seed=4, **options)
    part = flow_chef(fm, (1, *SHAPE[1:]), y[1:2], Mask(mask.mask[1:2]), seed=4, sample_ids=torch.tensor([1]),
                     steps=4, strength=0.5, condition={"label": LABEL[1:2]})  # fmt: skip
    torch.testing.assert_close(part, a[1:2])

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, s, label):
            assert x.dtype == torch.bfloat16
            return self.weight * torch.sin(x)

    half = flow_chef(model(Half()), SHAPE, y, Mask(torch.ones(1, 1, 8, 8)), seed=0, **{**options, "strength": 1.0})
    torch.testing.assert_close(half, y, rtol=0, atol=2e-6)  # the state is float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 2.0}, "0 < strength < 2"),
        ({"strength": 0.0}, "0 < strength < 2"),
        ({"strength": math.nan}, "0 < strength < 2"),
        ({"inner": 0}, "at least 1"),
        ({"until": 0.0}, "a time above 0"),
        ({"grid": [1.0, 0.0], "steps": None}, "rises"),
        ({"grid": [0.0, 1.0]}, "steps = 4 with a grid of 1 steps"),
        ({"guidance": pfm.guidance.erk(1.0)}, "guidance: erk compares .* flow_chef makes no such pair"),
        ({"seed": 3}, "with a shape only"),
        ({"measurement": torch.zeros(3, 2, 8, 4)}, "this operator measures"),
        ({"measurement": torch.full(SHAPE, math.inf)}, "not finite"),
        ({"measurement": torch.zeros(SHAPE).requires_grad_()}, "requires grad"),
        ({"operator": Mask(torch.ones(1, 1, 4, 8))}, "equal or 1"),
        ({"operator": Downsample(3)}, "multiples of 3"),
        ({"operator": Loss(lambda x, y: x.sum())}, "one number per sample"),
        ({"operator": Loss(lambda x, y: x.detach().flatten(1).sum(1))}, "does not depend"),
    ],
)
def test_errors(change, message):
    arguments = {"measurement": torch.zeros(SHAPE), "operator": Mask(torch.ones(1, 1, 8, 8)), "strength": 0.5,
                 "steps": 4, "condition": {"label": LABEL}, **change}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flow_chef(model(), torch.zeros(SHAPE), **arguments)


def test_a_guidance_that_is_none_is_told_what_to_be():
    with pytest.raises(TypeError, match=r"guidance is function; .* or subclass pfm.guidance.Guidance"):
        flow_chef(model(), torch.zeros(SHAPE), torch.zeros(SHAPE), Mask(torch.ones(1, 1, 1, 1)), strength=0.5,
                  guidance=lambda ask, x, s, t: ask(0)[0])  # fmt: skip


def test_a_loss_under_inference_mode():
    x, y = random(dtype=torch.float32), torch.zeros(SHAPE)
    loss = Loss(lambda x, y: (x - y).square().flatten(1).sum(1))
    options = {"steps": 3, "strength": 0.1, "condition": {"label": LABEL}}
    expected = flow_chef(model(), x, y, loss, **options)
    with torch.inference_mode():
        assert torch.equal(flow_chef(model(), x.clone(), y.clone(), loss, **options), expected)


@pytest.mark.parametrize("path", [pfm.interpolants.Linear(), Trigonometric(), VariancePreserving()])
def test_idle_steps_are_those_of_sample(path):
    """Nothing is steered before `until`, so this is Euler's sampling with the same rest: state, callback and nfe."""
    fm = pfm.FlowMap(network, prediction="data", interpolant=path)
    guidance = pfm.guidance.cfg_zero(2.0, null={"label": 0.0}, zero_init=2)
    records = {"ours": [], "theirs": []}
    options = {"condition": {"label": LABEL}, "guidance": guidance, "grid": [0.1, 0.2, 0.3, 0.4, 0.7, 0.9]}
    x, mask = random(), Mask(torch.zeros(1, 1, 1, 1))
    ours = flow_chef(fm, x, x, mask, strength=1.0, callback=records["ours"].append, **options)
    theirs = pfm.sample(fm, x, solver="euler", callback=records["theirs"].append, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(flow_chef(fm, x, x, mask, strength=1.0, **options), theirs)
    for a, b in zip(records["ours"], records["theirs"], strict=True):
        assert all(a[key] == pytest.approx(b[key]) for key in ("step", "steps", "s", "t", "nfe"))
        torch.testing.assert_close(a["x"], b["x"])


def test_errors_of_operators():
    with pytest.raises(ValueError, match="outside"):
        Mask(torch.tensor([[2.0]]))
    with pytest.raises(ValueError, match="outside"):
        Mask(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="odd sizes"):
        Blur(torch.ones(4))
    with pytest.raises(ValueError, match="above 0"):
        Blur.gaussian(0.0)
    with pytest.raises(ValueError, match="factor"):
        Downsample(0)
    with pytest.raises(ValueError, match="norm_squared"):
        LinearOperator(lambda x: x, lambda r: r, 0.0)
    with pytest.raises(TypeError, match="no forward"):
        flow_chef(model(), torch.zeros(SHAPE), torch.zeros(SHAPE), torch.ones(SHAPE), strength=0.5)
    broken = model(lambda x, s, label: x / 0.0)
    with pytest.raises(FloatingPointError, match="step 1 of 4"):
        flow_chef(broken, torch.ones(SHAPE), torch.zeros(SHAPE), Mask(torch.ones(1, 1, 8, 8)), steps=4, strength=0.5,
                  condition={"label": LABEL})  # fmt: skip
