"""`gated_residual`: the exit of an adaLN branch."""

from __future__ import annotations

from typing import Any

import torch

from .modulation import check_floating, over_tokens

__all__ = ["gated_residual"]


def gated_residual(
    x: Any,  # (B, ..., D) Tensor or Dual: the stream
    gate: Any,  # (B, D), or with the dimensions of x
    h: Any,  # of the shape of x: what the branch made
) -> Any:
    """y = x + gate * h. Shape of `x`, torch's promoted dtype. Of a Dual, value and tangent: dx + dgate * h + gate * dh.

    A gate that starts at zero makes the block start as the identity. Peebles & Xie 2023 (DiT), sec. 3.2, adaLN-zero.

    Raises ValueError where `h` has another shape than `x` or `gate` does not fit, TypeError for integers.

    >>> gated_residual(torch.ones(1, 1, 2), torch.tensor([[0.0, 2.0]]), torch.full((1, 1, 2), 3.0))
    tensor([[[1., 7.]]])
    """
    check_floating("gated_residual", x=x, gate=gate, h=h)
    if h.shape != x.shape:
        raise ValueError(
            f"gated_residual: h has shape {tuple(h.shape)} but x has shape {tuple(x.shape)}; they must agree"
        )
    return torch.addcmul(x, over_tokens(gate, x, "gate", "gated_residual"), h)
