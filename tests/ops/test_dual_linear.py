"""`dual_linear`: value and tangent of a linear layer on few rows, against float64, and where torch must do it."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within, bound
from torch import nn
from torch.nn import functional as F

import pyflowmap as pfm
from pyflowmap import _C, reference
from pyflowmap.ops import backend as backends
from pyflowmap.ops.dual_linear import MOST_ROWS, few_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(rows, inputs, outputs, dtype=torch.float32, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=rng).to(device, dtype)  # noqa: E731
    return make(*rows, inputs), make(*rows, inputs), make(outputs, inputs), make(outputs)


def assert_right(found, x, dx, weight, bias):
    """The kernel against the reference in float64. An output is I products and a bias: I + 1 additions at most."""
    y, dy = found
    inputs = weight.shape[1]
    wide = [None if t is None else t.double() for t in (x, dx, weight, bias)]
    exact, dexact = reference.dual_linear(*wide)
    size, dsize = reference.dual_linear(*(None if t is None else t.abs() for t in wide))
    assert y.dtype == x.dtype
    assert_within(y, exact, bound(exact, size, inputs + 2, storage=x.dtype), "y")
    if dx is None:
        assert dy is None
    else:
        assert dy.dtype == x.dtype
        assert_within(dy, dexact, bound(dexact, dsize, inputs + 2, storage=x.dtype), "dy")


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (1, 9), (3, 5), (16, 4), (17, 7), (31, 18), (128, 33), (260, 6)], ids=str
)
def test_against_float64(backend, inputs, outputs, dtype):
    for rows in ((), (1,), (2,), (3,), (2, 2), (1, MOST_ROWS)):
        x, dx, weight, bias = draw(rows, inputs, outputs, dtype, backend.device)
        assert_right(few_rows(x, dx, weight, bias), x, dx, weight, bias)
        assert_right(few_rows(x, dx, weight), x, dx, weight, None)
        assert_right(few_rows(x, None, weight, bias), x, None, weight, bias)


@pytest.mark.sanitizer
def test_all_rows_that_the_kernel_takes(backend):
    """ops asks for MOST_ROWS; the contract is 8, and one more is refused."""
    module = backends.simt() if backend.name == "simt" else _C
    for rows in (5, 7, 8, 9):
        x, dx, weight, bias = draw((rows,), 70, 11, device=backend.device)
        y, dy = x.new_empty(rows, 11), x.new_empty(rows, 11)
        assert module.dual_linear((x, dx, weight, bias, y, dy)) is (rows <= 8)
        if rows <= 8:
            assert_right((y, dy), x, dx, weight, bias)


@pytest.mark.sanitizer
def test_rows_that_step(backend):
    """Parts of larger tensors: rows of x and dx lie apart, those of W too, and begin off 16 bytes."""
    for columns in (8, 21, 64):
        x, dx, weight, bias = draw((3,), columns + 9, 13, device=backend.device)
        for first in (0, 1, 4):
            part = slice(first, first + columns)
            operands = x[:, part], dx[:, part], weight[:, part], bias
            assert not operands[0].is_contiguous()
            assert_right(few_rows(*operands), *operands)
    x, dx, weight, bias = draw((3,), 32, 13, device=backend.device)
    operands = x[:1].expand(3, 32), dx, weight, bias
    assert_right(few_rows(*operands), *operands)


@pytest.mark.sanitizer
def test_linear_in_dx_and_blind_to_what_is_beyond(backend):
    """dy does not see x or the bias; infinities next to the rows and behind the last column stay out."""
    _, dx, weight, _ = draw((2,), 19, 6, device=backend.device)
    nan = torch.full((2, 19), torch.nan, device=backend.device)
    y, dy = few_rows(nan, dx, weight, nan[0, :6].clone())
    assert y.isnan().all()
    assert torch.equal(dy, few_rows(dx, None, weight)[0])
    wide_x, wide_w = (torch.full((n, 40), torch.inf, device=backend.device) for n in (2, 6))
    wide_x[:, 3:22], wide_w[:, 3:22] = dx, weight
    assert torch.equal(few_rows(wide_x[:, 3:22], None, wide_w[:, 3:22])[0], dy)


def test_rows_do_not_matter_to_bits(backend):
    x, dx, weight, bias = draw((MOST_ROWS,), 300, 37, device=backend.device)
    y, dy = few_rows(x, dx, weight, bias)
    for r in range(MOST_ROWS):
        one, done = few_rows(x[r], dx[r], weight, bias)
        assert torch.equal(one, y[r]) and torch.equal(done, dy[r])


@pytest.fixture
def restored():
    threads, isa = torch.get_num_threads(), _C.build()["isa"]
    yield
    torch.set_num_threads(threads)
    _C.set_isa(isa)


def test_threads_and_instruction_sets(restored):
    """Large enough for two threads. base rounds a * b + c twice: it is compared with float64 alone."""
    for dtype in DTYPES:
        x, dx, weight, bias = draw((3,), 401, 1009, dtype)
        assert 3 * 2 * 401 * 1009 >= 2 * 2**18
        results = {}
        for isa in ("base", "v3", "v4")[: ("base", "v3", "v4").index(_C.build()["best_isa"]) + 1]:
            _C.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results[isa, threads] = few_rows(x, dx, weight, bias)
            assert_right(results[isa, 1], x, dx, weight, bias)
        for (isa, _), found in results.items():
            same = results["base" if isa == "base" else "v3", 1]
            assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True)), isa


# ---- where torch must do it ---------------------------------------------------------------------------------------


def test_what_is_left_to_torch():
    x, dx, weight, bias = draw((2,), 12, 5)
    assert few_rows(x, dx, weight, bias) is not None
    many = torch.randn(MOST_ROWS + 1, 12)
    assert few_rows(many, many, weight, bias) is None
    assert few_rows(x.double(), dx.double(), weight.double(), bias.double()) is None
    assert few_rows(x, dx, weight.bfloat16(), bias) is None
    assert few_rows(x, dx.bfloat16(), weight, bias) is None
    assert few_rows(x, dx, weight.mT.contiguous().mT, bias) is None
    assert few_rows(x, dx, weight[:, :11], bias) is None
    assert few_rows(x, dx, weight, bias[:4]) is None
    assert few_rows(x[:0], dx[:0], weight, bias) is None
    assert few_rows(x[:, :0], dx[:, :0], weight[:, :0], bias) is None
    assert few_rows(x.to("meta"), dx.to("meta"), weight.to("meta")) is None
    with backends.use("reference"):
        assert few_rows(x, dx, weight, bias) is None
    with torch.autocast("cpu"):
        assert few_rows(x, dx, weight, bias) is None
    with torch.autograd.forward_ad.dual_level():
        assert few_rows(x, dx, weight, bias) is None
    for i in range(4):
        operands = [x, dx, weight, bias]
        operands[i] = operands[i].clone().requires_grad_()
        assert few_rows(*operands) is None
        with torch.no_grad():
            assert few_rows(*operands) is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_negative_view_is_left_to_torch(mode):
    """Its storage has the other sign; an inference tensor does not even say that it is a view."""
    with mode():
        x = torch.randn(1, 1, dtype=torch.complex64).conj().imag
        assert x.is_neg() and x.stride(-1) == 2
        assert few_rows(x, None, torch.ones(1, 1)) is None


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_see_the_layer(transform):
    """Inside a transform of torch.func, pfm.jvp gives what it gives without."""
    x, dx, weight, bias = draw((3,), 12, 5)
    derivative = lambda x: pfm.jvp(lambda x: F.linear(x, weight, bias), (x,), (dx[0],))[0]  # noqa: E731
    if transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(derivative)(x), F.linear(x, weight, bias))
    elif transform == "grad":
        torch.testing.assert_close(torch.func.grad(lambda x: derivative(x).sum())(x[0]), weight.sum(0))
    else:
        torch.testing.assert_close(torch.func.jvp(derivative, (x[0],), (dx[0],))[1], F.linear(dx[0], weight))


# ---- in pfm.jvp -----------------------------------------------------------------------------------------------------


def test_jvp_of_a_network():
    """Value and tangent of an MLP at batch 1, with and without a gradient to record, against float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 40, bias=False), nn.GELU(), nn.Linear(40, 24))
    x, dx = torch.randn(1, 24), torch.randn(1, 24)
    with torch.no_grad():
        y, dy = pfm.jvp(net, (x,), (dx,))
    z, dz = pfm.jvp(net, (x,), (dx,))
    assert torch.equal(z, net(x)) and z.requires_grad  # recorded: torch's own value, to the bit
    exact, dexact = torch.func.jvp(net.double(), (x.double(),), (dx.double(),))
    for found, right in ((y, exact), (dy, dexact), (z, exact), (dz, dexact)):
        torch.testing.assert_close(found.double(), right, rtol=2e-5, atol=2e-5)


def test_jvp_takes_the_kernel(monkeypatch):
    """One launch per layer where nothing is recorded; one for the tangent where the value is; none for many rows."""
    net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
    calls = []
    kernel = backends.direct.dual_linear
    monkeypatch.setattr(backends.direct, "dual_linear", lambda t: calls.append(t[1] is not None) or kernel(t))
    x = torch.randn(1, 6)
    with torch.no_grad():
        pfm.jvp(net, (x,), (x,))
    assert calls == [True, True]
    calls.clear()
    pfm.jvp(net, (x,), (x,))
    assert calls == [False, False]
    calls.clear()
    many = torch.randn(MOST_ROWS + 1, 6)
    with torch.no_grad():
        pfm.jvp(net, (many,), (many,))
    assert calls == []


def test_duals_of_weight_and_bias():
    """The product rule stays where the weight or the bias has a tangent, too."""
    x, dx, weight, bias = draw((1,), 7, 5)
    dweight, dbias = torch.randn(5, 7), torch.randn(5)
    with torch.no_grad():
        y, dy = pfm.jvp(F.linear, (x, weight, bias), (dx, dweight, dbias))
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    torch.testing.assert_close(dy, F.linear(dx, weight) + F.linear(x, dweight) + dbias)
