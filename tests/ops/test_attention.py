"""`pfm.ops.attention`, the public function: every tick in docs/attention.md is a test here."""

from __future__ import annotations

import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.fused_roads import ROADS, Case
from torch import Tensor

import pyflowmap as pfm
from pyflowmap.ops import backend as backends
from pyflowmap.ops.attention import attention

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DEVICE = "cpu"  # where `draw` puts its tensors: the fixture `dtype` says


def formula(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, bias: Any = 0.0, scale: float | None = None
) -> Tensor:
    """In plain torch; `hidden` is True where a key is not seen. A query that sees nothing gives NaN."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale) + bias
    return torch.softmax(logits if hidden is None else logits.masked_fill(hidden, -math.inf), -1) @ v


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes)


def agree(function: Any, plain: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
    """Value, tangent, and the gradients through both, against `plain` differentiated by torch in float64."""
    xs, dxs = draw(*shapes, dtype=dtype), draw(*shapes, dtype=dtype, seed=1)
    wide = [tuple(x.double().requires_grad_() for x in group) for group in (xs, dxs)]
    own = [tuple(x.clone().requires_grad_() for x in group) for group in (xs, dxs)]
    pairs = pfm.jvp(function, *own, track_tangent=True), torch.func.jvp(plain, *wide)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]

    def close(found: Tensor, expected: Tensor) -> None:
        assert (found.double() - expected).norm() <= tolerance * (0.1 + expected.norm())

    for found, expected in zip(*pairs, strict=True):
        close(found, expected)
    losses = [(y * y.detach().cos()).sum() + (dy * dy.detach().sin()).sum() for y, dy in pairs]
    gradients = [torch.autograd.grad(loss, a + b) for loss, (a, b) in zip(losses, (own, wide), strict=True)]
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)


@pytest.fixture(params=["cpu", "simt", "cuda"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """float64 on the CPU, float32 on a device and by the device's source, under its back end."""
    if request.param == "simt":
        request.getfixturevalue("simt")
    if request.param == "cuda":
        if not (torch.cuda.is_available() and backends._HAS_CUDA):
            pytest.skip("torch sees no CUDA device, or this build has no CUDA back end")
        monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda")
    with backends.use(request.param):
        yield torch.float64 if request.param == "cpu" else torch.float32


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_self_attention(dtype):
    agree(attention, formula, *[(2, 2, 17, 8)] * 3, dtype=dtype)


def test_cross_attention(dtype):
    agree(attention, formula, (2, 2, 9, 8), (2, 2, 21, 8), (2, 2, 21, 8), dtype=dtype)


@pytest.mark.parametrize("channels", [1, 20, 40, 72, 96, 130])
def test_any_head_size(dtype, channels):
    agree(attention, formula, *[(1, 1, 5, channels)] * 3, dtype=dtype)


def test_values_of_another_size(dtype):
    agree(attention, formula, (1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 24), dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 3, 33, 65])
def test_any_number_of_tokens(dtype, tokens):
    agree(attention, formula, *[(1, 2, tokens, 8)] * 3, dtype=dtype)


def test_heads_that_share_keys(dtype):
    agree(attention, formula, (2, 6, 9, 8), (2, 2, 11, 8), (2, 2, 11, 8), dtype=dtype)


@pytest.mark.parametrize("scale", [0.01, 1.0, -0.3])
def test_any_scale(dtype, scale):
    agree(
        lambda q, k, v: attention(q, k, v, scale=scale),
        lambda q, k, v: formula(q, k, v, scale=scale),
        *[(1, 2, 9, 8)] * 3,
        dtype=dtype,
    )


def test_causal(dtype):
    hidden = torch.ones(19, 19, dtype=torch.bool, device=DEVICE).triu(1)
    agree(
        lambda q, k, v: attention(q, k, v, causal=True),
        lambda q, k, v: formula(q, k, v, hidden),
        *[(1, 2, 19, 8)] * 3,
        dtype=dtype,
    )


