"""Makes Duals known to einops, which asks for the type of what it is given."""

from __future__ import annotations

import sys
from typing import Any

from .parts import is_dual

__all__ = ["introduce"]

_met: list[Any] = []


def introduce() -> None:
    """Gives einops, once somebody has imported it, a back end for Duals: torch's own, since Duals take its functions.

    einops finds back ends among the subclasses of its own; it has no other way to register one.
    """
    if _met or "einops" not in sys.modules:
        return
    _met.append(None)
    try:
        from einops._backends import TorchBackend
    except ImportError:  # a version that is built otherwise: it will name the type that it does not know
        return

    class DualBackend(TorchBackend):
        framework_name = "pyflowmap"  # einops asks only for back ends whose framework was imported

        def is_appropriate_type(self, tensor: Any) -> bool:
            return is_dual(tensor)

    _met.append(DualBackend)  # subclasses are held weakly
