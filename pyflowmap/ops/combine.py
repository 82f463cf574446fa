"""`combine`: any linear update of the field in one pass over memory, with the inner products that come along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowmap.ops.backend import direct
from pyflowmap.ops.combine_call import Call, check_aliasing, check_noise, check_tensor, matrix_of
from pyflowmap.ops.combine_roads import needs_operator
from pyflowmap.ops.combine_run import run
from pyflowmap.ops.combine_split import dispatch_wide
from pyflowmap.reference import Coefficient, Combined, Noise


def combine(
    inputs: Sequence[Tensor],  # J tensors of one shape (*leading, *event)
    coefficients: Sequence[Sequence[Coefficient]],  # K rows of J coefficients, one more with noise
    out: Sequence[Tensor | None] | None = None,  # by keyword from here on (a bare * would cost 0.1 us a call)
    leading: int = 1,
    noise: Noise | None = None,
    mask: tuple[Tensor, Sequence[Sequence[Coefficient]]] | None = None,
    clamp: Sequence[tuple[float, float] | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    store: Sequence[bool] | None = None,
    gram: bool = False,
    cross: bool = False,
    sums: bool = False,
    like: Tensor | None = None,
) -> Any:
    """Row-wise linear combinations of tensors, and their inner products, in one launch.

        Y[k, r] = clamp( sum_j C[k, j, r] X[j, r] + C[k, J, r] N[r] ),     C = A, or A + mask * B
        gram[r, k, l] = <Y_k[r], Y_l[r]>,   cross[r, k, j] = <Y_k[r], X_j[r]>,   sums[r, k] = sum Y_k[r]

    A row r is one index of the first `leading` dimensions (a sample). A coefficient is a number, a tensor of the
    leading shape (or 0-d), or the pair (number, tensor), which multiplies; numbers are applied in float64 and cost no
    device work. Exactly zero never reads its operand (0 * NaN does not arise). Arithmetic is float32 (float64 if all
    operands are); float32, bfloat16 and float16 may be mixed. Sums are deterministic: the same bits for any number of
    threads.

    Args:
        inputs: J tensors; nothing is broadcast. Up to 8 in one launch, more by a fixed rule (ops/combine_split.py).
        coefficients: A, as K rows of J numbers (J + 1 with noise).
        out: K tensors (None = not stored). An out may be exactly one of the inputs; any other overlap raises.
        noise: a normal field drawn inside the kernel, the last column of the matrix.
        mask: (mask, B): an elementwise factor, each of its dimensions equal to the operands' or 1.
        clamp: one (low, high) or None per output. NaN stays NaN.
        dtype: of the results; default: torch's promotion of the inputs.
        store: which of the K combinations are results (default all); the others only enter the inner products.
        like: gives shape, dtype and device where there are no inputs.

    Returns:
        A tuple of the stored combinations; with gram, cross or sums a `Combined(outputs, gram, cross, sums)`.

    Raises:
        TypeError, ValueError: naming the operand, its value and the cure.

    Example:
        >>> x, v = torch.ones(2, 3), torch.ones(2, 3)
        >>> pyflowmap.ops.combine((x, v), ((1.0, 0.5),))[0]
        tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])
    """
    if out is not None and direct.combine(
        inputs, coefficients, out, leading, False, noise, mask, clamp, gram, cross, sums, None, dtype, store
    ):
        return out
    call = _checked(inputs, coefficients, out, leading, noise, mask, clamp, dtype, store, gram, cross, sums, like)
    result = launch(call, out)
    return result if gram or cross or sums else result.outputs


def launch(call: Call, out: Sequence[Tensor | None] | None = None) -> Combined:
    """Runs a checked call on the road that it needs; with `out`, into the caller's tensors."""
    if out is None:
        return dispatch_wide(call)
    if len(call.inputs) <= 8 and len(call.matrix) <= 8 and not needs_operator(call) and all(_is_plain(y) for y in out):
        return run(call, out)
    if all(_has_memory(x) for x in (*call.inputs, *out) if x is not None):
        check_aliasing(call.inputs, out, call.leading)
    result = dispatch_wide(call)
    given = tuple(y for y in out if y is not None)
    for y, value in zip(given, result.outputs, strict=True):
        y.copy_(value)  # autograd records the write, as for any torch function with out= that may record
    return result._replace(outputs=given)


