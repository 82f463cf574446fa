"""Runs one checked call of `combine` eagerly: allocates what the caller did not give, copies what no kernel can
read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflowmap import reference
from pyflowmap.ops import backend
from pyflowmap.ops.combine_call import Call, Matrix, check_aliasing, has_dense_rows, same_inner_order
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
    call = _plain(call)
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
    if call.like.numel() == 0:  # strides of an empty tensor say nothing; its sums are 0
        return Combined(
            tuple(y for y in outputs if y is not None), *(r if r is None else r.zero_() for r in reductions)
        )
    noise = call.noise
    options = (
        None if noise is None else noise_tuple(noise),
        None if call.mask is None else (call.mask.to(call.accumulator), call.mask_matrix),
        call.clamp,
        *reductions,
        call.like,
    )
    if not module.combine(call.inputs, call.matrix, tuple(outputs), call.leading, True, *options):
        for contiguous in (False, True):
            inputs, targets = _common_order(call, outputs, contiguous)
            simple = _simple_factors(call, contiguous)
            if simple.mask is not None:
                options = (options[0], (simple.mask, simple.mask_matrix), *options[2:])
            if module.combine(inputs, simple.matrix, tuple(targets), call.leading, True, *options):
                break
        else:
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


def _plain(call: Call) -> Call:
    """Operands as torch.Tensor itself: a subclass that adds only methods shares the memory of one."""
    tensors = (*call.inputs, call.like, *call.vectors(), *(() if call.mask is None else (call.mask,)))
    if all([type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors]):  # noqa: C419
        return call
    plain = lambda x: x.as_subclass(Tensor)  # noqa: E731
    matrix = _with_factors(call.matrix, plain)
    return call._replace(
        inputs=tuple(plain(x) for x in call.inputs),
        like=plain(call.like),
        matrix=matrix,
        mask=None if call.mask is None else plain(call.mask),
        mask_matrix=None if call.mask_matrix is None else _with_factors(call.mask_matrix, plain),
    )


def _with_factors(matrix: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    return tuple(tuple((s, None if v is None else change(v)) for s, v in row) for row in matrix)


def _simple_factors(call: Call, contiguous: bool) -> Call:
    """Per-row factors contiguous, and the mask too where the kernel cannot step over its leading dimensions."""
    dense = lambda v: v.contiguous()  # noqa: E731
    mask = call.mask
    if mask is not None:
        lead = call.like.shape if contiguous else call.like.shape[: call.leading] + mask.shape[call.leading :]
        mask = mask.to(call.accumulator).expand(lead).contiguous()
    return call._replace(
        matrix=_with_factors(call.matrix, dense),
        mask=mask,
        mask_matrix=None if call.mask_matrix is None else _with_factors(call.mask_matrix, dense),
    )


def noise_tuple(noise: reference.Noise) -> tuple[object, ...]:
    seed, stream = noise.seed, noise.stream
    return (
        0 if isinstance(seed, Tensor) else int(seed),
        seed.reshape(()) if isinstance(seed, Tensor) else None,
        0 if isinstance(stream, Tensor) else int(stream),
        stream.reshape(()) if isinstance(stream, Tensor) else None,
        noise.sample_ids,
        noise.sample_dims,
    )


def _common_order(
    call: Call, outputs: Sequence[Tensor | None], contiguous: bool = False
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Copies the operands whose rows are not in the order of the first dense one; results go through a buffer
    likewise."""
    global copies
    dtype = torch.float64 if call.wide else None
    source = None if contiguous else layout_source(call)

    def fresh(kind: torch.dtype) -> Tensor:
        if contiguous:
            return torch.empty(call.like.shape, dtype=kind, device=call.like.device)
        return new_output(call, kind)

    def fits(x: Tensor) -> bool:
        if contiguous:
            return x.is_contiguous() and (dtype is None or x.dtype == dtype)
        dense = has_dense_rows(x, call.leading) and (source is None or same_inner_order(x, source, call.leading))
        return dense and (dtype is None or x.dtype == dtype)

    inputs, targets = [], []
    for x in call.inputs:
        if not fits(x):
            copies += 1
            x = fresh(dtype or x.dtype).copy_(x)
        inputs.append(x)
    for y in outputs:
        if y is not None and not fits(y):
            copies += 1
            y = fresh(dtype or y.dtype)
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
