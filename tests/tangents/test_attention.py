"""Attention: what the value is, what is kept for backward, how much memory the tangent works in, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyflowmap as pfm


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, c: float | None = None) -> Tensor:
    scores = q @ k.mT * (1.0 / math.sqrt(q.shape[-1]) if c is None else c)
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf), -1) @ v


def draw(*shape: int, n: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(n)]


def jvp_of(function: Any, xs: list[Tensor], dxs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return pfm.jvp(function, tuple(xs), tuple(dxs), **options)


class Largest(TorchDispatchMode):
    """The largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("length", [1, 9, 70, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length_gives_the_formula(length: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, dq, dk, dv = draw(2, 3, length, 4)
    mask = torch.ones(length, length, dtype=torch.bool).tril() if causal else None
    y, dy = torch.func.jvp(lambda q, k, v: formula(q, k, v, mask), (q, k, v), (dq, dk, dv))
    with torch.no_grad():
        value, tangent = jvp_of(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v], [dq, dk, dv]
        )
    torch.testing.assert_close(value, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, dy, rtol=1e-12, atol=1e-12)


def test_causal_with_more_keys_starts_at_the_first_as_in_torch() -> None:
    q, dq = draw(2, 3, 5, 4, n=2)
    k, v, dk, dv = draw(2, 3, 8, 4, n=4)
    mask = torch.ones(5, 8, dtype=torch.bool).tril()
    expected = torch.func.jvp(lambda q, k, v: formula(q, k, v, mask), (q, k, v), (dq, dk, dv))
    found = jvp_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], [dq, dk, dv])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "leads", [((), (), ()), ((3,), (3,), (3,)), ((2, 3), (1, 3), (2, 1)), ((2, 1, 3), (1, 2, 3), (3,))]
)
def test_leading_dimensions_broadcast(leads: tuple[tuple[int, ...], ...]) -> None:
    torch.manual_seed(4)
    xs, dxs = ([torch.randn(*lead, 5, 4, dtype=torch.float64) for lead in leads] for _ in range(2))
    expected = torch.func.jvp(formula, tuple(xs), tuple(dxs))
    found = jvp_of(F.scaled_dot_product_attention, xs, dxs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (7, 7), (1, 3, 7, 7), (2, 3, 1, 7)])
