"""`norm_modulate`: the entrance of an adaLN branch."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import layer_norm, rms_norm

from .modulation import check_floating, over_tokens

__all__ = ["norm_modulate"]


def norm_modulate(
    x: Any,  # (B, ..., D) Tensor or Dual
    scale: Any,  # (B, D), or with the dimensions of x: Tensor or Dual
    shift: Any,  # as scale
    *,
    kind: str = "layer",
    eps: float = 1e-6,
) -> Any:
    """y = n(x) (1 + scale) + shift, where n normalises the last dimension and has no parameters of its own.

        kind="layer"   n(x) = (x - mean) / sqrt(var + eps)
        kind="rms"     n(x) = x / sqrt(mean(x^2) + eps)

    Shape and dtype of `x` (torch's promotion where scale and shift are wider). Of a Dual, value and tangent.
    Peebles & Xie 2023 (DiT), sec. 3.2, adaLN.

    Raises ValueError where scale or shift is neither one vector per sample nor broadcastable to `x`, TypeError for
    integers.

    >>> norm_modulate(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 2), torch.zeros(1, 2), eps=0.0)
    tensor([[[-2.,  2.]]])
    """
    check_floating("norm_modulate", x=x, scale=scale, shift=shift)
    if kind not in ("layer", "rms"):
        raise ValueError(f'norm_modulate: kind = {kind!r}; it is "layer" or "rms"')
    if len(x.shape) < 2:
        raise ValueError(f"norm_modulate: x has shape {tuple(x.shape)}; it is (B, ..., D)")
    scale, shift = (over_tokens(v, x, n, "norm_modulate") for v, n in ((scale, "scale"), (shift, "shift")))
    if kind == "rms":
        normal = rms_norm(x, x.shape[-1:], eps=eps)
    elif forward_ad._current_level >= 0:
        # Backward through torch's forward derivative of layer_norm is wrong in silence (2.13); written out it is right.
        centred = x - x.mean(-1, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    else:
        normal = layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normal, 1.0 + scale)
