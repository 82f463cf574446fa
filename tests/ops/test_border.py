"""The border between torch and the kernels: two roads, the same bits, and tensors that are not what they seem."""

from __future__ import annotations

import contextlib
import gc
import sys
import tracemalloc

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyflowmap import ops
from pyflowmap.ops import Noise
from pyflowmap.ops import backend as backends
from pyflowmap.ops.combine_call import has_dense_rows


class Method(torch.Tensor):
    """A subclass that adds nothing but a type."""


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    for part in parts:
        assert part in text, text


@pytest.fixture
def direct_calls(monkeypatch):
    """Answers of the direct road: True where it ran the kernel."""
    answers = []
    real = backends.direct.combine

    def logged(*args):
        answers.append(real(*args))
        return answers[-1]

    monkeypatch.setattr(backends.direct, "combine", logged)
    return answers


# ---- two roads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (2, 20000), (5,), (2, 3, 4, 4)])
def test_both_roads_give_the_same_bits(backend, dtype, shape):
    if dtype == torch.float64 and backend.name == "cuda":
        pytest.skip("float64 runs on the reference there")
    x, v = (torch.randn(shape).to(backend.device, dtype) for _ in range(2))
    h = torch.rand(shape[0]).to(backend.device)
    matrix = ((1.0, (0.3, h)), (h, -2.0))
    out = (torch.empty_like(x), torch.empty_like(x))
    ops.combine((x, v), matrix, out=out)
    for watched in (ops.combine((x, v), matrix), ops.combine((x.clone().requires_grad_(), v), matrix)):
        for a, b in zip(out, watched, strict=True):
            assert torch.equal(a, b)


def test_the_direct_road_is_taken(direct_calls):
    x, o = torch.randn(2, 3), torch.empty(2, 3)
    ops.combine((x, torch.nn.Parameter(x)), ((1.0, 0.5),), out=(o,))
    assert direct_calls == [False]  # a Parameter needs grad
    with torch.no_grad():
        ops.combine((x, torch.nn.Parameter(x)), ((1.0, 0.5),), out=(o,))
    assert direct_calls == [False, True]


def test_watched_tensors_leave_the_direct_road(direct_calls):
    x, o = torch.randn(2, 3), torch.empty(2, 3)
    call = lambda x, **k: ops.combine((x,), ((2.0,),), out=(torch.empty(2, 3),), **k)  # noqa: E731
    call(x.clone().requires_grad_())
    with fwAD.dual_level():
        call(x)
        call(fwAD.make_dual(x, x))
    torch.func.jvp(lambda x: ops.combine((x,), ((2.0,),), out=(torch.empty_like(x),))[0], (x,), (x,))
    call(x.as_subclass(Method))
    with FakeTensorMode() as mode, pytest.raises(TypeError, match="FakeTensor"):
        ops.combine((mode.from_tensor(x),), ((2.0,),), out=(mode.from_tensor(o),))
    assert direct_calls and not any(direct_calls)


# ---- tensors that are not what they seem -----------------------------------------------------------------------------


def test_conj_and_neg_views():
    z = torch.randn(2, 3, dtype=torch.complex64)
    with pytest.raises(TypeError) as error:
        ops.combine((z.conj(),), ((1.0,),))
    one_line(error, "inputs[0]", "complex64")
    # both carry the negative bit, so that their memory holds the wrong sign; the second is dense, as kernels like it
    for neg in (z.conj().imag, torch._neg_view(torch.randn(2, 3))):
        assert neg.is_neg()
        for out in (None, (torch.empty(2, 3),)):
            with pytest.raises(ValueError) as error:
                ops.combine((neg,), ((1.0,),), out=out)
            one_line(error, "inputs[0]", "resolve_neg")
        with pytest.raises(ValueError) as error:
            ops.combine((torch.zeros(2, 3),), ((1.0,),), out=(neg,))
        one_line(error, "out[0]", "resolve_neg")


