"""Arithmetic in the `jvp` of an autograd.Function, under a forward level further out.

While torch asks a Function for its tangent, forward-mode AD is off, at every level: plain torch operations there would
have no tangent at the outer one, and a second derivative would be 0 in silence. So it is turned on again, and what was
saved is taken without the tangent that it has at the level under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["outer_levels", "without_tangents"]


def outer_levels() -> AbstractContextManager:
    """The context in which a tangent is computed that is differentiated further out."""
    return forward_ad._set_fwd_grad_enabled(True)


def without_tangents(saved: Sequence[Any]) -> list[Any]:
    """The saved tensors as constants of the level under way; their tangents further out stay. Within `outer_levels`.

    Each of torch.func's levels has the number 0 while it runs; `forward_ad.unpack_dual` asks a counter that compiled
    code does not keep.
    """
    return [x if x is None or not x.is_floating_point() else torch._VF._unpack_dual(x, level=0)[0] for x in saved]
