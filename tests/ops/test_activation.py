"""`activation` and `gated_unit` on every back end against their formulas in float64: value, tangent, the gradients of
both, their accuracy in the tails, and the rules of torch's own activations, which use the same kernel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ops.fused_roads import ROADS, Case
from ops.row_layers import by_kernel, by_torch, instruction_sets, on, strided, wide, worst

import pyflowmap as pfm
from pyflowmap import _C
from pyflowmap.ops import activation, gated_unit
from pyflowmap.ops.activation import KINDS, gated, plain
from pyflowmap.tangents import Dual

NUMBER = {kind: float(i) for i, kind in enumerate(KINDS)}
TORCHS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# On both sides of the seams: vectors of 4, 8 and 16, chunks of 512, units of 512 (device) and 4096 (CPU).
SHAPES = [(), (1,), (2, 3, 1), (2, 5, 7), (4, 24), (2, 3, 4, 50), (3, 700), (2, 4101), (0, 3, 8), (2, 0, 8), (5, 0)]
CHEAP = [(2, 5, 7), (3, 48), (2, 3, 2, 33)]


def formulas(kind):
    """f, and the terms of f' and of f'', in float64 without cancellation."""
    s, s1 = torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)
    s2 = lambda x: -s1(x) * torch.tanh(x / 2)  # noqa: E731
    if kind == "silu":
        return (lambda x: x * s(x)), (lambda x: (s(x), x * s1(x))), (lambda x: (2 * s1(x), x * s2(x)))
    if kind == "gelu":
        normal = lambda x: 0.5 * torch.erfc(-x * math.sqrt(0.5))  # noqa: E731
        bell = lambda x: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        second = lambda x: (2 * bell(x), -x * x * bell(x))  # noqa: E731
        return (lambda x: x * normal(x)), (lambda x: (normal(x), x * bell(x))), second
    if kind == "gelu_tanh":
        c, d = math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715
        w, w1, w2 = (lambda x: c * x + d * x**3), (lambda x: c + 3 * d * x * x), (lambda x: 6 * d * x)
        first = lambda x: (s(w(x)), x * s1(w(x)) * w1(x))  # noqa: E731
        second = lambda x: (2 * s1(w(x)) * w1(x), x * s2(w(x)) * w1(x) ** 2, x * s1(w(x)) * w2(x))  # noqa: E731
        return (lambda x: x * s(w(x))), first, second
    if kind == "relu":
        return (lambda x: x.clamp(min=0)), (lambda x: ((x > 0).double(),)), (lambda x: (0 * x,))
    if kind == "sigmoid":
        return s, (lambda x: (s1(x),)), (lambda x: (s2(x),))
    slope = lambda x: 1 / torch.cosh(x) ** 2  # noqa: E731
    return torch.tanh, (lambda x: (slope(x),)), (lambda x: (-2 * torch.tanh(x) * slope(x),))


