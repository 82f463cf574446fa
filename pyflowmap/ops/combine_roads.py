"""Which road a checked call of `combine` takes: the bare kernel, the kernel and a node on the tape, or the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowmap.ops.combine_call import Call, Matrix
from pyflowmap.ops.combine_operator import apply, flatten, index_of, unflatten
from pyflowmap.ops.combine_run import run
from pyflowmap.reference import Combined


class _Recorded(torch.autograd.Function):
    """What `_Combine` is to a tracer, for a plain eager call: nothing but the tape, a third of the time."""

    @staticmethod
    def forward(ctx, call, index, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, call.like, call.mask)
        bare = lambda matrix: tuple(tuple((scalar, None) for scalar, _ in row) for row in matrix)  # noqa: E731
        ctx.index = index
        ctx.call = call._replace(
            inputs=call.inputs[:0],
            matrix=bare(call.matrix),
            like=None,
            mask=None,
            mask_matrix=call.mask_matrix and bare(call.mask_matrix),
        )
        ctx.count = len(call.inputs)
        return flatten(run(call))

    @staticmethod
    def backward(ctx, *grads):
        from pyflowmap.ops.combine_derivatives import gradients

        *tensors, like, mask = ctx.saved_tensors
        inputs, vectors = tensors[: ctx.count], tensors[ctx.count :]
        (index, mask_index), call = ctx.index, ctx.call

        def with_vectors(matrix: Matrix, places: Sequence[int]) -> Matrix:
            place = iter(places)
            return tuple(
                tuple((scalar, vectors[i] if (i := next(place)) >= 0 else None) for scalar, _ in row) for row in matrix
            )

        call = call._replace(
            inputs=tuple(inputs),
            matrix=with_vectors(call.matrix, index),
            like=like,
            mask=mask,
            mask_matrix=None if call.mask_matrix is None else with_vectors(call.mask_matrix, mask_index),
        )
        static = _Shape(call.store, call.gram, call.cross, call.sums)
        needs = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *gradients(call, vectors, index, unflatten(static, grads), needs[: ctx.count], needs[ctx.count :]),
        )


class _Shape(NamedTuple):
    """What `unflatten` asks of a Static."""

    store: tuple[bool, ...]
    gram: bool
    cross: bool
    sums: bool


def record(call: Call) -> Combined:
    """The eager road with a gradient: one launch and one node on the tape."""
    vectors = call.vectors()
    lead = call.like.shape[: call.leading]
    index = index_of(call.matrix, vectors), index_of(call.mask_matrix or (), vectors)
    wide = [v.expand(lead) if v.ndim == 0 else v for v in vectors]
    flat = _Recorded.apply(call, index, *call.inputs, *wide)
    return unflatten(_Shape(call.store, call.gram, call.cross, call.sums), flat)


def is_watched() -> bool:
    """Whether functorch, forward-mode AD, a dispatch mode or a tracer wants to see every operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def _tensors(call: Call) -> list[Tensor]:
    return [*call.inputs, *call.vectors(), *(() if call.mask is None else (call.mask,))]


def _is_exact(call: Call) -> bool:
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in (*_tensors(call), call.like))


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(call))


def needs_operator(call: Call) -> bool:
    """Whether anyone watches: autograd, functorch, forward-mode AD, a dispatch mode, the tracer, a tensor subclass."""
    return is_watched() or not _is_exact(call) or _needs_grad(call)


def dispatch(call: Call) -> Combined:
    """The road that this call needs."""
    if is_watched() or not _is_exact(call):
        return apply(call)
    return record(call) if _needs_grad(call) else run(call)
