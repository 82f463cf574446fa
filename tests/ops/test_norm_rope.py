"""`norm_rope` against its formula in float64: values, tangents and gradients on every back end, layout and dtype."""

from __future__ import annotations

import pytest
import torch
from ops.fused_roads import ROADS, Case

import pyflowmap as pfm
from pyflowmap import _C, ops
from pyflowmap.ops import backend as backends

EPS = 1e-6


def formula(x, weight, cos, sin, eps=EPS):
    """In the dtype of its operands."""
    n = weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if cos is None:
        return n
    half = x.shape[-1] // 2
    turned = torch.complex(n[..., :half], n[..., half:]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)


def projected(b, h, n, e, dtype, generator):
    """The second of three parts of a projection: (B, H, N, E), of which nothing but the last dimension is dense."""
    whole = torch.randn(b, n, 3, h, e, generator=generator, dtype=torch.float64).to(dtype)
    return whole.permute(2, 0, 3, 1, 4)[1]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "projected": lambda x: x,
    "expanded": lambda x: x[:1].expand(x.shape),
    "apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
ANGLES = {"none": None, "(N, E/2)": lambda x: x, "(B, 1, N, E/2)": lambda x: x[None, None] * 1.0}


class Call:
    """Operands and tangents of a call in `dtype`, the same in float64, and cotangents."""

    def __init__(self, shape, dtypes=(torch.float32,) * 2, layout="projected", angles="(N, E/2)", seed=0, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        n, e = shape[2:]
        of_x, of_weight = dtypes
        self.x = LAYOUTS[layout](projected(*shape, of_x, generator))
        self.dx = LAYOUTS[layout](projected(*shape, of_x, generator) * scale)
        self.weight = (1 + 0.3 * random(e)).to(of_weight)
        self.dweight = (random(e) * scale).to(of_weight)
        self.cos = self.sin = None
        if angles != "none":
            angle = ANGLES[angles](3 * random(n, e // 2))
            wide = torch.float64 if of_x == torch.float64 else torch.float32
            self.cos, self.sin = angle.cos().to(wide), angle.sin().to(wide)
        self.gy, self.gdy = projected(*shape, of_x, generator), random(*shape).to(of_x)

    def exact(self):
        """(y, dy) and the gradients of (x, weight), then of (x, weight, dx, dweight), in float64."""
        wide = [None if v is None else v.double() for v in (self.x, self.weight, self.dx, self.dweight)]
        cos, sin = (None if v is None else v.double() for v in (self.cos, self.sin))
        leaves = [v.detach().clone().requires_grad_() for v in wide]
        f = lambda x, weight: formula(x, weight, cos, sin)  # noqa: E731
        y, dy = torch.func.jvp(f, tuple(leaves[:2]), tuple(leaves[2:]))
        of_value = torch.autograd.grad(y, leaves[:2], self.gy.double(), retain_graph=True)
        of_both = torch.autograd.grad((y, dy), leaves, (self.gy.double(), self.gdy.double()))
        return y.detach(), dy.detach(), of_value, of_both

    def found(self):
        leaves = [v.detach().requires_grad_() for v in (self.x, self.weight, self.dx, self.dweight)]
        x, weight, dx, dweight = leaves
        f = lambda x, weight: ops.norm_rope(x, weight, self.cos, self.sin)  # noqa: E731
        y = f(x, weight)
        of_value = torch.autograd.grad(y, [x, weight], self.gy)
        both_y, dy = pfm.jvp(f, (x, weight), (dx, dweight), track_tangent=True)
        assert torch.equal(both_y, y)
        of_both = torch.autograd.grad((both_y, dy), leaves, (self.gy, self.gdy))
        return y.detach(), dy.detach(), of_value, of_both

    def sizes(self):
        """The largest term of each result: what a row of one column leaves of its tangent is their rounding alone."""
        r = (self.x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
        most = lambda v: float(v.double().abs().max())  # noqa: E731
        n, e, w, dw, z, zd = map(most, (r * self.x, r * self.dx, self.weight, self.dweight, self.gy, self.gdy))
        y, dy, gx = w * n, dw * n + w * e, most(r) * w * z
        rows = (self.x.numel() / self.x.shape[-1]) ** 0.5
        both = most(r) * (w * z + dw * zd + w * zd * e)
        return y, dy, gx, rows * z * n, both, rows * (z * n + zd * e), most(r) * w * zd, rows * zd * n

    def check(self):
        exact, found = self.exact(), self.found()
        assert found[0].is_contiguous() and found[0].dtype == self.x.dtype and found[1].dtype == self.x.dtype
        names = ("y", "dy", "gx", "gweight", "gx of both", "gweight of both", "gdx", "gdweight")
        arithmetic = torch.finfo(torch.float64 if self.x.dtype == torch.float64 else torch.float32).eps
        flat = lambda parts: (*parts[:2], *parts[2], *parts[3])  # noqa: E731
        for name, got, want, size in zip(names, flat(found), flat(exact), self.sizes(), strict=True):
            # Stored results are rounded once; before that, some ten roundings of their terms.
            info = torch.finfo(got.dtype)
            bound = 0.501 * info.eps * want.abs() + 8 * arithmetic * size + info.smallest_normal * info.eps
            worst = float(((got.double() - want).abs() / bound).max())
            assert got.shape == want.shape and worst <= 1, f"{name}: {worst:.2f} times the bound"


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(2, 3, 5, 64), (1, 1, 1, 2), (1, 2, 7, 10), (3, 2, 40, 16), (2, 1, 3, 96), (1, 2, 3, 300), (1, 1, 2, 1200)]
BARE = [(2, 2, 3, 1), (2, 1, 4, 7), (1, 2, 3, 33), (1, 1, 2, 601)]


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape):
    Call(shape).check()


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", BARE)
def test_without_angles(backend, shape):
    Call(shape, angles="none").check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("angles", ANGLES)
def test_layouts(backend, layout, angles):
    Call((2, 3, 5, 32), layout=layout, angles=angles).check()


MIXED = [(F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, BF16)]


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 2, 3, 20), (1, 1, 2, 520)])
def test_dtypes(backend, shape, dtypes):
    Call(shape, dtypes).check()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_tangents_of_any_size(backend, scale):
    Call((2, 3, 5, 64), scale=scale).check()


