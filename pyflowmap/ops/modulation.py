"""What an adaLN block does around its two branches asks of its scale, shift and gate: one vector per sample."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

__all__ = ["check_floating", "fitted", "over_tokens"]


def fitted(vector: Any, x: Any, name: str, function: str) -> None:
    """Raises where `vector` is neither (B, D) nor broadcastable to x (B, ..., D) with all its channels."""
    shape, want = vector.shape, x.shape
    if len(shape) == 2 and len(want) > 2 and shape[0] in (1, want[0]) and shape[1] == want[-1]:
        return
    if len(shape) == len(want) and shape[-1] == want[-1] and all(a in (1, b) for a, b in zip(shape, want, strict=True)):
        return
    _unfit(vector, x, name, function)


def over_tokens(vector: Any, x: Any, name: str, function: str) -> Any:
    """`vector` (B, D), or with the dimensions of x, as something that broadcasts against x (B, ..., D)."""
    shape, want = vector.shape, x.shape
    if len(shape) == 2 and len(want) > 2 and shape[0] in (1, want[0]) and shape[1] == want[-1]:
        return vector.reshape(shape[0], *[1] * (len(want) - 2), shape[1])
    if len(shape) == len(want) and shape[-1] == want[-1] and all(a in (1, b) for a, b in zip(shape, want, strict=True)):
        return vector
    _unfit(vector, x, name, function)


def _unfit(vector: Any, x: Any, name: str, function: str) -> NoReturn:
    samples = x.shape[0] if len(x.shape) else 1
    raise ValueError(
        f"{function}: {name} has shape {tuple(vector.shape)} but x has shape {tuple(x.shape)}; pass one vector per "
        f"sample, ({samples}, {x.shape[-1]}), or one per token, with the dimensions of x"
    )


def check_floating(function: str, **operands: Any) -> None:
    """Raises TypeError where an operand, a Tensor or a Dual, is not floating point."""
    for name, x in operands.items():
        if not isinstance(x, Tensor) and not hasattr(x, "primal"):
            raise TypeError(f"{function}: {name} is a {type(x).__name__}; pass a tensor")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{function}: {name} is {x.dtype}; pass floating point, e.g. {name}.float()")