@pytest.mark.parametrize("shape", [(9, 11), (2, 1, 1, 11), (1, 3, 9, 11), (2, 3, 9, 1)])
def test_boolean_masks_hide(dtype, shape):
    """With minus infinity: not with a large number, through which hidden keys come back where all are hidden."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.4
    mask[..., 0] = True
    if shape[-1] == 1:
        mask[:] = True
    agree(
        lambda q, k, v: attention(q, k, v, mask=mask),
        lambda q, k, v: formula(q, k, v, ~mask),
        (2, 3, 9, 8),
        (2, 3, 11, 8),
        (2, 3, 11, 8),
        dtype=dtype,
    )


def test_masks_that_are_added(dtype):
    (bias,) = draw((1, 3, 9, 11), seed=2)
    bias[..., 4] = -math.inf
    agree(
        lambda q, k, v: attention(q, k, v, mask=bias.to(dtype)),
        lambda q, k, v: formula(q, k, v, bias=bias),
        (2, 3, 9, 8),
        (2, 3, 11, 8),
        (2, 3, 11, 8),
        dtype=dtype,
    )


def test_lengths_of_samples(dtype):
    lengths = torch.tensor([4, 11, 1], device=DEVICE)
    hidden = torch.arange(11, device=DEVICE) >= lengths.reshape(-1, 1, 1, 1)
    agree(
        lambda q, k, v: attention(q, k, v, lengths=lengths),
        lambda q, k, v: formula(q, k, v, hidden),
        (3, 2, 9, 8),
        (3, 2, 11, 8),
        (3, 2, 11, 8),
        dtype=dtype,
    )


def test_a_query_that_sees_nothing_is_zero(dtype):
    xs, dxs = draw(*[(2, 2, 5, 8)] * 3, dtype=dtype), draw(*[(2, 2, 5, 8)] * 3, dtype=dtype, seed=1)
    xs = tuple(x.requires_grad_() for x in xs)
    y, dy = pfm.jvp(lambda *x: attention(*x, lengths=torch.tensor([0, 3], device=DEVICE)), xs, dxs, track_tangent=True)
    assert not y[0].any() and not dy[0].any() and y[1].all()
    for g in torch.autograd.grad(y.sum() + dy.square().sum(), xs):
        assert not g[0].any() and g.isfinite().all()


def test_views_are_not_copied(dtype):
    """Queries, keys and values as a projection leaves them: (B, N, 3, H, E), tokens before heads."""
    qkv, dqkv = draw((2, 9, 3, 2, 8), (2, 9, 3, 2, 8), dtype=dtype)
    split = lambda x: x.permute(2, 0, 3, 1, 4).unbind(0)  # noqa: E731
    xs, dxs = split(qkv), split(dqkv)
    assert not xs[0].is_contiguous()
    with torch.no_grad():
        found = pfm.jvp(attention, xs, dxs)
    expected = torch.func.jvp(formula, tuple(x.double() for x in xs), tuple(x.double() for x in dxs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert found[0].transpose(1, 2).is_contiguous()  # heads are joined without a copy


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bits(half):
    agree(attention, formula, *[(1, 2, 33, 16)] * 3, dtype=half)


@pytest.mark.parametrize("some", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_tangents(dtype, some):
    """Keys and values without tangents, of a text, cost four products instead of six."""
    xs, dxs = draw(*[(1, 2, 9, 8)] * 3, dtype=dtype), draw(*[(1, 2, 9, 8)] * 3, dtype=dtype, seed=1)
    given = tuple(dx if i in some else None for i, dx in enumerate(dxs))
    full = tuple((dx if i in some else torch.zeros_like(dx)).double() for i, dx in enumerate(dxs))
    with torch.no_grad():
        found = pfm.jvp(attention, xs, given)
    expected = torch.func.jvp(formula, tuple(x.double() for x in xs), full)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


# ---- how it is called -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
def test_roads(road):
    ROADS[road](Case(attention, formula, draw(*[(2, 2, 7, 4)] * 3), draw(*[(2, 2, 7, 4)] * 3, seed=1)))


def test_without_a_tangent_it_is_the_same_value():
    xs, dxs = draw(*[(2, 2, 17, 8)] * 3, dtype=torch.float32), draw(*[(2, 2, 17, 8)] * 3, dtype=torch.float32)
    y = pfm.jvp(attention, xs, dxs)[0]
    torch.testing.assert_close(attention(*xs), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attention(*xs), F.scaled_dot_product_attention(*xs), rtol=1e-5, atol=1e-6)


def test_one_graph_for_every_length():
    torch._dynamo.reset()
    run = torch.compile(lambda *x: pfm.jvp(attention, x[:3], x[3:]), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9, 12):
        args = (*draw(*[(2, 2, tokens, 4)] * 3), *draw(*[(2, 2, tokens, 4)] * 3, seed=1))
        with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
            found = run(*args)
        torch.testing.assert_close(found, torch.func.jvp(formula, args[:3], args[3:]), rtol=1e-10, atol=1e-10)


def test_autocast():
    xs, dxs = draw(*[(1, 2, 9, 8)] * 3, dtype=torch.float32), draw(*[(1, 2, 9, 8)] * 3, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, dy = pfm.jvp(attention, xs, dxs)
        assert attention(*xs).dtype == y.dtype == dy.dtype == F.scaled_dot_product_attention(*xs).dtype
    exact = torch.func.jvp(formula, xs, dxs)
    for a, b in zip((y, dy), exact, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_memory_does_not_grow_with_the_matrix():
    """8192 tokens: a matrix of one head is 256 MB. Peak memory of a process, value, tangent and backward."""
    program = """
