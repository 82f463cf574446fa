"""Attention. With S = c Q K' + mask, P = softmax(S), O = P V:

    dO = P dV + W V - rowsum(W) * O,     W = P * dS,     dS = c (dQ K' + Q dK')

The tangent needs P, which a flash kernel never forms. Where autograd records the value, the value is torch's own (it
saves O(N) for backward), and the untracked tangent forms P a block at a time: its working memory is a constant. Where
nothing is recorded, value and tangent share P. A tracked tangent is written plainly, for autograd, which keeps P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parts import primals, tangent
from ..registry import Kind, composite, rule

composite("multi_head_attention_forward")

BLOCK = 1 << 18  # numbers of P at a time and core: with W and the operands they stay in its cache
BLOCK_CUDA = 1 << 24


@rule("scaled_dot_product_attention", kind=Kind.JOINT)
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if tangent(attn_mask) is not None:
        raise NotImplementedError(
            "attn_mask of scaled_dot_product_attention has a tangent, for which there is no rule; pass "
            "attn_mask.detach(), or write the attention with softmax and matmul"
        )
    q, k, v, mask = primals((query, key, value, attn_mask))
    directions = (tangent(query), tangent(key), tangent(value))
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tracked = torch.is_grad_enabled() and any(getattr(x, "tracked", False) for x in (query, key, value))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if is_causal and mask is not None:
        raise ValueError(f"attn_mask {tuple(mask.shape)} and is_causal=True exclude each other; pass one")
    if dropout_p > 0.0:
        out, dropped = _dropped(q, k, v, dropout_p, options)
        with nullcontext() if tracked else torch.no_grad():
            return out, _plain(q, k, v, directions, options, out, dropped)
    if not recorded and not tracked:
        return _blockwise(q, k, v, directions, options, None)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    if tracked:
        return out, _plain(q, k, v, directions, options, out, None)
    with torch.no_grad():
        return out, _blockwise(q, k, v, directions, options, out)[1]


# ---- the plain formula: differentiable, keeps P ------------------------------------------------------------------


def _plain(
    q: Any, k: Any, v: Any, directions: Any, options: dict[str, Any], out: Tensor, dropped: Tensor | None
) -> Tensor | None:
    """`dropped`: P after dropout, which P V and W V see; rowsum(W) is of all of W."""
    dq, dk, dv = directions
    if options["enable_gqa"]:
        k, v, dk, dv = _repeated(q, k, v, dk, dv)
    c, mask = _scale(q, options), options["attn_mask"]
    with _without_autocast(q):
        q, k, v, dq, dk, dv = (None if x is None else _wide(x) for x in (q, k, v, dq, dk, dv))
        scores = (q @ k.mT) * c
        if options["is_causal"]:
            scores = scores.masked_fill(_later(0, scores.shape[-2], scores.shape[-1], scores.device), -math.inf)
        weights = _softmax(scores, mask)
        kept = weights if dropped is None else dropped.to(weights.dtype)
        result = None if dv is None else kept @ dv
        if dq is not None or dk is not None:
            slope = _slope(q, k, dq, dk, c)
            through = (kept * slope) @ v - (weights * slope).sum(-1, keepdim=True) * out
            result = through if result is None else result + through
    return result


def _slope(q: Tensor, k: Tensor, dq: Tensor | None, dk: Tensor | None, c: float) -> Tensor:
    left = None if dq is None else (dq * c) @ k.mT
    if dk is None:
        return left  # type: ignore[return-value]
    right = (q * c) @ dk.mT
    return right if left is None else left + right


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """P; a row whose every key is masked is zero, as in torch."""
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.ops.aten._safe_softmax(scores, -1)


def _later(start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Where a key comes after the query, of queries from `start` on."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(start + 1)


def _dropped(q: Tensor, k: Tensor, v: Tensor, p: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Value and P after dropout, by torch's own formula: on a CPU its bits are those of the plain call."""
    dtype, mask = _value_dtype(q), options["attn_mask"]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with _without_autocast(q):
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask, p, options["is_causal"], None, scale=options["scale"], enable_gqa=options["enable_gqa"]
        )


# ---- block by block: nothing is recorded ---------------------------------------------------------------------------


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, directions: Any, options: dict[str, Any], out: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """(value, tangent); the value is None where `out` has it already."""
    arguments = (q, k, v, *directions, options["attn_mask"], options["is_causal"], _scale(q, options))
    gqa = options["enable_gqa"]
    if not torch.compiler.is_compiling():
        return _run_blocks(*arguments, gqa, out, _value_dtype(q))  # type: ignore[call-arg]
    if out is None:
        return torch.ops.pyflowmap.attention_pair(*arguments, gqa, _value_dtype(q))
    return None, torch.ops.pyflowmap.attention_tangent(*arguments, gqa, out)