def _has_memory(x: Tensor) -> bool:
    """Whether x has an address to compare: not while tracing or faking, nor inside functorch's wrappers."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _is_plain(y: Tensor | None) -> bool:
    return y is None or not (y.requires_grad and torch.is_grad_enabled())


def _checked(
    inputs: Any,
    coefficients: Any,
    out: Any,
    leading: Any,
    noise: Any,
    mask: Any,
    clamp: Any,
    dtype: Any,
    store: Any,
    gram: bool,
    cross: bool,
    sums: bool,
    like: Any,
) -> Call:
    inputs, K = tuple(inputs), len(coefficients)
    if K == 0:
        raise ValueError("combine: coefficients has no rows, so there is nothing to compute; give one row per output")
    if out is not None:
        if isinstance(out, Tensor) or len(out) != K:
            size = "a tensor" if isinstance(out, Tensor) else f"{len(out)} entries"
            raise ValueError(f"combine: out must be a tuple of {K} tensors, one per row of coefficients, got {size}")
        if store is not None or dtype is not None:
            raise ValueError(
                "combine: out says already what is stored and in which dtype; leave store= and dtype= away"
            )
        out = tuple(out)
        store = tuple(y is not None for y in out)
    first = inputs[0] if inputs else like if like is not None else next((y for y in out or () if y is not None), None)
    if first is None:
        raise ValueError("combine: without inputs, like= or out= must give the shape")
    check_tensor("inputs[0]" if inputs else "like", first, None)
    for j, x in enumerate(inputs):
        check_tensor(f"inputs[{j}]", x, first)
    for k, y in enumerate(out or ()):
        if y is not None:
            check_tensor(f"out[{k}]", y, first)
            if type(y) not in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
                raise TypeError(
                    f"combine: out[{k}] is a {type(y).__name__}, which has no memory of its own to write to; pass "
                    "a plain tensor"
                )
    if not isinstance(leading, int) or not 0 <= leading <= first.ndim:
        raise ValueError(
            f"combine: leading={leading!r} must be between 0 and the number of dimensions of the operands, {first.ndim}"
        )
    noise = None if noise is None else check_noise(noise, first, leading)
    terms = len(inputs) + (noise is not None)
    if terms == 0:
        raise ValueError("combine: there is neither an input nor noise, so there is nothing to combine")
    matrix = matrix_of("coefficients", coefficients, terms, first, leading)
    mask_tensor = mask_matrix = None
    if mask is not None:
        mask_tensor, rows = mask
        if not isinstance(mask_tensor, Tensor):
            raise TypeError(f"combine: mask must be a tensor, got {type(mask_tensor).__name__}")
        fits = mask_tensor.ndim == first.ndim and all(
            a in (1, b) for a, b in zip(mask_tensor.shape, first.shape, strict=True)
        )
        if not fits or mask_tensor.device != first.device:
            raise ValueError(
                f"combine: mask {tuple(mask_tensor.shape)} on {mask_tensor.device} must have the operands' dimensions "
                f"{tuple(first.shape)}, each equal or 1, on {first.device}"
            )
        if mask_tensor.requires_grad:
            raise ValueError("combine: mask has no gradient here; detach it, or write it as an operand")
        mask_matrix = matrix_of("the mask's coefficients", rows, terms, first, leading)
        mask_tensor = mask_tensor.to(torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32)
    if clamp is not None:
        clamp = tuple(None if c is None else (float(c[0]), float(c[1])) for c in clamp)
        if len(clamp) != K:
            raise ValueError(f"combine: clamp needs one (low, high) or None per output, {K} in all, got {len(clamp)}")
        for k, bounds in enumerate(clamp):
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise ValueError(f"combine: clamp[{k}] = {bounds} must have low <= high")
    if out is not None:
        dtypes = tuple(first.dtype if y is None else y.dtype for y in out)
    elif dtype is None or isinstance(dtype, torch.dtype):
        dtypes = (dtype or _promoted(inputs or (first,)),) * K
    else:
        dtypes = tuple(dtype)
        if len(dtypes) != K:
            raise ValueError(f"combine: dtype must be one dtype or one per output, {K} in all, got {len(dtypes)}")
    for d in dtypes:
        if d not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"combine: dtype {d} is not one of float32, bfloat16, float16, float64")
    store = (True,) * K if store is None else tuple(bool(s) for s in store)
    if len(store) != K:
        raise ValueError(f"combine: store needs one flag per output, {K} in all, got {len(store)}")
    if not any(store) and not (gram or cross or sums):
        raise ValueError("combine: nothing is stored and no inner product is asked for")
    return Call(
        inputs, matrix, first, leading, dtypes, store, noise, mask_tensor, mask_matrix, clamp, gram, cross, sums
    )


def _promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype
