"""`time_embedding` against cosines and sines in float64 of the float32 angle, and its derivatives in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from ops.fused_roads import ROADS, Case

import pyflowmap as pfm
from pyflowmap import _C, ops
from pyflowmap.nn.embedding import Embedding, sinusoidal
from pyflowmap.ops import backend as backends

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def formula(s, t, w, second="span"):
    """In the dtype of its operands."""
    angles = [each[:, None] * w for each in (s, t - s if second == "span" else t)]
    return torch.cat([f(angle) for angle in angles for f in (torch.cos, torch.sin)], 1)


def angles():
    """Spread over ten decades, and those next to a multiple of pi / 2, where most digits cancel."""
    near = (torch.arange(1, 6400, dtype=F64) * (math.pi / 2)).float()
    spread = 10 ** torch.linspace(-6, 4, 5000)
    far = torch.tensor([1e5, 1048575.9, 1048576.0, 1e7, 123456789.0, 1e15, 3.0e38])
    every = torch.cat([torch.zeros(1), near, torch.nextafter(near, torch.zeros(())), spread, far])
    return torch.cat([every, -every])


@pytest.mark.sanitizer
def test_cosines_to_one_ulp(backend):
    angle = angles()
    y = ops.time_embedding(angle, angle, torch.ones(1), second="end")
    want = torch.stack([angle.double().cos(), angle.double().sin()] * 2, 1)
    # Two ulps on the device (CUDA's own sincosf); the emulator's is the host's.
    ulps = 2.0 if backend.name == "cuda" else 0.52 if backend.name == "cpu" else 1.0
    spacing = torch.finfo(F32).eps * 2.0 ** want.abs().log2().floor()
    worst = ((y.double() - want).abs() / spacing.clamp_min(2.0**-149)).max()
    assert float(worst) <= ulps


def test_angles_without_end():
    y = ops.time_embedding(torch.tensor([math.inf, math.nan]), torch.zeros(2), torch.ones(3))
    assert bool(y.isnan().all())


class Call:
    def __init__(self, batch=3, h=32, dtype=F32, second="span", scale=1.0, times=None):
        g = torch.Generator().manual_seed(batch + h)
        self.second, self.dtype = second, dtype
        times = times or (F64 if dtype == F64 else F32)
        self.s, self.t = (torch.rand(batch, generator=g).to(times) for _ in range(2))
        self.ds, self.dt = ((scale * torch.randn(batch, generator=g)).to(times) for _ in range(2))
        self.w = 100 * torch.rand(h, generator=g)
        self.gy, self.gdy = (torch.randn(batch, 4 * h, generator=g).to(dtype) for _ in range(2))

    def f(self, s, t):
        return ops.time_embedding(s, t, self.w, second=self.second, dtype=self.dtype)

    def exact(self):
        """What each result is, and the sum of the sizes of its terms. Of the float32 angle: its rounding is part of the
        function, whose derivative is that of the cosine there."""
        span = self.second == "span"
        wide = F64 if self.s.dtype == F64 else F32
        s, t, ds, dt, w = (v.to(wide) for v in (self.s, self.t, self.ds, self.dt, self.w))
        y, dy, of_value, of_both, of_tangent = [], [], [], [], []
        for i, (time, moved) in enumerate(((s, ds), (t - s, dt - ds) if span else (t, dt))):
            angle, moved = (time[:, None] * w).double(), moved.double()[:, None]
            c, d, v = angle.cos(), angle.sin(), w.double()
            g1, g2, d1, d2 = (g.double().chunk(4, 1)[2 * i + k] for g in (self.gy, self.gdy) for k in range(2))
            y += [(c, c * 0 + 1), (d, d * 0 + 1)]
            dy += [(-v * d * moved, v * moved.abs()), (v * c * moved, v * moved.abs())]
            sums = lambda *terms: torch.stack([sum(terms).sum(1), sum(x.abs() for x in terms).sum(1)])  # noqa: E731
            of_value.append(sums(v * g2 * c, -v * g1 * d))
            of_both.append(of_value[-1] + sums(-moved * v**2 * d1 * c, -moved * v**2 * d2 * d))
            of_tangent.append(sums(v * d2 * c, -v * d1 * d))
        if span:
            for pair in (of_value, of_both, of_tangent):
                pair[0] = torch.stack([pair[0][0] - pair[1][0], pair[0][1] + pair[1][1]])
        blocks = [tuple(torch.cat(parts, 1) for parts in zip(*rows, strict=True)) for rows in (y, dy)]
        return [*blocks, *of_value, *of_both, *of_tangent]

    def found(self):
        s, t, ds, dt = leaves = [v.detach().clone().requires_grad_() for v in (self.s, self.t, self.ds, self.dt)]
        y = self.f(s, t)
        of_value = torch.autograd.grad(y, (s, t), self.gy)
        both_y, dy = pfm.jvp(self.f, (s, t), (ds, dt), track_tangent=True)
        assert torch.equal(both_y, y)
        return [y.detach(), dy.detach(), *of_value, *torch.autograd.grad((both_y, dy), leaves, (self.gy, self.gdy))]

    def check(self):
        names = ("y", "dy", "gs", "gt", "gs of both", "gt of both", "gds", "gdt")
        arithmetic = torch.finfo(F64 if self.s.dtype == F64 else F32)
        for name, got, (want, size) in zip(names, self.found(), self.exact(), strict=True):
            # Some roundings per term, one where it is stored.
            bound = 0.501 * torch.finfo(got.dtype).eps * want.abs() + 4 * arithmetic.eps * size
            bound += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
            worst = float(((got.double() - want).abs() / bound).max())
            assert got.shape == want.shape and worst <= 1, f"{name}: {worst:.2f} times the bound"


@pytest.mark.sanitizer
@pytest.mark.parametrize("second", ["span", "end"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_values_and_derivatives(backend, dtype, second):
    Call(dtype=dtype, second=second).check()


@pytest.mark.sanitizer
@pytest.mark.parametrize(("batch", "h"), [(1, 1), (2, 5), (33, 17), (7, 100), (600, 16)])
def test_shapes(backend, batch, h):
    Call(batch, h).check()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_tangents_of_any_size(backend, scale):
    Call(scale=scale).check()


@pytest.mark.parametrize("times", [BF16, F16])
def test_times_of_half_precision_have_float32_angles(backend, times):
    call = Call(times=times)
    want = formula(call.s.float(), call.t.float(), call.w)
    torch.testing.assert_close(call.f(call.s, call.t), want, rtol=0, atol=1e-6)


def test_one_time_of_float64_makes_both():
    s, t, w = torch.rand(3), torch.rand(3, dtype=F64), torch.rand(4)
    y = ops.time_embedding(s, t, w, dtype=F64)
    torch.testing.assert_close(y, formula(s.double(), t, w.double()), rtol=1e-15, atol=1e-15)
    assert ops.time_embedding(s, t, w).dtype == F32


@pytest.mark.sanitizer
def test_times_that_share_memory(backend):
    one, two = torch.tensor(0.3), torch.rand(5, 2)
    w = torch.rand(3) * 10
    for s, t in ((one.expand(5), two[:, 1]), (two[:, 0], two[:, 1])):
        torch.testing.assert_close(ops.time_embedding(s, t, w), formula(s, t, w))


def test_nothing_to_do(backend):
    s = torch.zeros(0, requires_grad=True)
    y = ops.time_embedding(s, torch.zeros(0), torch.ones(3))
    assert y.shape == (0, 12) and torch.autograd.grad(y.sum(), s)[0].shape == (0,)


@pytest.mark.parametrize("moves", ["s", "t"])
def test_one_time_moves(backend, moves):
    call = Call(h=4)
    call.w /= 30
    ds, dt = (call.ds if moves == "s" else None), (call.dt if moves == "t" else None)
    zero = torch.zeros_like(call.s)
    _, dy = pfm.jvp(call.f, (call.s, call.t), (ds, dt))
    want = torch.func.jvp(
        lambda s, t: formula(s, t, call.w), (call.s, call.t), (zero if ds is None else ds, zero if dt is None else dt)
    )[1]
    torch.testing.assert_close(dy, want)


def test_threads_do_not_show():
    call, before = Call(2000, 32), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(call.found())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_grid_does_not_show(simt):
    call, module = Call(70, 33), backends.simt()
    with backends.use("simt"):
        want = call.found()
        try:
            for order, host_threads, multiprocessors in (("reverse", 1, 1), ("random", 2, 5)):
                module.set_options(order, 1, host_threads=host_threads, multiprocessors=multiprocessors)
                assert all(torch.equal(a, b) for a, b in zip(want, call.found(), strict=True))
        finally:
            module.set_options()


@pytest.mark.sanitizer
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_instruction_sets(isa):
    best = _C.build()["best_isa"]
    if ("base", "v3", "v4").index(isa) > ("base", "v3", "v4").index(best):
        pytest.skip(f"the best here is {best}")
    before = _C.build()["isa"]
    _C.set_isa(isa)
    try:
        Call(5, 37).check()
        angle = angles()
        y = ops.time_embedding(angle, angle, torch.ones(1), second="end")[:, 1]
        want = angle.double().sin()
        assert bool(((y.double() - want).abs() <= 1.04 * 2.0**-24 * want.abs()).all())
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("road", ROADS)
def test_roads(road):
    call = Call(3, 2, F64)
    w = torch.tensor([0.7, 2.0], dtype=F64)
    function = lambda s, t: ops.time_embedding(s, t, w, dtype=F64)  # noqa: E731
    ROADS[road](Case(function, lambda s, t: formula(s, t, w), (call.s, call.t), (call.ds, call.dt)))


def test_frequencies_have_a_gradient_and_no_tangent():
    call = Call(3, 4, F64)
    w = call.w.double().requires_grad_()
    found, expected = (
        torch.autograd.grad(f(call.s, call.t, w).sin().sum(), w)[0]
        for f in (lambda s, t, w: ops.time_embedding(s, t, w, dtype=F64), formula)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="frequencies has a tangent"):
        pfm.jvp(lambda w: ops.time_embedding(call.s, call.t, w), (w.detach(),), (torch.ones_like(w),))


def test_the_embedding_is_made_of_it():
    """The same as from two embeddings of one time each."""
    torch.manual_seed(0)
    e = Embedding(16, 0, 32)
    s, t = torch.rand(2, 5)
    silu = torch.nn.functional.silu
    want = silu(e.mix(silu(e.start(sinusoidal(s, 32)) + e.span(sinusoidal(t - s, 32)))))
    torch.testing.assert_close(e(s, t), want, rtol=1e-5, atol=1e-6)
    assert e.to(BF16)(s, t).dtype == BF16


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.zeros(2), torch.zeros(3), torch.ones(1)), {}, ValueError, r"s has shape \(2,\) and t has shape \(3,\)"),
        ((torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(1)), {}, ValueError, r"both are \(B,\)"),
        ((torch.zeros(2), torch.zeros(2), torch.ones(1, 2)), {}, ValueError, r"frequencies has shape \(1, 2\)"),
        ((torch.zeros(2), torch.zeros(2), torch.ones(0)), {}, ValueError, r"frequencies has shape \(0,\)"),
        ((torch.zeros(2), torch.zeros(2).long(), torch.ones(1)), {}, TypeError, "t is torch.int64"),
        ((torch.zeros(2), 0.5, torch.ones(1)), {}, TypeError, "t is a float"),
        ((torch.zeros(2),) * 2 + (torch.ones(1),), {"second": "start"}, ValueError, "second = 'start'"),
        ((torch.zeros(2),) * 2 + (torch.ones(1),), {"dtype": torch.int64}, ValueError, "dtype = torch.int64"),
    ],
)
def test_errors(arguments, options, error, words):
    with pytest.raises(error, match=words):
        ops.time_embedding(*arguments, **options)
