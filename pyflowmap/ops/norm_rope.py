"""`norm_rope`: what happens to queries and keys before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm

from .modulation import check_floating

__all__ = ["norm_rope"]


def norm_rope(
    x: Any,  # (B, H, N, E) Tensor or Dual: queries or keys
    weight: Any,  # (E,)
    cos: Any,  # (N, E/2), or broadcastable to (B, H, N, E/2)
    sin: Any,  # as cos
    *,
    eps: float = 1e-6,
) -> Any:
    """y = R n(x): RMS norm of each head, then rotary positions. Shape and dtype of `x`.

        n(x) = weight * x / sqrt(mean(x^2) + eps)
        y[..., :E/2] = cos * a - sin * b,   y[..., E/2:] = cos * b + sin * a,     n(x) = [a, b]

    cos and sin of the angles of each position, best in float32; `pyflowmap.nn.rope_2d` makes them. Without rotation
    (`cos = sin = None`) it is the norm alone. Su et al. 2021 (RoPE), eq. 34; qk-norm: Dehghani et al. 2023, sec. 2.1.

    Raises ValueError where shapes do not fit, TypeError for integers.

    >>> norm_rope(torch.tensor([[[[3.0, 4.0]]]]), torch.ones(2), torch.zeros(1, 1), torch.ones(1, 1), eps=0.0)
    tensor([[[[-1.1314,  0.8485]]]])
    """
    check_floating("norm_rope", x=x, weight=weight)
    size = x.shape[-1]
    if tuple(weight.shape) != (size,):
        raise ValueError(f"norm_rope: weight has shape {tuple(weight.shape)} but heads have {size} channels")
    y = rms_norm(x, (size,), weight.to(x.dtype), eps)
    if cos is None and sin is None:
        return y
    if cos is None or sin is None or cos.shape != sin.shape or 2 * cos.shape[-1] != size:
        shapes = [None if each is None else tuple(each.shape) for each in (cos, sin)]
        raise ValueError(
            f"norm_rope: cos and sin have shapes {shapes[0]} and {shapes[1]} but heads have {size} channels; both end "
            f"in {size // 2}, one angle per pair"
        )
    a, b = y.chunk(2, -1)
    return torch.cat([cos * a - sin * b, cos * b + sin * a], -1).to(x.dtype)