def test_float64_meets_the_others():
    call = Call((1, 2, 3, 8))
    y = ops.norm_rope(call.x, call.weight.double(), call.cos.double(), call.sin.double())
    assert y.dtype == F32 and torch.equal(y, ops.norm_rope(call.x, call.weight, call.cos, call.sin))
    y = ops.norm_rope(call.x.double(), call.weight, call.cos, call.sin)
    want = formula(*(v.double() for v in (call.x, call.weight, call.cos, call.sin)))
    torch.testing.assert_close(y, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_no_worse_than_torch(backend, dtype):
    call = Call((2, 4, 32, 64), (dtype, dtype))
    want = call.exact()[0]
    n = torch.nn.functional.rms_norm(call.x, (64,), call.weight, EPS)
    theirs = formula(n, torch.ones(()), call.cos, call.sin, eps=1 - n.float().square().mean(-1, keepdim=True))
    error = lambda y: float((y.double() - want).norm())  # noqa: E731
    ours = ops.norm_rope(call.x, call.weight, call.cos, call.sin)
    assert error(ours) <= 1.2 * error(theirs.to(dtype))


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_other_ranks(backend, dims):
    x = torch.randn(2, 3, 2, 4, 8)[(0,) * (5 - dims)]
    angle = torch.randn(x.shape[-2] if dims > 1 else 1, 4)
    cos, sin = (angle.cos(), angle.sin()) if dims > 1 else (angle[0].cos(), angle[0].sin())
    y = ops.norm_rope(x, torch.ones(8), cos, sin)
    torch.testing.assert_close(y, formula(x, torch.ones(8), cos, sin))


def test_nothing_to_do(backend):
    x = torch.zeros(2, 0, 3, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = ops.norm_rope(x, weight, None, None)
    gx, gweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == gx.shape == x.shape and torch.equal(gweight, torch.zeros(8))


@pytest.mark.sanitizer
def test_a_part_of_a_projection_is_not_copied(backend):
    """The kernel takes it as it lies; and refuses what it cannot take."""
    module = backends.simt() if backend.name == "simt" else _C
    call = Call((2, 3, 5, 8))
    names = ("x", "weight", "cos", "sin", "none", "none", "y", "none")
    usual = {**vars(call), "y": torch.empty(2, 3, 5, 8), "none": None}
    operands = lambda **other: tuple({**usual, **other}[name] for name in names)  # noqa: E731
    assert not call.x.is_contiguous() and module.norm_rope(operands(), EPS)
    for wrong in (
        {"x": call.x[..., ::2]},
        {"x": call.x[0]},
        {"cos": None},
        {"cos": call.cos.double(), "sin": call.sin.double()},
        {"weight": call.weight.double()},
        {"weight": call.weight[:4]},
        {"y": torch.empty(2, 3, 5, 4)},
        {"y": None},
    ):
        assert not module.norm_rope(operands(**wrong), EPS), wrong


# ---- the same bits ---------------------------------------------------------------------------------------------------


def bits(call):
    y, dy, of_value, of_both = call.found()
    return [y, dy, *of_value, *of_both]


@pytest.mark.parametrize("shape", [(2, 3, 70, 32), (1, 2, 5, 600)])
def test_threads_do_not_show(shape):
    call, before = Call(shape), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(bits(call))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(2, 3, 70, 32), (1, 2, 5, 600)])
