"""Custom `torch.autograd.Function`s given a Dual: the rule in the table, or a refusal.

Such a function runs its forward without autograd: given a Dual it would compute a value and a tangent, and drop the
gradient of both without a word. torch has no hook there, so `Function.apply` is wrapped once.
"""

from __future__ import annotations

from typing import Any

import torch

from .call import call
from .parts import first_dual
from .registry import find

__all__ = ["watch_functions"]

_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


def _watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
    dual = first_dual(args)
    if dual is None:
        return _apply(cls, *args, **kwargs)
    rule = find(cls)
    if rule is None and dual.fallback is None:
        raise TypeError(
            f"the autograd.Function {cls.__module__}.{cls.__qualname__} has no tangent rule; given a Dual it would "
            f"drop gradients in silence. Write one and decorate it with @pfm.tangents.rule({cls.__qualname__})"
        )
    return call(cls.apply, args, kwargs)


def watch_functions() -> None:
    """Wraps `torch.autograd.Function.apply`, once."""
    if torch.autograd.Function.apply.__func__ is not _watched:  # type: ignore[attr-defined]
        torch.autograd.Function.apply = classmethod(_watched)  # type: ignore[method-assign, assignment]