def problem(shape, count, dtypes=(torch.float32,) * 2, seed=0, factor=1.0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda dtype: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    operands = [2 * draw(d) for d in dtypes[:count]]
    tangents = [(factor * draw(torch.float64)).to(d) for d in dtypes[:count]]
    out = torch.promote_types(dtypes[0], dtypes[count - 1])
    return operands, tangents, [draw(out), (draw(torch.float64) / factor).to(out)]


def errors(kind, operands, tangents, cotangents, both, device="cpu"):
    fused, names = (plain, gated)[len(operands) - 1], ("a", "b")[: len(operands)]
    formula = lambda *xs: TORCHS[kind](xs[0]) * (xs[1] if len(xs) > 1 else 1.0)  # noqa: E731
    moved = [[None if x is None else x.to(device) for x in each] for each in (operands, tangents, cotangents)]
    found = {k: v.cpu() for k, v in by_kernel(fused, (NUMBER[kind],), names, *moved, both).items()}
    return worst(found, by_torch(formula, names, wide(operands), wide(tangents), wide(cotangents), both))


def assert_small(found, storage=torch.float32, arithmetic=torch.float32):
    """The function and its derivatives, and the products and sums that they enter; half precision rounds once."""
    coarse = torch.finfo(storage).eps if storage in (torch.bfloat16, torch.float16) else 0.0
    most = 16 * torch.finfo(arithmetic).eps + coarse
    bad = {name: error for name, error in found.items() if not error <= most}
    assert not bad, f"{bad}, allowed {most:.3g}"


@pytest.mark.parametrize("both", [False, True], ids=["primal", "both"])
@pytest.mark.parametrize("count", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(backend, kind, count, both):
    for shape in SHAPES:
        assert_small(errors(kind, *problem(shape, count), both, backend.device))


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", ["chunk", "odd", "transposed", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["plain", "gated"])
def test_layouts(backend, count, dtype, layout):
    for shape in CHEAP:
        case = [[strided(x, layout) for x in each] for each in problem(shape, count, (dtype,) * 2)]
        mixed = [case[0], problem(shape, count, (dtype,) * 2)[1], case[2]]  # dense tangents beside it
        for each, both in ((case, False), (case, True), (mixed, True)):
            assert_small(errors("silu", *each, both, backend.device), dtype)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 2,
        (torch.float16,) * 2,
        (torch.float64,) * 2,
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend, kind, dtypes):
    if backend.name == "cuda" and torch.float64 in dtypes:
        pytest.skip("float64 is computed on the CPU")
    arithmetic = torch.float64 if torch.float64 in dtypes else torch.float32
    coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
    for shape in ((3, 37), (2, 520), (2, 3, 16)):
        for count in (1, 2):
            case = problem(shape, count, dtypes)
            assert (plain, gated)[count - 1]((NUMBER[kind],), case[0]).dtype == case[2][0].dtype
            assert_small(errors(kind, *case, True, backend.device), coarsest, arithmetic)


def test_float64_beside_others(backend):
    """Half of the operands in float64 is float64, which no kernel mixes."""
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5)
    torch.testing.assert_close(gated_unit(a, b, "silu"), F.silu(a) * b.double())


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("count", [1, 2], ids=["plain", "gated"])
def test_scaled_tangents(backend, count, factor):
    for kind in KINDS:
        assert_small(errors(kind, *problem((4, 96), count, factor=factor), True, backend.device))


