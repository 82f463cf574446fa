"""Differentiating a formula in plain torch, wherever one is: in torch.func, in an operator, under a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Maybe", "above_autograd", "directional"]

Maybe = Tensor | None

_USUALLY_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()  # autocast, where nobody asked for it


def directional(function: Callable, xs: Sequence[Any], dxs: Sequence[Any]) -> tuple[Any, Any]:
    """function(*xs) and its derivative along dxs: the transpose of its transpose, which is linear.

    torch.func.jvp would do, but not inside another one.
    """
    value, pull = torch.func.vjp(function, *xs)  # type: ignore[misc]
    zero = pytree.tree_map(torch.zeros_like, value)
    _, push = torch.func.vjp(pull, zero)  # type: ignore[misc]
    return value, push(tuple(dxs))[0]


@contextmanager
def above_autograd() -> Iterator[None]:
    """An operator runs below autograd, where nothing can be differentiated, and under the hooks of a checkpoint, which
    would take the formula's own tensors for the model's; here it runs above the one and without the other."""
    hooks = []
    while (hook := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(hook)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _USUALLY_EXCLUDED):
            yield
    finally:
        for hook in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*hook)