import resource, torch, pyflowmap as pfm
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
xs, dxs = ([torch.randn(1, 1, n, 32) for _ in range(3)] for n in (8192, 8192))
small = [x[:, :, :64].clone().requires_grad_() for x in xs]
pfm.jvp(pfm.ops.attention, small, [x[:, :, :64].clone() for x in dxs])[0].sum().backward()
before = peak()
with torch.no_grad():
    pfm.jvp(pfm.ops.attention, xs, dxs)
print(peak() - before)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(found.stdout.split()[-1]) < 64.0


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_refusals():
    q, k, v = draw(*[(2, 4, 5, 8)] * 3)
    with pytest.raises(ValueError, match="each is"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="heads of q are a multiple"):
        attention(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="causal with 5 queries and 4 keys"):
        attention(q, k[:, :, :4], v[:, :, :4], causal=True)
    with pytest.raises(TypeError, match="must agree"):
        attention(q, k.float(), v)
    with pytest.raises(TypeError, match="floating point"):
        attention(q.long(), k, v)
    with pytest.raises(ValueError, match="does not broadcast"):
        attention(q, k, v, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask is torch\.int64"):
        attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        attention(q, k, v, mask=torch.zeros(5, 5, requires_grad=True))
    with pytest.raises(NotImplementedError, match="mask has a tangent"):
        pfm.jvp(lambda m: attention(q, k, v, mask=m), (torch.zeros(5, 5),), (torch.ones(5, 5),))
    for lengths in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="one integer per sample"):
            attention(q, k, v, lengths=lengths)


def test_a_result_is_no_view():
    """A write to it is as one to the result of torch's fused attention: refused by backward, which needs the result."""
    xs = tuple(x.requires_grad_() for x in draw(*[(2, 2, 5, 4)] * 3, dtype=torch.float32))
    for function in (attention, F.scaled_dot_product_attention):
        y = function(*xs)
        assert not y._is_view()
        y += 1.0
        torch.testing.assert_close(y, formula(*xs) + 1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert attention(*xs).transpose(1, 2).is_contiguous()


def test_messages_name_the_cure():
    q, k, v = draw(*[(3, 4, 5, 8)] * 3)
    for name, cure in (("is_causal", "causal="), ("attn_mask", "mask="), ("enable_gqa", "fewer"), ("msk", "lengths")):
        with pytest.raises(TypeError, match=f"{name}.*{cure}"):
            attention(q, k, v, **{name: True})
    with pytest.raises(ValueError, match=r"\(3, 1, 1, 5\), or lengths="):
        attention(q, k, v, mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="pass an int64 tensor"):
        attention(q, k, v, lengths=[1, 2, 3])
    with pytest.raises(TypeError, match="mask is a list"):
        attention(q, k, v, mask=[[True]])
    for lengths in ([20, 1, 2], [0, -3, 5]):
        with pytest.raises(ValueError, match="there are 5 keys"):
            attention(q, k, v, lengths=torch.tensor(lengths))
    attention(q, k, v, lengths=torch.tensor([0, 5, 2]))
    attention(q[:0], k[:0], v[:0], lengths=torch.empty(0, dtype=torch.int64))
    lengths = torch.tensor([[0, 5, 2], [1, 2, 3]])
    found = torch.func.vmap(lambda n: attention(q, k, v, lengths=n))(lengths)
    torch.testing.assert_close(found[1], attention(q, k, v, lengths=lengths[1]))


def test_every_tick_of_the_page_is_a_test():
    page = (ROOT / "docs/attention.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    own = pathlib.Path(__file__).read_text()
    assert len(named) >= 15
    for name in named:
        assert f"def {name}(" in own, name
    for line in page.splitlines():
        if line.startswith("|") and "yes" in line.split("|")[2]:
            assert "`test_" in line, line