@pytest.mark.parametrize("tracked", [False, True])
def test_masks_broadcast(shape: tuple[int, ...], tracked: bool) -> None:
    torch.manual_seed(1)
    xs, dxs = draw(2, 3, 7, 4, n=3), draw(2, 3, 7, 4, n=3)
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    expected = torch.func.jvp(lambda q, k, v: formula(q, k, v, mask), tuple(xs), tuple(dxs))[1]
    found = jvp_of(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), xs, dxs, track_tangent=tracked
    )[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("lead", "shape"),
    [
        ((6,), (6, 5, 5)),  # 3-D queries, batch and heads joined
        ((6,), (6, 1, 5)),
        ((6,), (1, 5, 5)),
        ((6,), (5, 5)),
        ((), (5, 5)),
        ((2, 3, 4), (3, 4, 5, 5)),
        ((2, 3, 4), (3, 1, 1, 5)),
        ((2, 3, 4), (4, 5, 5)),
        ((2, 3, 4), (2, 1, 4, 5, 5)),
    ],
)
@pytest.mark.parametrize("kind", ["hidden", "added"])
def test_masks_of_any_number_of_dimensions(lead: tuple[int, ...], shape: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(1)
    xs, dxs = draw(*lead, 5, 4, n=3), draw(*lead, 5, 4, n=3)
    seen = torch.rand(shape) > 0.3
    seen[..., 0] = True
    mask = seen if kind == "hidden" else torch.zeros(shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    expected = torch.func.jvp(lambda q, k, v: formula(q, k, v, seen), tuple(xs), tuple(dxs))
    found = jvp_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), xs, dxs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_heads_that_share_keys_with_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    xs, dxs = ([torch.randn(*lead, h, 5, 4, dtype=torch.float64) for h in (6, 2, 2)] for _ in range(2))
    mask = torch.rand(6, 5, 5) > 0.3
    mask[..., 0] = True

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return formula(q, k.repeat_interleave(3, -3), v.repeat_interleave(3, -3), mask)

    expected = torch.func.jvp(repeated, tuple(xs), tuple(dxs))
    found = jvp_of(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True), xs, dxs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def channels_first(n: int, seed: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of a UNet: (B, H, C, N) in memory."""
    qkv = torch.randn(2, 3 * 3 * 4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return tuple(x.reshape(2, 3, 4, n).mT for x in qkv.chunk(3, 1))


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, pfm.ops.attention])
@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
def test_gradients_of_channels_first_attention(attention: Any, tracked: bool) -> None:
    """The last dimension is not adjacent in memory: as of leaves, of views, of their tangents."""
    results = []
    for function in (attention, formula):
        xs, dxs = ([x.detach().requires_grad_() for x in channels_first(5, seed)] for seed in (0, 1))
        jvp = torch.func.jvp if function is formula else pfm.jvp
        options = {} if function is formula else {"track_tangent": tracked}
        y, dy = jvp(function, tuple(xs), tuple(dxs), **options)
        loss = y.sin().sum() + (dy.square().sum() if tracked else 0.0)
        results.append(torch.autograd.grad(loss, (*xs, *(dxs if tracked else ()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, pfm.ops.attention])
@pytest.mark.parametrize("dropout", [False, True])
def test_attention_on_the_meta_device(attention: Any, dropout: bool) -> None:
    q = torch.empty(2, 3, 5, 4, device="meta")
    options = {"dropout_p": 0.5} if dropout and attention is F.scaled_dot_product_attention else {}
    for y in (*pfm.jvp(lambda q: attention(q, q, q, **options), (q,), (q,)), pfm.ops.attention(q, q, q)):
        assert (y.shape, y.device.type) == ((2, 3, 5, 4), "meta")


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_a_query_that_sees_nothing_is_zero(recorded: bool, tracked: bool) -> None:
    xs, dxs = draw(1, 2, 5, 4, n=3), draw(1, 2, 5, 4, n=3)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    xs = [x.requires_grad_(recorded) for x in xs]
    y, dy = jvp_of(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), xs, dxs, track_tangent=tracked
    )
    assert dy.isfinite().all() and y.isfinite().all()
    assert not y[:, :, 2].any() and not dy[:, :, 2].any() and dy[:, :, 3].all()


@pytest.mark.parametrize("tracked", [False, True])
def test_recorded_value_keeps_no_matrix(tracked: bool) -> None:
    n, shape = 512, (1, 2, 512, 16)
    xs, dxs = draw(*shape, n=3, dtype=torch.float32), draw(*shape, n=3, dtype=torch.float32)
    xs = [x.requires_grad_() for x in xs]
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        plain = F.scaled_dot_product_attention(*xs)
        kept_by_plain, saved[:] = sum(saved), []
        y, _ = jvp_of(F.scaled_dot_product_attention, xs, dxs, track_tangent=tracked)
    torch.testing.assert_close(y, plain)
    most = 2 * kept_by_plain + 2 * n * 4 if tracked else kept_by_plain  # the tangents, and a number per query
    assert sum(saved) <= most < 2 * n * n * 4


@pytest.mark.parametrize("tracked", [False, True])
def test_gradients_through_value_and_tangent(tracked: bool) -> None:
    torch.manual_seed(5)
    xs, dxs = draw(2, 3, 20, 4, n=3), draw(2, 3, 20, 4, n=3)

    def loss_of(pair: Any) -> Tensor:
        return pair[0].square().sum() + ((pair[1] ** 3).sum() if tracked else 0.0)

    wanted = [x.requires_grad_() for x in (*xs, *(dxs if tracked else ()))]
    expected = torch.autograd.grad(loss_of(torch.func.jvp(formula, tuple(xs), tuple(dxs))), wanted)
    found = torch.autograd.grad(loss_of(jvp_of(F.scaled_dot_product_attention, xs, dxs, track_tangent=tracked)), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_mask_that_is_learned_has_its_gradient() -> None:
    xs, dxs = draw(1, 2, 6, 4, n=3), draw(1, 2, 6, 4, n=3)
    bias = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    y, dy = jvp_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), xs, dxs)
    plain = F.scaled_dot_product_attention(*xs, attn_mask=bias)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), bias) for x in (y, plain)), strict=True):
        torch.testing.assert_close(a, b)
    assert dy.isfinite().all()


@pytest.mark.parametrize("recorded", [False, True])
def test_untracked_tangent_works_in_bounded_memory(recorded: bool) -> None:
    n, shape = 1024, (1, 4, 1024, 8)
    xs, dxs = draw(*shape, n=3, dtype=torch.float32), draw(*shape, n=3, dtype=torch.float32)
    xs = [x.requires_grad_(recorded) for x in xs]
    with Largest() as largest:
        jvp_of(F.scaled_dot_product_attention, xs, dxs)
    assert largest.numbers <= 4 * n * 8  # P has 4 n^2 = 2^22 numbers


def test_heads_are_joined_without_a_copy() -> None:
    xs, dxs = draw(2, 3, 5, 4, n=3), draw(2, 3, 5, 4, n=3)
    y, dy = jvp_of(F.scaled_dot_product_attention, xs, dxs)
    assert y.transpose(1, 2).is_contiguous() and dy.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_is_one_operator_for_every_length(recorded: bool) -> None:
    def run(*args: Tensor) -> Any:
        return pfm.jvp(F.scaled_dot_product_attention, args[:3], args[3:])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        args = draw(2, 3, length, 4)
        args = [x.requires_grad_(recorded and i < 3) for i, x in enumerate(args)]
        for a, b in zip(compiled(*args), run(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autocast_casts_as_torch_does() -> None:
    xs, dxs = draw(2, 3, 9, 8, n=3, dtype=torch.float32), draw(2, 3, 9, 8, n=3, dtype=torch.float32)
    exact = torch.func.jvp(formula, tuple(xs), tuple(dxs))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.scaled_dot_product_attention(*xs)
        with torch.no_grad():
            found = jvp_of(F.scaled_dot_product_attention, xs, dxs)
    assert found[0].dtype == found[1].dtype == plain.dtype == torch.bfloat16
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_a_mask_with_a_tangent_raises() -> None:
    x, mask = torch.randn(1, 1, 4, 4), torch.zeros(4, 4)
    with pytest.raises(NotImplementedError, match=r"attn_mask\.detach"):
        pfm.jvp(
            lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m),
            (x, mask),
            (torch.ones_like(x), torch.ones_like(mask)),
        )


def test_mask_and_causal_exclude_each_other() -> None:
    x, mask = torch.randn(1, 1, 4, 4), torch.zeros(4, 4)
    for raised, grad in ((ValueError, True), (ValueError, False)):
        with torch.set_grad_enabled(grad), pytest.raises(raised, match="is_causal"):
            jvp_of(lambda x: F.scaled_dot_product_attention(x, x, x, mask, is_causal=True), [x], [x])


# ---- torch's own modules as they stand -----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first: bool, grad: bool) -> None:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, activation="gelu")
    encoder = nn.TransformerEncoder(layer.double().eval(), 2, enable_nested_tensor=False)
    x, dx = draw(2, 5, 8, n=2)
    with torch.set_grad_enabled(grad):
        y, dy = pfm.jvp(encoder, (x,), (dx,))
        ends = [encoder(x + h * dx) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(y, encoder(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dy, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-7)


def test_multihead_attention_with_dropout_and_weights() -> None:
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True).double().train()
    x, dx = draw(2, 5, 8, n=2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def seeded(x: Tensor) -> Any:
        torch.manual_seed(7)
        return layer(x, x, x, key_padding_mask=padding)

    (y, w), (dy, dw) = pfm.jvp(seeded, (x,), (dx,))
    ends = [seeded(x + h * dx) for h in (1e-5, -1e-5)]
    for found, a, b in zip((dy, dw), *ends, strict=True):
        torch.testing.assert_close(found, (a - b) / 2e-5, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((y, w), seeded(x), rtol=0, atol=0)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_refused(cell: Any) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(pfm.tangents.MissingRule, match="no tangent rule"):
        pfm.jvp(cell(4, 5), (x,), (x,))


def test_the_fast_path_of_an_encoder_layer_is_refused() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(pfm.tangents.MissingRule, match="_native_multi_head_attention"):
        weights = [torch.randn(24, 8), torch.randn(24), torch.randn(8, 8), torch.randn(8)]
        pfm.jvp(lambda x: torch._native_multi_head_attention(x, x, x, 8, 2, *weights), (x,), (x,))
