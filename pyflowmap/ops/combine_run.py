"""Runs one checked call of `combine` eagerly: allocates what the caller did not give, copies what no kernel can "
"read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowmap import reference
from pyflowmap.ops import backend
from pyflowmap.ops.combine_call import Call, check_aliasing, has_dense_rows, same_inner_order
from pyflowmap.reference import Combined

copies = 0  # operands copied into a common memory order since import; a copy costs two passes over memory


def layout_source(call: Call) -> Tensor | None:
    """The operand whose memory order all others follow: the first one whose rows are dense."""
    for x in call.inputs or (call.like,):
        if has_dense_rows(x, call.leading):
            return x
    return None


def new_output(call: Call, dtype: torch.dtype) -> Tensor:
    """An empty result in the memory order of the operands."""
    source = layout_source(call)
    if source is None:
        return torch.empty(call.like.shape, dtype=dtype, device=call.like.device)
    return torch.empty_like(source, dtype=dtype)


def new_reductions(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    lead, K, terms = call.like.shape[: call.leading], len(call.matrix), len(call.inputs) + (call.noise is not None)
    empty = lambda *size: torch.empty((*lead, *size), dtype=call.accumulator, device=call.like.device)  # noqa: E731
    return (
        empty(K, K) if call.gram else None,
        empty(K, terms) if call.cross else None,
        empty(K) if call.sums else None,
    )


def run(call: Call, out: Sequence[Tensor | None] | None = None) -> Combined:
    """Runs `call` on the back end of its device. `outputs` holds the stored combinations in order."""
    if out is not None:
        check_aliasing(call.inputs, out, call.leading)
    module = backend.module_for(call.like.device, call.wide)
    if module is None:
        return _run_reference(call, out)
    outputs: list[Tensor | None] = (
        list(out)
        if out is not None
        else [new_output(call, d) if s else None for d, s in zip(call.dtypes, call.store, strict=True)]
    )
    reductions = new_reductions(call)
    noise = call.noise
    options = (
        None if noise is None else _noise_tuple(noise),
        None if call.mask is None else (call.mask.to(call.accumulator), call.mask_matrix),
        call.clamp,
        *reductions,
        call.like,
    )
    if not module.combine(call.inputs, call.matrix, tuple(outputs), call.leading, True, *options):
        inputs, targets = _common_order(call, outputs)
        if not module.combine(inputs, call.matrix, tuple(targets), call.leading, True, *options):
            raise RuntimeError(
                "combine: the compiled kernel refused operands that passed every check; please report this with "
                f"shapes {[tuple(x.shape) for x in inputs]}, strides {[x.stride() for x in inputs]}, leading "
                f"{call.leading}"
            )
        for y, target in zip(outputs, targets, strict=True):
            if y is not None and y is not target:
                y.copy_(target)  # type: ignore[arg-type]
    if out is not None:
        torch.autograd.graph.increment_version([y for y in out if y is not None])
    return Combined(tuple(y for y in outputs if y is not None), *reductions)


def _noise_tuple(noise: reference.Noise) -> tuple[object, ...]:
    seed, stream = noise.seed, noise.stream
    return (
        0 if isinstance(seed, Tensor) else int(seed),
        seed.reshape(()) if isinstance(seed, Tensor) else None,
        0 if isinstance(stream, Tensor) else int(stream),
        stream.reshape(()) if isinstance(stream, Tensor) else None,
        noise.sample_ids,
        noise.sample_dims,
    )


def _common_order(call: Call, outputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Copies the operands whose rows are not in the order of the first dense one; results go through a buffer "
    "likewise."""
    global copies
    dtype = torch.float64 if call.wide else None
    source = layout_source(call)

    def fits(x: Tensor) -> bool:
        dense = has_dense_rows(x, call.leading) and (source is None or same_inner_order(x, source, call.leading))
        return dense and (dtype is None or x.dtype == dtype)

    inputs, targets = [], []
    for x in call.inputs:
        if not fits(x):
            copies += 1
            x = new_output(call, dtype or x.dtype).copy_(x)
        inputs.append(x)
    for y in outputs:
        if y is not None and not fits(y):
            copies += 1
            y = new_output(call, dtype or y.dtype)
        targets.append(y)
    return tuple(inputs), targets


def _run_reference(call: Call, out: Sequence[Tensor | None] | None) -> Combined:
    mask = None if call.mask is None or call.mask_matrix is None else (call.mask, call.mask_matrix)
    result = reference.combine(
        call.inputs,
        call.matrix,  # type: ignore[arg-type]
        leading=call.leading,
        noise=call.noise,
        mask=mask,  # type: ignore[arg-type]
        clamp=call.clamp,
        dtypes=call.dtypes,
        like=call.like,
        gram=call.gram,
        cross=call.cross,
        sums=call.sums,
    )
    stored = [y for y, s in zip(result.outputs, call.store, strict=True) if s]
    if out is not None:
        given = [y for y in out if y is not None]
        for y, value in zip(given, stored, strict=True):
            y.copy_(value)
        stored = given
    return result._replace(outputs=tuple(stored))
