"""A linear layer and its tangent on few rows: one pass over the weight, for plain tensors that nobody records."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowmap.ops.backend import direct

__all__ = ["MOST_ROWS", "few_rows"]

# The kernel takes 8. From 4 on, two matrix products of torch cost about as much.
MOST_ROWS = 4


def few_rows(
    x: Tensor,  # (..., I), at most MOST_ROWS rows
    dx: Tensor | None,  # as x
    weight: Tensor,  # (O, I)
    bias: Tensor | None = None,  # (O,)
) -> tuple[Tensor, Tensor | None] | None:
    """y = x W' + b and dy = dx W' (None without dx), each (..., O), with W read once; None where torch must do it.

    That is where autograd would record y, a subclass, a functorch transform, a dispatch mode, forward-mode AD or
    autocast has a say, tensors are not float32, bfloat16 or float16 of one dtype on one device with dense rows, there
    are more rows, or PYFLOWMAP_BACKEND=reference. y differs from torch's by rounding: the order of the sum.
    """
    if type(x) is not Tensor or torch._C._is_any_autocast_enabled():
        return None
    *lead, columns = x.shape or (0,)
    if x.numel() > MOST_ROWS * columns or weight.ndim != 2:
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return None  # known before memory is asked for; the compiled function asks for all again
    y = x.new_empty(*lead, weight.shape[0])
    dy = None if dx is None else x.new_empty(*lead, weight.shape[0])
    return (y, dy) if direct.dual_linear((x, dx, weight, bias, y, dy)) else None
