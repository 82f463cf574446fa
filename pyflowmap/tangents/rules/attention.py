"""torch's attention of Duals, by `pyflowmap.ops.attention`: value and tangent in one pass, O(N) memory.

With dropout the matrices are formed, as torch forms them. With S = c Q K' + mask, P = softmax(S), O = P V:

    dO = P dV + W V - rowsum(W) * O,     W = P * dS,     dS = c (dQ K' + Q dK')
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowmap.ops.attention import WIDEST, attention_dual, is_autocast_on

from ..parts import primals, recording, tangent
from ..registry import Kind, composite, rule

composite("multi_head_attention_forward")


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
    if is_causal and mask is not None:
        raise ValueError(f"attn_mask {tuple(mask.shape)} and is_causal=True exclude each other; pass one")
    if dropout_p > 0.0:
        out, dropped = _dropped(q, k, v, dropout_p, options)
        with recording(query, key, value):
            return out, _plain(q, k, v, directions, options, out, dropped)
    tracked = torch.is_grad_enabled() and any(getattr(x, "tracked", False) for x in (query, key, value))
    gradient_of_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    too_wide = not q.is_cpu and max(q.shape[-1], v.shape[-1]) > WIDEST
    if gradient_of_mask or too_wide:
        out = F.scaled_dot_product_attention(q, k, v, **options)
        with recording(query, key, value):
            return out, _plain(q, k, v, directions, options, out, None)
    return _fused(q, k, v, directions, options, tracked)


def _fused(q: Any, k: Any, v: Any, directions: Any, options: dict[str, Any], tracked: bool) -> tuple[Tensor, Tensor]:
    heads = [x.shape[:-2] for x in (q, k, v)]
    lead = q.shape[:-2] if options["enable_gqa"] else torch.broadcast_shapes(*heads)
    length, keys = q.shape[-2], k.shape[-2]
    mask, causal = options["attn_mask"], options["is_causal"]
    if causal and length != keys:  # torch's mask starts at the first key
        mask, causal = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(), False
    if mask is not None and len(lead) > 2 and mask.ndim > 3:
        mask = _four(mask.expand(*lead, *mask.shape[-2:]))

    def four(x: Any) -> Any:
        if x is None or (len(lead) == 2 and x.ndim == 4 and (options["enable_gqa"] or x.shape[:2] == lead)):
            return x
        return _four(x if options["enable_gqa"] else x.expand(*lead, *x.shape[-2:]))

    out, derivative = attention_dual(
        *map(four, (q, k, v)),
        tangents=tuple(map(four, directions)),
        tracked=tracked,
        mask=mask,
        scale=options["scale"],
        causal=causal,
    )
    if len(lead) == 2:
        return out, derivative
    full = (*lead, length, v.shape[-1])
    return out.reshape(full), derivative.reshape(full)


def _four(x: Tensor) -> Tensor:
    """(..., H, a, b) as (B, H, a, b)."""
    return x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x.flatten(0, x.ndim - 4)


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
            scores = scores.masked_fill(_later(scores.shape[-2], scores.shape[-1], scores.device), -math.inf)
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


def _later(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where a key comes after the query."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(1)


def _dropped(q: Tensor, k: Tensor, v: Tensor, p: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Value and P after dropout, by torch's own formula: on a CPU its bits are those of the plain call."""
    dtype, mask = _value_dtype(q), options["attn_mask"]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with _without_autocast(q):
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask, p, options["is_causal"], None, scale=options["scale"], enable_gqa=options["enable_gqa"]
        )


def _repeated(q: Tensor, *xs: Tensor | None) -> list[Tensor | None]:
    """Keys and values for every head of queries."""
    return [None if x is None else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in xs]


def _scale(q: Tensor, options: dict[str, Any]) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if options["scale"] is None else options["scale"]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _value_dtype(q: Tensor) -> torch.dtype:
    device = q.device.type
    if q.dtype != torch.float64 and is_autocast_on(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


def _without_autocast(q: Tensor) -> Any:
    device = q.device.type
    return torch.autocast(device, enabled=False) if is_autocast_on(device) else nullcontext()
