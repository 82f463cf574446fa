"""`gated_residual` on every back end against its formula in float64: value, tangent, and the gradients of both."""

from __future__ import annotations

import pytest
import torch
from ops.fused_roads import ROADS, Case
from ops.row_layers import CHEAP, SHAPES, by_kernel, by_torch, instruction_sets, on, strided, wide, worst

from pyflowmap import _C
from pyflowmap.ops import gated_residual
from pyflowmap.ops.gated_residual import fused

NAMES = ("x", "gate", "h")


def formula(x, gate, h):
    if gate.dim() == 2 and x.dim() > 2:
        gate = gate.reshape(gate.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    return x + gate * h


def problem(shape, vector, dtypes=(torch.float32,) * 3, seed=0, factor=1.0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda s, dtype: torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    shapes = (shape, vector, shape)
    operands = [draw(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    tangents = [(factor * draw(s, torch.float64)).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    out = torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])
    return operands, tangents, [draw(shape, out), (draw(shape, torch.float64) / factor).to(out)]


def errors(operands, tangents, cotangents, both):
    found = by_kernel(fused, (), NAMES, operands, tangents, cotangents, both)
    return worst(found, by_torch(formula, NAMES, wide(operands), wide(tangents), wide(cotangents), both))


def allowed(rows, storage=torch.float32, arithmetic=torch.float32):
    """A few roundings; in the gradient of a gate, sums over chunks of at most 64 rows and over the chunks."""
    chain = 4 + min(rows, 64) / 4
    coarse = torch.finfo(storage).eps if storage in (torch.bfloat16, torch.float16) else 0.0
    return chain * torch.finfo(arithmetic).eps + coarse


def assert_small(found, most):
    bad = {name: error for name, error in found.items() if not error <= most}
    assert not bad, f"{bad}, allowed {most:.3g}"


def rows(shape):
    return max(1, torch.Size(shape[:-1]).numel())


@pytest.mark.parametrize("both", [False, True], ids=["primal", "both"])
@pytest.mark.parametrize("shape, vector", SHAPES, ids=str)
def test_against_float64(backend, shape, vector, both):
    assert_small(errors(*problem(shape, vector), both), allowed(rows(shape)))


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", ["chunk", "odd", "transposed", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, vector", CHEAP, ids=str)
def test_layouts(backend, shape, vector, dtype, layout):
    case = [[strided(x, layout) for x in each] for each in problem(shape, vector, (dtype,) * 3)]
    for both in (False, True):
        assert_small(errors(*case, both), allowed(rows(shape), dtype))


@pytest.mark.parametrize("both", [False, True], ids=["primal", "both"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float64,) * 3,
        (torch.float32, torch.bfloat16, torch.bfloat16),  # a stream in float32, its branch in autocast
        (torch.bfloat16, torch.float32, torch.float16),
    ],
    ids=str,
)
def test_dtypes(backend, dtypes, both):
    if backend.name == "cuda" and torch.float64 in dtypes:
        pytest.skip("float64 is computed on the CPU")
    arithmetic = torch.float64 if torch.float64 in dtypes else torch.float32
    for shape, vector in (((2, 9, 40), (2, 40)), ((2, 3, 37), (1, 37)), ((1, 3, 600), (1, 600))):
        case = problem(shape, vector, dtypes)
        assert fused((), case[0]).dtype == case[2][0].dtype
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
        assert_small(errors(*case, both), allowed(rows(shape), coarsest, arithmetic))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scaled_tangents(backend, factor):
    assert_small(errors(*problem((2, 9, 384), (2, 384), factor=factor), True), allowed(18))


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_some_tangents(backend, given):
    operands, tangents, cotangents = problem((2, 5, 40), (2, 40))
    some = [dx if i in given else None for i, dx in enumerate(tangents)]
    assert_small(errors(operands, some, cotangents, True), allowed(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch(backend, dtype):
    case = problem((4, 64, 384), (4, 384), (dtype,) * 3)
    ours = errors(*case, True)
    exact = by_torch(formula, NAMES, *map(wide, case), True)
    torchs = worst(by_torch(formula, NAMES, *case, True), exact)
    assert all(ours[name] <= 1.5 * torchs[name] for name in ours), f"ours {ours}, torch's {torchs}"


def test_a_gate_of_zero_is_the_identity(backend):
    """Bit for bit, which an untrained block rests on."""
    x, h = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    assert torch.equal(gated_residual(x, torch.zeros(2, 40), h), x)


def test_the_stream_hands_its_gradient_on(backend):
    """x + ... copies nothing backward."""
    operands, _, (gy, _) = problem((2, 5, 40), (2, 40))
    x, gate, h = (v.requires_grad_() for v in operands)
    gx, _, _ = torch.autograd.grad(fused((), (x, gate, h)), (x, gate, h), gy)
    assert gx.data_ptr() == gy.data_ptr()


def every_result():
    results = []
    for shape, vector in (((3, 70, 37), (3, 37)), ((2, 40, 384), (1, 384)), ((1, 300, 520), (1, 520))):
        case = problem(shape, vector, (torch.float32, torch.float32, torch.bfloat16))
        for both in (False, True):
            results += by_kernel(fused, (), NAMES, *case, both).values()
    return results


def test_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on("cpu"):
                found.append(every_result())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_any_grid(simt):
    found = []
    for each in ({}, {"order": "reverse", "fill": 255}, {"order": "random", "seed": 3, "multiprocessors": 1}):
        with on("simt", **each):
            found.append(every_result())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", instruction_sets())
def test_any_instruction_set(isa):
    before = _C.build()["isa"]
    try:
        _C.set_isa(isa)
        with on("cpu"):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
                for shape, vector in (((2, 5, 37), (2, 37)), ((2, 5, 384), (2, 5, 384))):
                    assert_small(errors(*problem(shape, vector, (dtype,) * 3), True), allowed(10, dtype, arithmetic))
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("road", ROADS)
def test_roads(road):
    operands, tangents, _ = problem((2, 3, 5), (2, 5), (torch.float64,) * 3)
    ROADS[road](Case(gated_residual, formula, tuple(operands), tuple(tangents)))


@pytest.mark.parametrize("road", ["forward", "gradient", "gradient through both", "transforms"])
def test_roads_on_the_device(backend, road):
    operands, tangents, _ = ([x.to(backend.device) for x in each] for each in problem((2, 3, 20), (2, 20)))
    ROADS[road](Case(gated_residual, formula, tuple(operands), tuple(tangents), 2e-4, 2e-4))