def test_the_grid_does_not_show(simt, shape, dtype):
    call, module = Call(shape, (dtype, dtype)), backends.simt()
    with backends.use("simt"):
        want = bits(call)
        try:
            for options in (
                {"order": "reverse", "fill": 0xFF},
                {"order": "random", "seed": 3, "multiprocessors": 1},
                {"host_threads": 2, "multiprocessors": 9},
            ):
                module.set_options(**options)
                assert all(torch.equal(a, b) for a, b in zip(want, bits(call), strict=True)), options
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
        Call((2, 3, 5, 48)).check()
        Call((2, 3, 5, 40), (BF16, BF16)).check()
    finally:
        _C.set_isa(before)


# ---- roads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("angles", ["none", "(N, E/2)"])
def test_roads(road, angles):
    call = Call((2, 2, 3, 4), (F64, F64), angles=angles)
    turned = lambda f: lambda x, weight: f(x, weight, call.cos, call.sin, eps=0.1)  # noqa: E731
    ROADS[road](Case(turned(ops.norm_rope), turned(formula), (call.x, call.weight), (call.dx, call.dweight)))


def test_roads_of_float32(backend):
    call = Call((2, 2, 3, 4))
    turned = lambda f: lambda x, weight: f(x, weight, call.cos, call.sin, eps=0.1)  # noqa: E731
    case = Case(turned(ops.norm_rope), turned(formula), (call.x, call.weight), (call.dx, call.dweight), 1e-4, 1e-4)
    for road in ("some tangents", "gradient beside a tangent", "gradient through torch.func.jvp", "transforms"):
        ROADS[road](case)


def test_angles_have_a_gradient_and_no_tangent():
    call = Call((2, 2, 3, 4), (F64, F64))

    def beside_a_tangent(x, *others):
        return pfm.jvp(lambda x: ops.norm_rope(x, *others), (x,), (call.dx,))[0]

    for f in (ops.norm_rope, beside_a_tangent):
        leaves = [v.clone().requires_grad_() for v in (call.x, call.weight, call.cos, call.sin)]
        found = torch.autograd.grad(f(*leaves).square().sum(), leaves)
        expected = torch.autograd.grad(formula(*leaves).square().sum(), leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match=r"cos.detach\(\)"):
        pfm.jvp(lambda cos: ops.norm_rope(call.x, call.weight, cos, call.sin), (call.cos,), (call.sin,))
    with pytest.raises(NotImplementedError, match="constant operands"):
        torch.func.jvp(lambda cos: ops.norm_rope(call.x, call.weight, cos, call.sin), (call.cos,), (call.sin,))


def test_errors():
    x, cos = torch.zeros(2, 2, 3, 4), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"cos and sin have shape \(5, 2\) but x has shape .*\(3, 2\)"):
        ops.norm_rope(x, torch.ones(4), cos, cos)
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        ops.norm_rope(x, torch.ones(4).long(), None, None)
