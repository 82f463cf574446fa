"""What an adaLN block does around its two branches asks of its scale, shift and gate: one vector per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_floating", "fitted", "launch", "of_one_kind", "over_tokens"]


def check_floating(function: str, **operands: Any) -> None:
    """Raises TypeError where an operand, a Tensor or a Dual, is not floating point."""
    for name, x in operands.items():
        if not isinstance(x, Tensor) and not hasattr(x, "primal"):
            raise TypeError(f"{function}: {name} is a {type(x).__name__}; pass a tensor")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{function}: {name} is {x.dtype}; pass floating point, e.g. {name}.float()")


def _per_sample(vector: Any, x: Any) -> bool:
    shape, want = vector.shape, x.shape
    return len(shape) == 2 and len(want) > 2 and shape[0] in (1, want[0]) and shape[1] == want[-1]


def fitted(vector: Any, x: Any, name: str, function: str) -> None:
    """Raises where `vector` is neither (B, D) nor broadcastable to x (B, ..., D) with all its channels."""
    shape, want = vector.shape, x.shape
    if _per_sample(vector, x):
        return
    if len(shape) == len(want) and shape[-1] == want[-1] and all(a in (1, b) for a, b in zip(shape, want, strict=True)):
        return
    samples = want[0] if len(want) else 1
    first = len(shape) == 2 and len(want) > 2 and shape[1] == want[1]
    hint = "; channels are last here, those of an image x.movedim(1, -1)" if first else ""
    raise ValueError(
        f"{function}: {name} has shape {tuple(shape)} but x has shape {tuple(want)}; pass one vector per "
        f"sample, ({samples}, {want[-1]}), or one per token, with the dimensions of x{hint}"
    )


def over_tokens(vector: Any, x: Any) -> Any:
    """`vector`, which is `fitted`, as something that broadcasts against x (B, ..., D)."""
    if not _per_sample(vector, x):
        return vector
    return vector.reshape(vector.shape[0], *[1] * (len(x.shape) - 2), vector.shape[1])


def of_one_kind(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """float64 where any is: the kernels mix the other types alone."""
    if not any(x is not None and x.dtype == torch.float64 for x in tensors):
        return tuple(tensors)
    return tuple(x if x is None or x.dtype == torch.float64 else x.double() for x in tensors)


def launch(
    name: str,
    function: Callable[..., bool],
    inputs: Sequence[Tensor | None],  # the first one has the shape of all, (B, ..., D)
    outputs: Sequence[Tensor | None],
    *constants: float,
) -> None:
    """Runs a kernel on rows, each of which is one run of memory; what does not lie so is copied."""
    if function((*inputs, *outputs), *constants):
        return
    like = inputs[0]
    assert like is not None
    shape = like.shape
    columns = shape[-1] if shape else 1

    def flat(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return over_tokens(x, like).expand(shape).resolve_neg().reshape(-1, columns).contiguous()

    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = like.numel() // columns

    def room(y: Tensor | None) -> Tensor | None:
        if y is None:
            return None
        return torch.empty(rows, columns, dtype=y.dtype if y.shape == shape else wide, device=y.device)

    results = [room(y) for y in outputs]
    if not function((*map(flat, inputs), *results), *constants):
        raise RuntimeError(f"{name}: the kernel refused its operands; this is a bug in pyflowmap, please report it")
    for y, result in zip(outputs, results, strict=True):
        if y is not None and result is not None:
            y.copy_(result.view(shape).sum_to_size(over_tokens(y, like).shape).view(y.shape))
