"""`attention`: softmax attention of a Tensor or a Dual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from .modulation import check_floating

__all__ = ["attention"]


def attention(
    q: Any,  # (B, H, N, E) Tensor or Dual
    k: Any,  # (B, K, M, E), H a multiple of K: heads share keys and values (GQA)
    v: Any,  # (B, K, M, F)
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Any:
    """o = softmax(scale q k^T) v, shape (B, H, N, F); scale defaults to 1 / sqrt(E).

    causal    query i sees keys j <= i

    Of Duals, value and tangent, with P = softmax(scale q k^T) and dS = scale (dq k^T + q dk^T):

        do = P dv + (P * dS) v - rowsum(P * dS) * o

    Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023. Under torch.func.jvp the matrices are formed,
    because torch has no forward derivative of its fused attention.

    Raises ValueError where shapes do not fit, TypeError for integers.

    >>> q = torch.zeros(1, 1, 1, 4)
    >>> attention(q, torch.zeros(1, 1, 2, 4), torch.tensor([[[[1.0], [3.0]]]]))
    tensor([[[[2.]]]])
    """
    check_floating("attention", q=q, k=k, v=v)
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise ValueError(f"attention: {_shapes(q, k, v)}; each is (B, heads, tokens, channels)")
    (b, heads, n, e), (bk, groups, m, ek), (bv, groups_v, mv, _) = q.shape, k.shape, v.shape
    if (b, b, e) != (bk, bv, ek) or (groups, m) != (groups_v, mv) or groups < 1 or heads % groups:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; q and k share batch and channels, k and v batch, heads and tokens, and "
            "the heads of q are a multiple of those of k"
        )
    if causal and n != m:
        raise ValueError(f"attention: causal with {n} queries and {m} keys; a causal mask needs as many of each")
    if isinstance(q, Tensor) and forward_ad._current_level >= 0:
        return _plain(q, k, v, 1.0 / math.sqrt(e) if scale is None else scale, causal)
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=heads != groups)


def _shapes(*operands: Any) -> str:
    return "q, k, v have shapes " + ", ".join(str(tuple(x.shape)) for x in operands)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = scale * (q @ k.transpose(-1, -2))
    if causal:
        n = q.shape[-2]
        hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    return torch.softmax(logits, -1) @ v