@pytest.mark.parametrize("given", [0, 1])
def test_some_tangents(backend, given):
    operands, tangents, cotangents = problem((4, 40), 2)
    some = [dx if i == given else None for i, dx in enumerate(tangents)]
    assert_small(errors("gelu", operands, some, cotangents, True, backend.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_torch(backend, kind, dtype):
    operands, tangents, cotangents = problem((16, 500), 1, (dtype,) * 2)
    ours = errors(kind, operands, tangents, cotangents, False, backend.device)
    exact = by_torch(TORCHS[kind], ("a",), wide(operands), None, wide(cotangents), False)
    torchs = worst(by_torch(TORCHS[kind], ("a",), operands, None, cotangents, False), exact)
    floor = 4 * torch.finfo(torch.float32).eps  # torch's float32 kernels are often within 1 ulp
    assert all(ours[name] <= 1.5 * torchs[name] + floor for name in ours), f"ours {ours}, torch's {torchs}"


# ---- accuracy of the functions --------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(backend, kind):
    """f, f' and f'' to a few units in the last place of their largest term, from 1e-30 to where they have reached their
    limits: csrc/activation/activation_math.h says how few."""
    points = 20_001 if backend.name == "simt" else 500_001
    small = torch.logspace(-30, 0, 301)
    x = torch.cat([torch.linspace(-130, 130, points), torch.linspace(-8, 8, points), small, -small]).to(backend.device)
    one = torch.ones_like(x)
    value, slope = plain((NUMBER[kind],), (x,), (one,))
    leaf = x.clone().requires_grad_()
    curvature = torch.autograd.grad(plain((NUMBER[kind],), (leaf,), (one,), True)[1], leaf, one)[0]
    f, f1, f2 = formulas(kind)
    exact_x = x.double().cpu()
    # Below 1e-34 what is multiplied is subnormal. The argument of gelu_tanh's sigmoid is rounded, too.
    inner = exact_x * (1.5958 + 0.0714 * exact_x**2) if kind == "gelu_tanh" else torch.zeros_like(exact_x)
    for name, found, terms, most in (
        ("f", value, (f(exact_x),), 6), ("f'", slope, f1(exact_x), 6), ("f''", curvature, f2(exact_x), 10)
    ):  # fmt: skip
        exact, scale = sum(terms), sum(t.abs() for t in terms)
        ulp = torch.exp2(torch.floor(torch.log2(scale.clamp(min=1e-34))) - 23)
        allowed = (most + 3 * inner.abs().clamp(max=120)) * ulp
        excess = ((found.double().cpu() - exact).abs() / allowed).max()
        assert excess <= 1, f"{name}: {float(excess):.3g} of what is allowed"


def test_at_the_ends(backend):
    """Infinity gives the limit; NaN stays; zeros keep their sign where f is odd; what relu cuts off is 0."""
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, inf, nan, -1e30, 1e30, 3e38, 0.0, -0.0, 1e-42], device=backend.device)
    limits = {
        "silu": (0, inf),
        "gelu": (0, inf),
        "gelu_tanh": (0, inf),
        "relu": (0, inf),
        "sigmoid": (0, 1),
        "tanh": (-1, 1),
    }
    for kind, (low, high) in limits.items():
        y, dy = (v.cpu() for v in plain((NUMBER[kind],), (x,), (torch.ones_like(x),)))
        assert y[:2].tolist() == [low, high], kind
        assert y[2].isnan(), kind
        assert y[3] == low and y[5] == min(high, float(torch.tensor(3e38))), kind
        end = 1.0 if high == inf else 0.0
        assert dy[[0, 1, 3, 4, 5]].tolist() == [0.0, end, 0.0, end, end], kind
        exact = TORCHS[kind](x.cpu().double()[6:])
        torch.testing.assert_close(y[6:].double(), exact, rtol=1e-6, atol=1e-45)
        if kind != "sigmoid":
            assert torch.equal(torch.signbit(y[6:8]), torch.signbit(exact[:2])), kind
    y, dy = plain((NUMBER["relu"],), (torch.tensor([-1.0, 0.0, 1.0]),), (torch.tensor([inf, nan, 2.0]),))
    assert y.tolist() == [0, 0, 1] and dy.tolist() == [0, 0, 2]


# ---- the same bits --------------------------------------------------------------------------------------------------


def every_result():
    results = []
    for shape in ((70, 37), (3, 40_000)):
        for count in (1, 2):
            case = problem(shape, count, (torch.float32, torch.bfloat16))
            for both in (False, True):
                fused = (plain, gated)[count - 1]
                results += by_kernel(fused, (NUMBER["gelu"],), ("a", "b")[:count], *case, both).values()
    return results


def test_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
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
                for kind in KINDS:
                    assert_small(errors(kind, *problem((5, 137), 2, (dtype,) * 2), True), dtype, arithmetic)
    finally:
        _C.set_isa(before)


# ---- the public functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", KINDS)
def test_roads(road, kind):
    (a, b), (da, db), _ = problem((2, 3, 5), 2, (torch.float64,) * 2)
    formula = _smooth(kind)
    ROADS[road](Case(lambda x: activation(x, kind), formula, (a,), (da,)))
    both = Case(lambda a, b: gated_unit(a, b, kind), lambda a, b: formula(a) * b, (a, b), (da, db))
    ROADS[road](both)


def _smooth(kind):
    """In functions that torch differentiates any number of times."""
    if kind == "gelu":
        return lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    if kind == "gelu_tanh":
        return lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return (lambda x: x / (1 + torch.exp(-x))) if kind == "silu" else TORCHS[kind]


@pytest.mark.parametrize("road", ["forward", "gradient", "gradient through both", "transforms"])
def test_roads_on_the_device(backend, road):
    operands, tangents, _ = ([x.to(backend.device) for x in each] for each in problem((2, 3, 20), 2))
    formula = _smooth("gelu_tanh")
    gate = lambda a, b: gated_unit(a, b, "gelu_tanh")  # noqa: E731
    ROADS[road](Case(gate, lambda a, b: formula(a) * b, tuple(operands), tuple(tangents), 2e-4, 2e-4))
    ROADS[road](Case(lambda x: activation(x, "gelu_tanh"), formula, (operands[0],), (tangents[0],), 2e-4, 2e-4))


