"""The reference: `torch.func.jvp`, made to hold.

Attention runs by the plain formula: its other kernels have no forward mode. Norms do too: torch.func.jvp gives the
right tangent of layer_norm and group_norm, but the wrong gradient through it (torch 2.13: mean and deviation count as
constants; central differences show it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["jvp", "plain_formulas"]


def _standard(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + eps)


def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    y = _standard(x, tuple(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x / torch.sqrt(x.square().mean(axes, keepdim=True) + eps)
    return y if weight is None else y * weight


def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    y = _standard(x.reshape(x.shape[0], groups, -1), (2,), eps).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


@contextmanager
def plain_formulas() -> Iterator[None]:
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(F, "layer_norm", layer_norm),
        mock.patch.object(F, "rms_norm", rms_norm),
        mock.patch.object(F, "group_norm", group_norm),
    ):
        yield


def jvp(function: Callable, primals: tuple, tangents: tuple) -> Any:
    """As pfm.jvp: a number is a constant tangent, None is zero."""
    directions = tuple(
        torch.zeros_like(x) if dx is None else dx if isinstance(dx, Tensor) else torch.full_like(x, dx)
        for x, dx in zip(primals, tangents, strict=True)
    )
    with plain_formulas():
        return torch.func.jvp(function, primals, directions)