@pytest.mark.parametrize("out", [False, True])
def test_requires_grad_is_routed(out):
    x = torch.randn(2, 3, requires_grad=True)
    (y,) = ops.combine((x,), ((2.0,),), out=(torch.empty(2, 3),) if out else None)
    assert y.requires_grad
    y.sum().backward()
    assert (x.grad == 2).all()
    h = torch.rand(2, requires_grad=True)
    (y,) = ops.combine((x.detach(),), ((h,),), out=(torch.empty(2, 3),) if out else None)
    (g,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(g, x.detach().sum(1))


def test_dual_coefficient_and_operand_with_out():
    x, h = torch.randn(2, 3), torch.rand(2)
    with fwAD.dual_level():
        (y,) = ops.combine((x,), ((fwAD.make_dual(h, torch.ones(2)),),), out=(torch.empty(2, 3),))
        torch.testing.assert_close(fwAD.unpack_dual(y).tangent, x)


def test_fake_and_meta_tensors():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        r = ops.combine((fake,), ((1.0,), (2.0,)), dtype=torch.bfloat16, gram=True, sums=True)
    for y in (*r.outputs, r.gram, r.sums):
        assert isinstance(y, FakeTensor)
    assert r.outputs[0].stride() == x.stride() and r.outputs[0].dtype == torch.bfloat16 and r.gram.shape == (2, 2, 2)
    for out in (None, (torch.empty(x.shape),)):
        with pytest.raises(TypeError) as error:
            ops.combine((fake,), ((1.0,),), out=out)
        one_line(error, "inputs[0]", "FakeTensor", "FakeTensorMode")
    (y,) = ops.combine((x.to("meta"),), ((1.0,),))
    assert y.is_meta and y.shape == x.shape
    m = torch.empty(2, 3, device="meta")
    ops.combine((m,), ((1.0,), (2.0,)), out=(torch.empty_like(m), torch.empty_like(m, dtype=torch.bfloat16)))


def test_tracing_sees_the_operator():
    graph = make_fx(lambda x: ops.combine((x,), ((2.0,),))[0])(torch.randn(2, 3))
    assert "pyflowmap.combine" in graph.code
    x = torch.randn(2, 3)
    assert torch.equal(graph(x), 2 * x)


def test_subclass_without_behaviour():
    x = torch.randn(2, 3)
    (y,) = ops.combine((x.as_subclass(Method), x), ((1.0, 1.0),))
    assert torch.equal(torch.Tensor(y), 2 * x)
    with pytest.raises(TypeError) as error:
        ops.combine((x,), ((1.0,),), out=(torch.empty(2, 3).as_subclass(Method),))
    one_line(error, "out[0]", "Method")


def test_functorch_wrappers():
    x = torch.randn(4, 2, 3)
    got = torch.func.vmap(lambda x: ops.combine((x,), ((2.0,),))[0])(x)
    assert torch.equal(got, 2 * x)
    assert torch.equal(torch.func.grad(lambda x: ops.combine((x,), ((2.0,),))[0].sum())(x), torch.full_like(x, 2.0))


def test_inference_mode():
    with torch.inference_mode():
        x, o = torch.randn(2, 3), torch.empty(2, 3)
        assert torch.equal(ops.combine((x,), ((2.0,),))[0], 2 * x)
        assert torch.equal(ops.combine((x,), ((2.0,),), out=(o,))[0], 2 * x)
    assert torch.equal(ops.combine((x,), ((2.0,),))[0], 2 * x)


# ---- refused ---------------------------------------------------------------------------------------------------------

X, IDS = torch.zeros(2, 3), torch.arange(3)
REFUSED = {
    "integer": (lambda: ops.combine((X.long(),), ((1.0,),)), TypeError, ("inputs[0]", "int64")),
    "boolean": (lambda: ops.combine((X, X.bool()), ((1.0, 1.0),)), TypeError, ("inputs[1]", "bool")),
    "complex": (lambda: ops.combine((X, X.cfloat()), ((1.0, 1.0),)), TypeError, ("inputs[1]", "complex64")),
    "integer out": (lambda: ops.combine((X,), ((1.0,),), out=(X.int(),)), TypeError, ("out[0]", "int32")),
    "sparse": (lambda: ops.combine((X.to_sparse(),), ((1.0,),)), TypeError, ("inputs[0]", "sparse", "to_dense")),
    "sparse csr": (lambda: ops.combine((X, X.to_sparse_csr()), ((1.0, 1.0),)), TypeError, ("inputs[1]", "to_dense")),
    "list": (lambda: ops.combine(([1.0],), ((1.0,),)), TypeError, ("inputs[0]", "list")),
    "shape": (lambda: ops.combine((X, X.T), ((1.0, 1.0),)), ValueError, ("inputs[1]", "(3, 2)", "(2, 3)")),
    "broadcast": (lambda: ops.combine((X, X[:1]), ((1.0, 1.0),)), ValueError, ("inputs[1]", "(1, 3)")),
    "out shape": (lambda: ops.combine((X,), ((1.0,),), out=(torch.zeros(2, 4),)), ValueError, ("out[0]", "(2, 4)")),
    "device": (lambda: ops.combine((X, X.to("meta")), ((1.0, 1.0),)), ValueError, ("inputs[1]", "meta", "cpu")),
    "out device": (lambda: ops.combine((X,), ((1.0,),), out=(X.to("meta"),)), ValueError, ("out[0]", "meta")),
    "rows": (lambda: ops.combine((X,), ()), ValueError, ("no rows",)),
    "columns": (lambda: ops.combine((X, X), ((1.0,),)), ValueError, ("coefficients",)),
    "vector": (lambda: ops.combine((X,), ((torch.ones(3),),)), ValueError, ("coefficients[0][0]", "(3,)", "(2,)")),
    "vector dtype": (lambda: ops.combine((X,), ((torch.ones(2).cfloat(),),)), TypeError, ("complex64",)),
    "string": (lambda: ops.combine((X,), (("a",),)), TypeError, ("coefficients[0][0]", "str")),
    "none": (lambda: ops.combine((X,), ((None,),)), TypeError, ("coefficients[0][0]", "NoneType")),
    "two tensors": (lambda: ops.combine((X,), (((torch.ones(()), torch.ones(2)),),)), TypeError, ("multiply",)),
    "leading": (lambda: ops.combine((X,), ((1.0,),), leading=3), ValueError, ("leading=3", "2")),
    "bare out": (lambda: ops.combine((X,), ((1.0,),), out=X), ValueError, ("tuple of 1",)),
    "nothing": (lambda: ops.combine((), ((),)), ValueError, ("like=",)),
    "nothing asked": (lambda: ops.combine((X,), ((1.0,),), store=(False,)), ValueError, ("nothing",)),
    "mask shape": (lambda: ops.combine((X,), ((1.0,),), mask=(torch.ones(3), ((1.0,),))), ValueError, ("mask", "(3,)")),
    "clamp": (lambda: ops.combine((X,), ((1.0,),), clamp=((1.0, -1.0),)), ValueError, ("clamp[0]", "low <= high")),
    "clamp nan": (lambda: ops.combine((X,), ((1.0,),), clamp=((float("nan"), 1.0),)), ValueError, ("clamp[0]",)),
    "dtype": (lambda: ops.combine((X,), ((1.0,),), dtype=torch.int32), TypeError, ("int32",)),
    "seed": (lambda: ops.combine((X,), ((1.0, 1.0),), noise=Noise(0.5)), TypeError, ("seed", "float")),
    "seed tensor": (lambda: ops.combine((X,), ((1.0, 1.0),), noise=Noise(torch.ones(2))), ValueError, ("seed", "(2,)")),
    "ids": (
        lambda: ops.combine((X,), ((1.0, 1.0),), noise=Noise(0, 0, IDS)),
        ValueError,
        ("sample_ids", "(3,)"),
    ),
    "ids dtype": (lambda: ops.combine((X,), ((1.0, 1.0),), noise=Noise(0, 0, X[:, 0])), TypeError, ("sample_ids",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    call, kind, parts = REFUSED[case]
    with pytest.raises(kind) as error:
        call()
    one_line(error, "combine", *parts)


# ---- aliasing --------------------------------------------------------------------------------------------------------


def overlapping():
    """name -> (inputs, outputs, memory): outputs that may not be written, in memory whose bytes must stay."""
    memory = lambda n=64: torch.arange(float(n))  # noqa: E731
    b = memory()
    yield "expanded", (torch.ones(4, 3),), (b[:3].expand(4, 3),), b
    b = memory()
    yield "expanded columns", (torch.ones(4, 3),), (b[:4, None].expand(4, 3),), b
    b = memory()
    yield "rows overlap themselves", (torch.ones(4, 6),), (b.as_strided((4, 6), (3, 1)),), b
    b = memory()
    yield "columns overlap themselves", (torch.ones(4, 2, 3),), (b.as_strided((4, 2, 3), (16, 1, 1)),), b
    b = memory()
    yield "shifted by one", (b[:12].view(4, 3),), (b[1:13].view(4, 3),), b
    b = memory()
    yield "shifted by a row", (b[:12].view(4, 3),), (b[3:15].view(4, 3),), b
    b = memory()
    yield "same place, other dtype", (b[:12].view(4, 3),), (b.view(torch.bfloat16)[:12].view(4, 3),), b
    b = memory()
    yield "same place, other strides", (b[:9].view(3, 3),), (b[:9].view(3, 3).T,), b
    b = memory()
    yield "the same output twice", (torch.ones(4, 3),) * 2, (b[:12].view(4, 3),) * 2, b
    b = memory()
    yield "outputs overlap", (torch.ones(4, 3),), (b[:12].view(4, 3), b[6:18].view(4, 3)), b
    b = memory()
    yield "interleaved by less than a row", (b[:32].view(4, 8)[:, :4],), (b[:32].view(4, 8)[:, 2:6],), b


@pytest.mark.parametrize("case", [name for name, *_ in overlapping()])
def test_overlapping_outputs_are_refused(backend, case):
    inputs, outputs, memory = next(rest for name, *rest in overlapping() if name == case)
    if backend.name == "cuda":
        pytest.skip("the check is the same code")
    before = memory.clone()
    matrix = ((2.0,) * len(inputs),) * len(outputs)
    for extra in ({}, {"noise": Noise(1)}, {"gram": True}):
        rows = tuple((*row, 1.0) for row in matrix) if "noise" in extra else matrix
        with pytest.raises(ValueError) as error:
            ops.combine(inputs, rows, out=outputs, **extra)
        one_line(error, "out[")
    grad = tuple(x.clone().requires_grad_() for x in inputs[:1]) + inputs
    with pytest.raises((ValueError, RuntimeError)):
        ops.combine(grad, tuple((1.0, *row) for row in matrix), out=outputs)
    assert torch.equal(memory, before)


def test_halves_of_a_chunk_may_interleave(backend):
    buffer = torch.arange(64.0, device=backend.device).view(4, 16).clone()
    a, b = buffer.chunk(2, 1)
    before = a.clone()
    ops.combine((a,), ((2.0,),), out=(b,))
    assert torch.equal(b, 2 * before) and torch.equal(a, before)
    ops.combine(
        (a, b), ((1.0, 0.0), (0.0, 1.0)), out=(b, a)
    )  # exact aliases, exchanged: both are read before either is written
    assert torch.equal(b, before) and torch.equal(a, 2 * before)


@pytest.mark.parametrize("columns", [3, 515, 20000])
def test_in_place_exchange(backend, columns):
    x, v = torch.randn(3, columns, device=backend.device), torch.randn(3, columns, device=backend.device)
    x0, v0 = x.clone(), v.clone()
    r = ops.combine((x, v), ((0.0, 1.0), (1.0, 0.0)), out=(x, v), cross=True)
    assert torch.equal(x, v0) and torch.equal(v, x0)
    torch.testing.assert_close(r.cross[:, 0, 1], v0.square().sum(1), rtol=1e-5, atol=1e-5)


def test_writes_are_seen_by_autograd():
    for call in (
        lambda o: ops.combine((torch.ones(2, 3),), ((2.0,),), out=(o,)),
        lambda o: ops.combine((torch.ones(2, 3),), ((2.0,), (1.0,)), out=(None, o)),
        lambda o: ops.combine((torch.ones(2, 3),), ((2.0,),), out=(o,), clamp=((0.0, 1.0),)),
        lambda o: ops.combine((torch.ones(2, 3, requires_grad=True),), ((2.0,),), out=(o,)),
    ):
        saved, w = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
        loss, version = (w * saved).sum(), saved._version
        call(saved)
        assert saved._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_common_layouts_are_not_copied():
    from pyflowmap.ops import combine_run

    x = torch.randn(4, 6, 5, 5)
    for a in (
        x,
        x[:, :3],
        x.to(memory_format=torch.channels_last),
        x[::2],
        x[:1].expand(4, 6, 5, 5),
        x.flatten()[1:29].view(4, 7),
    ):
        before = combine_run.copies
        ops.combine((a, a.clone(memory_format=torch.preserve_format)), ((1.0, torch.rand(a.shape[0])),))
        assert combine_run.copies == before and has_dense_rows(a, 1)
    before = combine_run.copies
    ops.combine((x, x.to(memory_format=torch.channels_last)), ((1.0, torch.rand(4)),))
    assert combine_run.copies == before + 1


# ---- leaks -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_calls_leak_nothing():
    x, o, h = torch.randn(2, 3), torch.empty(2, 3), torch.rand(2)
    seed = torch.tensor(3)

    def calls(n):
        for _ in range(n):
            ops.combine((x, x), ((1.0, (0.5, h)),), out=(o,))  # the direct road
        for _ in range(n // 20):
            ops.combine((x,), ((1.0, 1.0),), noise=Noise(seed), gram=True)
            ops.combine((x.T.contiguous().T,), ((1.0,), (2.0,)), out=(None, o))
            with contextlib.suppress(ValueError):
                ops.combine((x, x[:1]), ((1.0, 1.0),), out=(o,))  # refused by the direct road, then in words

    calls(100)
    gc.collect()
    counts = [sys.getrefcount(t) for t in (x, o, h, seed)]
    tracemalloc.start()
    calls(100)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    calls(10_000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert [sys.getrefcount(t) for t in (x, o, h, seed)] == counts
    assert grown < 20_000  # two bytes per call