def _run_blocks(
    q: Any,  # (..., H, L, E)
    k: Any,  # (..., H, S, E)
    v: Any,  # (..., H, S, D)
    dq: Any,
    dk: Any,
    dv: Any,
    mask: Any,
    is_causal: bool,
    c: float,
    gqa: bool,
    out: Tensor | None,  # (..., H, L, D)
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    if gqa:
        k, v, dk, dv = _repeated(q, k, v, dk, dv)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    length, keys = q.shape[-2], k.shape[-2]
    masked = None if mask is None else _four(mask.expand(*lead, length, keys), lead)
    q, k, v, dq, dk, dv, old = (
        None if x is None else _four(x.expand(*lead, *x.shape[-2:]), lead) for x in (q, k, v, dq, dk, dv, out)
    )
    # (B, L, H, D) in memory, as flash kernels leave it: heads are joined without a copy
    shape = (q.shape[0], length, q.shape[1], v.shape[-1])
    new = None if old is not None else torch.empty(shape, dtype=dtype, device=q.device).transpose(1, 2)
    result = torch.empty(shape, dtype=dtype, device=q.device).transpose(1, 2)
    with _without_autocast(q):
        for rows in _blocks(shape[0], shape[2], length, keys, q.device):
            at = (*rows[:2], slice(min(keys, rows[2].stop) if is_causal else keys))  # keys that are not masked
            parts: Any = [
                None if x is None else _wide(x[i]).flatten(0, 1).contiguous()
                for x, i in ((q, rows), (k, at), (v, at), (dq, rows), (dk, at), (dv, at))
            ]
            qs, ks, vs, dqs, dks, dvs = parts
            qs = qs * c
            scores = torch.bmm(qs, ks.mT)
            if is_causal:
                scores.masked_fill_(_later(rows[2].start, scores.shape[1], scores.shape[2], q.device), -math.inf)
            weights = _softmax(scores, None if masked is None else masked[rows].flatten(0, 1))
            del scores
            value = torch.bmm(weights, vs) if old is None else _wide(old[rows]).flatten(0, 1)
            moved: Any = None if dvs is None else torch.bmm(weights, dvs)
            if dqs is not None or dks is not None:
                slope = torch.bmm(dqs * c, ks.mT) if dqs is not None else torch.bmm(qs, dks.mT)
                if dqs is not None and dks is not None:
                    slope.baddbmm_(qs, dks.mT)
                slope.mul_(weights)
                total = slope.sum(-1, keepdim=True)
                moved = torch.bmm(slope, vs) if moved is None else moved.baddbmm_(slope, vs)
                moved.addcmul_(total, value, value=-1.0)
            if new is not None:
                new[rows] = value.view(new[rows].shape)
            result[rows] = moved.view(result[rows].shape)
    full = (*lead, length, v.shape[-1])
    return None if new is None else new.reshape(full), result.reshape(full)


def _blocks(
    batch: int, heads: int, length: int, keys: int, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    """The pieces of (batch, heads, queries) whose P is small: samples, or else heads of one, or else queries of one."""
    numbers = BLOCK_CUDA if device.type == "cuda" else BLOCK * min(torch.get_num_threads(), 32)
    queries = max(1, numbers // max(keys, 1))
    samples = _even(batch, queries // max(length * heads, 1))
    some_heads = _even(heads, queries // max(length, 1))
    queries = _even(length, queries)
    for b in range(0, batch, samples):
        for h in range(0, heads, some_heads):
            for i in range(0, length, queries):
                ends = (min(b + samples, batch), min(h + some_heads, heads), min(i + queries, length))
                yield slice(b, ends[0]), slice(h, ends[1]), slice(i, ends[2])


def _even(total: int, most: int) -> int:
    """The size of equal pieces of at most `most`, so that none is left small; at least 1."""
    pieces = -(-total // max(1, most))
    return -(-total // max(1, pieces)) or 1


def _four(x: Tensor, lead: Any) -> Tensor:
    """(..., H, a, b) as (B, H, a, b)."""
    if len(lead) == 2:
        return x
    if len(lead) < 2:
        return x.reshape(-1, 1, *x.shape[-2:])
    return x.flatten(0, len(lead) - 2)


def _repeated(q: Tensor, *xs: Tensor | None) -> list[Tensor | None]:
    """Keys and values for every head of queries."""
    return [None if x is None else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in xs]


def _scale(q: Tensor, options: dict[str, Any]) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if options["scale"] is None else options["scale"]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _value_dtype(q: Tensor) -> torch.dtype:
    device = q.device.type
    if q.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


def _without_autocast(q: Tensor) -> Any:
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# ---- while compiling, one operator: the loop is not unrolled, and lengths may be symbols ---------------------------


@torch.library.custom_op("pyflowmap::attention_pair", mutates_args=())
def _attention_pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    c: float,
    gqa: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _run_blocks(q, k, v, dq, dk, dv, mask, is_causal, c, gqa, None, dtype)  # type: ignore[return-value]


@torch.library.custom_op("pyflowmap::attention_tangent", mutates_args=())
def _attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    c: float,
    gqa: bool,
    out: Tensor,
) -> Tensor:
    return _run_blocks(q, k, v, dq, dk, dv, mask, is_causal, c, gqa, out, out.dtype)[1]


def _like_value(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape, strides and dtype of what `_run_blocks` returns."""
    heads = q.shape[:-2]
    lead = torch.broadcast_shapes(heads, k.shape[:-2], v.shape[:-2]) if k.shape[:-2] == heads else heads
    four = (math.prod(lead[:-1]), lead[-1]) if len(lead) > 1 else (math.prod(lead), 1)
    x = torch.empty(four[0], q.shape[-2], four[1], v.shape[-1], dtype=dtype, device=q.device).transpose(1, 2)
    return x.reshape(*lead, q.shape[-2], v.shape[-1])


@_attention_pair.register_fake
def _(q, k, v, dq, dk, dv, mask, is_causal, c, gqa, dtype):
    return _like_value(q, k, v, dtype), _like_value(q, k, v, dtype)


@_attention_tangent.register_fake
def _(q, k, v, dq, dk, dv, mask, is_causal, c, gqa, out):
    return _like_value(q, k, v, out.dtype)