def test_halves_are_read_where_they_lie(backend):
    """A gated unit of a chunk makes its result and nothing else."""
    h = torch.randn(4, 6, 64, device=backend.device)
    a, b = h.chunk(2, -1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        gated_unit(a, b, "silu")
    names = [event.key for event in seen.key_averages()]
    assert not [name for name in names if "copy" in name or "contiguous" in name or "clone" in name], names


@pytest.mark.parametrize("shape", [(2, 3, 4, 5)])
def test_memory_format(backend, shape):
    x = torch.randn(shape, device=backend.device).to(memory_format=torch.channels_last)
    y = activation(x, "silu")
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, F.silu(x))
    other = torch.randn(shape, device=backend.device)  # of another order: elements correspond by index
    torch.testing.assert_close(gated_unit(x, other, "silu"), F.silu(x) * other)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: activation(torch.ones(2), "swish"), ValueError, "kind='swish'.*choose one of silu"),
        (lambda: gated_unit(torch.ones(2), torch.ones(2), "glu"), ValueError, "kind='glu'"),
        (lambda: activation(torch.ones(2, dtype=torch.int64), "relu"), TypeError, "x is torch.int64"),
        (lambda: activation(torch.ones(2, dtype=torch.complex64), "tanh"), TypeError, "x is torch.complex64"),
        (lambda: activation(1.0, "relu"), TypeError, "x is a float"),
        (lambda: gated_unit(torch.ones(2), 1.0, "relu"), TypeError, "b is a float"),
        (lambda: gated_unit(torch.ones(2, 3), torch.ones(3), "relu"), ValueError, r"b has shape \(3,\) but a has"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- torch's own functions of a Dual --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_function_of_a_dual(kind):
    """The fused pair where nobody records; otherwise torch's own value, bit for bit."""
    function = TORCHS[kind]
    x, dx = torch.randn(3, 37), torch.randn(3, 37)
    pair = function(Dual(x, dx))
    ours = activation(Dual(x, dx), kind)
    assert torch.equal(pair.primal, ours.primal) and torch.equal(pair.tangent, ours.tangent)
    exact = torch.func.jvp(function, (x.double(),), (dx.double(),))
    torch.testing.assert_close((pair.primal.double(), pair.tangent.double()), exact, rtol=2e-6, atol=2e-6)
    leaf = x.clone().requires_grad_()
    for case in (Dual(leaf, dx), Dual(x.bfloat16(), dx.bfloat16()), Dual(x.double(), dx.double())):
        found = function(case)
        assert torch.equal(found.primal, function(case.primal))
        assert found.tangent.dtype == found.primal.dtype
    y = function(Dual(leaf, dx)).primal
    expected = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracked_tangent_is_recorded(kind):
    x, dx = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    _, dy = pfm.jvp(TORCHS[kind], (x,), (dx,), track_tangent=True)
    found = torch.autograd.grad(dy.square().sum(), (x, dx), allow_unused=True, materialize_grads=True)
    _, exact_dy = torch.func.jvp(_smooth(kind), (x,), (dx,))
    exact = torch.autograd.grad(exact_dy.square().sum(), (x, dx), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_inplace_and_autocast():
    x, dx = torch.randn(3, 7), torch.randn(3, 7)
    dual = Dual(x.clone(), dx.clone())
    assert F.silu(dual, inplace=True) is dual
    torch.testing.assert_close((dual.primal, dual.tangent), torch.func.jvp(F.silu, (x,), (dx,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = F.gelu(Dual(x, dx))
        assert found.primal.dtype == F.gelu(x).dtype and torch.equal(found.primal, F.gelu(x))


@pytest.mark.parametrize("wrap", [torch.func.vmap, torch.func.jacfwd], ids=["vmap", "jacfwd"])
def test_inside_a_transform(wrap):
    """What functorch wraps is never read behind its back."""
    x = torch.randn(4, 5)
    torch.testing.assert_close(wrap(lambda v: activation(v, "silu"))(x), wrap(F.silu)(x))


def test_a_dispatch_mode_sees_it():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Names() as mode:
        activation(torch.randn(3), "silu")
    assert any("activation" in name for name in mode.seen), mode.seen
