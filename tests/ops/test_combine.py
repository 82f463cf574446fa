"""`combine` against its specification in float64, over everything a caller may bring."""

from __future__ import annotations

import math

import pytest
import torch
from combine_calls import HALF, LAYOUTS, Case, arrange, cases
from hypothesis import given
from hypothesis import strategies as st
from tolerance import CHAIN, assert_within, bound

from pyflowmap import ops, reference
from pyflowmap.reference import Combined

pytestmark = pytest.mark.sanitizer  # kernels: run again under ASan, UBSan and TSan by `make sanitize`


def move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, ops.Noise):
        return value._replace(sample_ids=None if value.sample_ids is None else value.sample_ids.to(device))
    return tuple(move(v, device) for v in value) if isinstance(value, tuple) else value


def run(case: Case, backend, **options) -> Combined:
    options = {**case.options, **options}
    result = ops.combine(
        move(case.inputs, backend.device),
        move(case.matrix, backend.device),
        leading=case.leading,
        **{k: move(v, backend.device) for k, v in options.items()},
    )
    return result if isinstance(result, Combined) else Combined(tuple(result))


@given(case=cases(), data=st.data())
def test_outputs(backend, case, data):
    K = len(case.matrix)
    store = tuple(data.draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    stored = [k for k in range(K) if store[k]] or [0]
    dtypes = tuple(data.draw(st.sampled_from(HALF)) for _ in range(K))
    result = run(case, backend, store=tuple(k in stored for k in range(K)), dtype=dtypes)
    assert [y.dtype for y in result.outputs] == [dtypes[k] for k in stored]
    case.check(result, stored, torch.float32)


@given(case=cases(dtypes=(torch.float64,)), data=st.data())
def test_outputs_f64(backend, case, data):
    if backend.name == "cuda":
        pytest.skip("float64 runs on the reference there")
    case.options.pop("noise", None) and case.options.pop("mask", None)  # a normal number is a widened float32
    case.matrix = tuple(row[: len(case.inputs)] for row in case.matrix)
    if "mask" in case.options:
        mask, rows = case.options["mask"]
        case.options["mask"] = (mask.double(), tuple(row[: len(case.inputs)] for row in rows))
    asked = {name: data.draw(st.booleans()) for name in ("gram", "cross", "sums")}
    result = run(case, backend, **asked)
    assert all(y.dtype == torch.float64 for y in result.outputs)
    case.check(result, list(range(len(case.matrix))), torch.float64)


@given(case=cases(most=4), data=st.data())
def test_inner_products(backend, case, data):
    wanted = data.draw(st.sampled_from((("gram",), ("cross",), ("sums",), ("gram", "sums"), ("gram", "cross", "sums"))))
    none = data.draw(st.booleans())
    stored = [] if none else list(range(len(case.matrix)))
    result = run(case, backend, store=tuple(not none for _ in case.matrix), **dict.fromkeys(wanted, True))
    lead = case.like.shape[: case.leading]
    sizes = {"gram": (len(case.matrix),) * 2, "cross": (len(case.matrix), case.terms), "sums": (len(case.matrix),)}
    for name, size in sizes.items():
        got = getattr(result, name)
        assert (got is None) == (name not in wanted)
        if got is not None:
            assert got.shape == lead + size and got.dtype == torch.float32
    case.check(result, stored, torch.float32)


@given(case=cases(), data=st.data())
def test_zero_coefficients_do_not_read(backend, case, data):
    """NaN, inf wherever every coefficient vanishes: nothing of it may be seen."""
    poison = data.draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    inputs = []
    for j, x in enumerate(case.inputs):
        used = torch.zeros(x.shape, dtype=torch.bool)
        for k in range(len(case.matrix)):
            one = torch.ones(x.shape, dtype=torch.float64)
            weight = reference.coefficient(case.matrix[k][j], x.ndim, torch.float64, torch.device("cpu")) * one
            if "mask" in case.options:
                mask, rows = case.options["mask"]
                weight = weight + mask * reference.coefficient(rows[k][j], x.ndim, torch.float64, torch.device("cpu"))
            used |= weight.float() != 0
        inputs.append(arrange(torch.where(used, x, poison), data.draw(st.sampled_from(LAYOUTS[:-1]))))
    clean = run(case, backend)
    case.inputs = tuple(inputs)
    result = run(case, backend)
    assert all(torch.isfinite(y).all() for y in result.outputs)
    for a, b in zip(clean.outputs, result.outputs, strict=True):
        assert torch.equal(a, b)


@given(case=cases(), data=st.data())
def test_into_given_outputs(backend, case, data):
    """Any layout and dtype, some absent, some exactly an operand."""
    expected = [y.clone() for y in run(case, backend).outputs]
    case.inputs = move(case.inputs, backend.device)
    free = [x for x in case.inputs if (0 not in x.stride() and x._base is None) or x.is_contiguous()]
    out = []
    for y in expected:
        kind = data.draw(st.sampled_from(("new", "new", "none", "operand")))
        if kind == "operand" and free:
            out.append(free.pop())
        else:
            other = torch.full(y.shape, math.nan, dtype=data.draw(st.sampled_from(HALF)), device=y.device)
            out.append(
                None if kind == "none" and len(out) else arrange(other, data.draw(st.sampled_from(LAYOUTS[:-1])))
            )
    before = [None if y is None else y._version for y in out]
    result = run(case, backend, out=tuple(out))
    for k, y in enumerate(out):
        if y is not None:
            widest = expected[k].to(y.dtype) if expected[k].dtype == torch.float32 else None
            if widest is not None:
                assert torch.equal(y, widest), f"output {k}"
            assert y._version > before[k] or y.numel() == 0
    assert [id(y) for y in result.outputs if y is not None] == [id(y) for y in out if y is not None]


@pytest.mark.parametrize("columns", [511, 512, 513, 1027, 16384, 16385, 40001])
@pytest.mark.parametrize("extras", [False, True])
def test_long_rows(backend, columns, extras):
    """Rows of several chunks and units: the seams of the kernel."""
    if backend.name == "simt" and columns > 16385:
        pytest.skip("slow in the emulator")
    torch.manual_seed(columns)
    x, v = torch.randn(3, columns), torch.randn(3, columns).bfloat16()
    h = torch.tensor([0.5, 0.0, -2.0])
    options = {}
    if extras:
        options = {"noise": ops.Noise(7), "mask": (torch.rand(3, columns), ((0.0, 1.0, 0.5),) * 2)}
    matrix = ((1.0, h) + (0.3,) * extras, (-0.25, (2.0, h)) + (0.0,) * extras)
    case = Case((x, v), matrix, 1, options)
    case.check(run(case, backend, gram=True, cross=True, sums=True), [0, 1], torch.float32)


@pytest.mark.parametrize("J, K", [(9, 1), (9, 5), (17, 2), (3, 9), (8, 17), (20, 10)])
def test_wider_than_a_launch(backend, J, K):
    torch.manual_seed(J * K)
    h = torch.randn(2)
    inputs = tuple(torch.randn(2, 30).to(HALF[j % 3]) for j in range(J))
    matrix = tuple((*((float(j - k), h) if (j + k) % 3 else 0.0 for j in range(J)), 0.5) for k in range(K))
    case = Case(inputs, matrix, 1, {"noise": ops.Noise(3), "clamp": ((-9.0, 9.0),) + (None,) * (K - 1)})
    result = run(case, backend, dtype=torch.float32)
    case.check(result, list(range(K)), torch.float32)
    if K <= 4 or J <= 8 >= K:
        case.check(run(case, backend, dtype=torch.float32, gram=True, sums=True), list(range(K)), torch.float32)
    out = tuple(torch.empty(2, 30, device=backend.device) for _ in range(K))
    run(case, backend, out=out)
    assert all(torch.equal(a, b) for a, b in zip(out, result.outputs, strict=True))


def test_nan_survives_clamp(backend):
    x = torch.tensor([[math.nan, -math.inf, math.inf, 0.25, -3.0]], device=backend.device)
    (y,) = ops.combine((x,), ((1.0,),), clamp=((-1.0, 0.5),))
    assert y[0, 0].isnan() and y[0, 1:].tolist() == [-1.0, 0.5, 0.25, -1.0]


def test_reductions_see_unrounded_values(backend):
    """The Gram matrix is of the float32 combination, not of what bfloat16 storage keeps of it."""
    x = torch.full((1, 64), 1 + 2**-10, device=backend.device)
    result = ops.combine((x,), ((1.0,),), dtype=torch.bfloat16, gram=True, sums=True)
    assert result.outputs[0][0, 0] == 1.0 and result.sums[0, 0] == 64 * (1 + 2**-10)
    assert result.gram[0, 0, 0].item() == pytest.approx(64 * (1 + 2**-10) ** 2, rel=1e-6)


def test_long_sum_is_accurate(backend):
    """A naive float32 sum of two million equal numbers is off by 1e-3; ours stays within a chain of 64 additions."""
    n = 1 << (21 if backend.name != "simt" else 16)
    x = torch.full((1, n), 0.1, device=backend.device)
    got = ops.combine((x,), ((1.0,),), store=(False,), gram=True, sums=True)
    one = x[0, 0].double().cpu()
    assert_within(got.sums[0, 0], n * one, bound(n * one, n * one, CHAIN))
    assert_within(got.gram[0, 0, 0], n * one**2, bound(n * one**2, n * one**2, CHAIN))


def test_coefficients_are_formed_in_double(backend):
    """1/3 * 3 is exactly 1 in float64, not after each factor is rounded to float32."""
    x = torch.randn(4, 9, device=backend.device)
    h = torch.full((4,), 3.0, dtype=torch.float64, device=backend.device)
    (y,) = ops.combine((x,), (((1 / 3, h),),))
    assert torch.equal(x, y)


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart in a sparse allocation: 64-bit indices, of which only two rows are ever touched."""
    try:
        big = torch.empty((1 << 32) + 64)
    except RuntimeError as error:
        pytest.skip(f"no address space for 16 GiB: {error}")
    x = torch.as_strided(big, (3, 16), (1 << 31, 1))
    v = torch.arange(48.0).view(3, 16)
    ops.combine((v,), ((2.0,),), out=(x,))
    assert torch.equal(x, 2 * v)
    (y,) = ops.combine((x, v), ((1.0, 1.0),))
    assert torch.equal(y, 3 * v)
    x[:, 1:8] = 1.0  # a second operand in the same rows, interleaved with the first
    tail = torch.as_strided(big, (3, 8), (1 << 31, 1), 8)
    head = torch.as_strided(big, (3, 8), (1 << 31, 1), 0)
    ops.combine((head,), ((1.0,),), out=(tail,))
    assert torch.equal(tail, head)


@pytest.mark.slow
def test_more_than_2_31_elements():
    """One row of memory read 2^31 + 2^20 times: the index of an element needs 64 bits, the sums must be right."""
    row = torch.ones(1, 1 << 14)
    count = (1 << 17) + 64
    got = ops.combine((row.expand(count, 1 << 14),), ((1.0,),), store=(False,), sums=True).sums
    assert got.shape == (count, 1) and torch.equal(got, torch.full((count, 1), float(1 << 14)))
