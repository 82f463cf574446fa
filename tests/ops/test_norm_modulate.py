"""`norm_modulate` on every back end against its formula in float64: value, tangent, and the gradients of both."""

from __future__ import annotations

import pytest
import torch
from ops.fused_roads import ROADS, Case
from ops.row_layers import CHEAP, SHAPES, by_kernel, by_torch, instruction_sets, on, strided, wide, worst

from pyflowmap import _C
from pyflowmap.ops import gated_residual, norm_modulate
from pyflowmap.ops.norm_modulate import fused

NAMES = ("x", "scale", "shift")
KINDS = {"layer": (0.0, 0.05), "rms": (1.0, 0.05)}
HALF = (torch.bfloat16, torch.float16)


def formula(kind, eps=0.05):
    def run(x, scale, shift):
        if scale.dim() == 2 and x.dim() > 2:
            scale = scale.reshape(scale.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        if shift.dim() == 2 and x.dim() > 2:
            shift = shift.reshape(shift.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        n = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        return n / (n.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift

    return run


def problem(shape, vector, dtypes=(torch.float32,) * 3, seed=0, factor=1.0, other=None):
    """Operands, tangents, cotangents; `other`: the shape of shift."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda s, dtype: torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    shapes = (shape, vector, other or vector)
    operands = [draw(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    operands[0] = (2 * operands[0].double() + 1).to(dtypes[0])
    tangents = [(factor * draw(s, torch.float64)).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    out = torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])
    return operands, tangents, [draw(shape, out), (draw(shape, torch.float64) / factor).to(out)]


def errors(kind, operands, tangents, cotangents, both):
    found = by_kernel(fused, KINDS[kind], NAMES, operands, tangents, cotangents, both)
    exact = by_torch(formula(kind), NAMES, wide(operands), wide(tangents), wide(cotangents), both)
    return worst(found, exact)


def allowed(columns, storage=torch.float32, arithmetic=torch.float32):
    """Sums of `columns` numbers in chains of columns / 16, a few operations around them that lose a digit, one rounding
    to storage."""
    chain = columns / 16 + 64
    return chain * torch.finfo(arithmetic).eps + torch.finfo(storage).eps * (storage in HALF)


def assert_small(found, most):
    bad = {name: error for name, error in found.items() if not error <= most}
    assert not bad, f"{bad}, allowed {most:.3g}"


@pytest.mark.parametrize("both", [False, True], ids=["primal", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, vector", SHAPES, ids=str)
def test_against_float64(backend, shape, vector, kind, both):
    case = problem(shape, vector)
    assert_small(errors(kind, *case, both), allowed(shape[-1]))


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", ["chunk", "odd", "transposed", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, vector", CHEAP, ids=str)
def test_layouts(backend, shape, vector, dtype, layout):
    """Operands and cotangents may lie anywhere; what lies between them is neither read nor written."""
    case = [[strided(x, layout) for x in each] for each in problem(shape, vector, (dtype,) * 3, other=(1, shape[-1]))]
    for both in (False, True):
        assert_small(errors("layer", *case, both), allowed(shape[-1], dtype))


def test_expanded_operands(backend):
    operands, tangents, cotangents = problem((3, 4, 24), (3, 24))
    operands[0] = operands[0][:1, :1].expand(3, 4, 24)
    tangents[1] = torch.ones(()).expand(3, 24)
    cotangents[0] = torch.ones(()).expand(3, 4, 24)
    for both in (False, True):
        assert_small(errors("layer", operands, tangents, cotangents, both), allowed(24))


@pytest.mark.parametrize("both", [False, True], ids=["primal", "both"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float64,) * 3,
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtypes(backend, dtypes, both):
    """Two widths of access: all of 16 bits, or not."""
    if backend.name == "cuda" and torch.float64 in dtypes:
        pytest.skip("float64 is computed on the CPU")
    arithmetic = torch.float64 if torch.float64 in dtypes else torch.float32
    for shape, vector in (((2, 9, 40), (2, 40)), ((2, 3, 37), (1, 37)), ((1, 3, 600), (1, 600))):
        case = problem(shape, vector, dtypes)
        assert fused(KINDS["layer"], case[0]).dtype == case[2][0].dtype
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
        assert_small(errors("layer", *case, both), allowed(shape[-1], coarsest, arithmetic))


def test_mixed_with_float64():
    operands, *_ = problem((2, 3, 8), (2, 8))
    operands[1] = operands[1].double()
    y = norm_modulate(*operands, eps=0.05)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, formula("layer")(*wide(operands)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_tangents(backend, kind, factor):
    assert_small(errors(kind, *problem((2, 9, 384), (2, 384), factor=factor), True), allowed(384))


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2), ()], ids=str)
def test_some_tangents(backend, given):
    operands, tangents, cotangents = problem((2, 5, 40), (2, 40))
    some = [dx if i in given else None for i, dx in enumerate(tangents)]
    if not given:
        y, dy = fused(KINDS["layer"], operands, some)
        assert not dy.any() and torch.equal(y, fused(KINDS["layer"], operands))
        return
    assert_small(errors("layer", operands, some, cotangents, True), allowed(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch(backend, dtype):
    """Beside torch's own norm, on rows far from zero."""
    operands, tangents, cotangents = problem((4, 64, 384), (4, 384), (dtype,) * 3)
    operands[0] = (operands[0] + 20).to(dtype)

    def theirs(x, scale, shift):
        n = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0.05)
        return n * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    exact = by_torch(formula("layer"), NAMES, wide(operands), wide(tangents), wide(cotangents), False)
    exact["dy"] = torch.func.jvp(formula("layer"), tuple(wide(operands)), tuple(wide(tangents)))[1]
    torchs = by_torch(theirs, NAMES, operands, tangents, cotangents, False)
    torchs["dy"] = torch.func.jvp(theirs, tuple(operands), tuple(tangents))[1]
    ours = by_kernel(fused, KINDS["layer"], NAMES, operands, tangents, cotangents, False)
    ours["dy"] = fused(KINDS["layer"], operands, tangents)[1]
    ours, torchs = worst(ours, exact), worst(torchs, exact)
    assert all(ours[name] <= 1.5 * torchs[name] for name in ours), f"ours {ours}, torch's {torchs}"


def every_result(seed=0):
    results = []
    for shape, vector in (((3, 70, 37), (3, 37)), ((2, 40, 384), (1, 384)), ((1, 3, 3100), (1, 3100))):
        case = problem(shape, vector, (torch.float32, torch.float32, torch.bfloat16), seed=seed)
        for both in (False, True):
            results += by_kernel(fused, KINDS["layer"], NAMES, *case, both).values()
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
    """The order of the threads, the size of the device and what shared memory held before change nothing."""
    found = []
    options = (
        {},
        {"order": "reverse", "fill": 255},
        {"order": "random", "seed": 3, "multiprocessors": 1},
        {"multiprocessors": 64},
    )
    for each in options:
        with on("simt", **each):
            found.append(every_result())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", instruction_sets())
def test_any_instruction_set(isa):
    """Only what is contracted into one rounding differs."""
    before = _C.build()["isa"]
    try:
        _C.set_isa(isa)
        with on("cpu"):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
                for shape, vector in (((2, 5, 37), (2, 37)), ((2, 5, 384), (2, 384)), ((2, 5, 47), (2, 5, 47))):
                    case = problem(shape, vector, (dtype,) * 3)
                    assert_small(errors("layer", *case, True), allowed(shape[-1], dtype, arithmetic))
                    assert_small(errors("rms", *case, False), allowed(shape[-1], dtype, arithmetic))
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_some_gradients(backend, needs):
    """What nobody needs is not computed, and the rest is what it was."""
    operands, _, (gy, _) = problem((2, 5, 40), (2, 40))
    full = [x.requires_grad_() for x in operands]
    expected = torch.autograd.grad(fused(KINDS["layer"], full), full, gy)
    some = [x.detach().requires_grad_(need) for x, need in zip(operands, needs, strict=True)]
    fused(KINDS["layer"], some).backward(gy)
    for x, need, g in zip(some, needs, expected, strict=True):
        assert torch.equal(x.grad, g) if need else x.grad is None


def test_a_row_of_one_value(backend):
    """Its variance is zero: eps decides, and layer leaves the shift."""
    x, scale, shift = torch.full((1, 2, 40), 3.0), torch.randn(1, 40), torch.randn(1, 40)
    assert torch.equal(norm_modulate(x, scale, shift), shift.expand(2, 40)[None])
    y = norm_modulate(torch.zeros_like(x), scale, shift, kind="rms", eps=1e-6)
    assert torch.equal(y, shift.expand(2, 40)[None])


def test_infinities_stay_in_their_row(backend):
    operands, *_ = problem((2, 5, 40), (2, 40))
    spoiled = operands[0].clone()
    spoiled[0, 1, 3] = torch.inf
    expected, y = norm_modulate(*operands), norm_modulate(spoiled, *operands[1:])
    assert y[0, 1].isnan().any()
    assert torch.equal(y[1], expected[1]) and torch.equal(y[0, 2:], expected[0, 2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("road", ROADS)
def test_roads(road, kind):
    operands, tangents, _ = problem((2, 3, 5), (2, 5), (torch.float64,) * 3)
    function = lambda x, scale, shift: norm_modulate(x, scale, shift, kind=kind, eps=0.05)  # noqa: E731
    ROADS[road](Case(function, formula(kind), tuple(operands), tuple(tangents)))


@pytest.mark.parametrize("road", ["forward", "gradient", "gradient through both", "transforms"])
def test_roads_on_the_device(backend, road):
    operands, tangents, _ = ([x.to(backend.device) for x in each] for each in problem((2, 3, 20), (2, 20)))
    function = lambda x, scale, shift: norm_modulate(x, scale, shift, eps=0.05)  # noqa: E731
    ROADS[road](Case(function, formula("layer"), tuple(operands), tuple(tangents), 2e-3, 2e-3))


def test_an_image_is_told_that_channels_are_last():
    for function in (
        lambda x, c: norm_modulate(x, c, c),
        lambda x, c: gated_residual(x, c, x),
    ):
        with pytest.raises(ValueError, match=r"channels are last here.*movedim\(1, -1\)"):
            function(torch.ones(2, 3, 4, 4), torch.ones(2, 3))
