"""The operator road of `combine`: a torch operator with a fake implementation under an autograd.Function that knows its
gradient, its tangent and its vmap.

Dynamo would inline the Function's forward and drop the tangent rule without a word, so the call is opaque to it
(`torch.compiler.allow_in_graph`). What is differentiated here is again written as `combine`s, hence differentiable.

With C[k, j] the coefficients (per row), T = J inputs and perhaps noise, cotangents gY, gG, gX (of the cross Gram):

    L_k  = gY_k + sum_i P[k, i] X_i           P = (gG + gG') C + gX         everything that reaches Y_k
    gX_j = sum_k C[k, j] L_k + gX[k, j] Y_k   gC[k, j] = <L_k, X_j>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowmap.ops.combine_call import STORAGE, Call, Entry, Matrix
from pyflowmap.ops.combine_run import new_output, new_reductions, run
from pyflowmap.reference import Combined, Noise

_SCHEMA = (
    "combine(Tensor[] inputs, Tensor[] vectors, Tensor scalars, Tensor like, Tensor? mask, Tensor? mask_scalars, "
    "SymInt seed, Tensor? seed_data, SymInt stream, Tensor? stream_data, Tensor? sample_ids, bool noise, int "
    "sample_dims, "
    "int leading, int[] vector_index, int[] mask_vector_index, bool[] clamped, float[] bounds, int[] dtypes, "
    "bool[] store, "
    "bool gram, bool cross, bool sums) -> Tensor[]"
)


class Static(NamedTuple):
    """What a compiled graph may hold as a constant."""

    input_count: int  # the tensors after the inputs are the per-row factors
    noise: bool
    sample_dims: int
    leading: int
    vector_index: tuple[int, ...]  # K x T; -1 is "no factor"
    mask_vector_index: tuple[int, ...]
    clamped: tuple[bool, ...]
    bounds: tuple[float, ...]
    dtypes: tuple[int, ...]
    store: tuple[bool, ...]
    gram: bool
    cross: bool
    sums: bool


# ---- Call <-> arguments of the operator -----------------------------------------------------------------------------


def host_scalars(matrix: Matrix) -> Tensor:
    """The host factors as a float64 CPU tensor (K, T): a new step size is then a new value, not a new graph."""
    flat = [scalar for row in matrix for scalar, _ in row]
    if torch.compiler.is_compiling() or any(isinstance(s, Tensor) for s in flat):
        # basis * number is the one form in which the tracer keeps a float symbolic; torch.full would bake it in
        one = torch.ones((), dtype=torch.float64)
        columns = [s.to(torch.float64).reshape(()) if isinstance(s, Tensor) else one * s for s in flat]
        return torch.stack(columns).reshape(len(matrix), -1)
    return torch.tensor(flat, dtype=torch.float64).reshape(len(matrix), -1)


def _is_known(scalars: Tensor) -> bool:
    return (
        type(scalars) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(scalars)
    )


def _matrix(scalars: Tensor, index: Sequence[int], vectors: Sequence[Tensor]) -> Matrix:
    K, T = scalars.shape
    values: Any = scalars.tolist() if _is_known(scalars) else scalars
    return tuple(
        tuple((values[k][j], vectors[index[k * T + j]] if index[k * T + j] >= 0 else None) for j in range(T))
        for k in range(K)
    )


def _call(
    s: Static,
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    scalars: Tensor,
    like: Tensor,
    mask: Tensor | None,
    mask_scalars: Tensor | None,
    noise: Noise | None,
) -> Call:
    clamp = tuple((s.bounds[2 * k], s.bounds[2 * k + 1]) if c else None for k, c in enumerate(s.clamped))
    return Call(
        inputs=tuple(inputs),
        matrix=_matrix(scalars, s.vector_index, vectors),
        like=like,
        leading=s.leading,
        dtypes=tuple(STORAGE[d] for d in s.dtypes),
        store=s.store,
        noise=noise,
        mask=mask,
        mask_matrix=None if mask_scalars is None else _matrix(mask_scalars, s.mask_vector_index, vectors),
        clamp=clamp if any(s.clamped) else None,
        gram=s.gram,
        cross=s.cross,
        sums=s.sums,
    )


def _signed(value: int) -> int:
    if isinstance(value, int):
        return (value + 2**63) % 2**64 - 2**63
    return value  # symbolic: within int64 already


def apply(call: Call) -> Combined:
    """The differentiable, traceable road."""
    vectors = call.vectors()
    lead = call.like.shape[: call.leading]
    noise = call.noise or Noise(0)
    clamp = call.clamp or (None,) * len(call.matrix)
    static = Static(
        len(call.inputs),
        call.noise is not None,
        noise.sample_dims,
        call.leading,
        _index_of(call.matrix, vectors),
        _index_of(call.mask_matrix or (), vectors),
        tuple(c is not None for c in clamp),
        tuple(float(b) for c in clamp for b in (c or (0.0, 0.0))),
        tuple(STORAGE.index(d) for d in call.dtypes),
        call.store,
        call.gram,
        call.cross,
        call.sums,
    )
    seed, stream = noise.seed, noise.stream
    flat = _apply(
        tuple(static),
        0 if isinstance(seed, Tensor) else _signed(seed),
        0 if isinstance(stream, Tensor) else stream,
        host_scalars(call.matrix),
        call.like,
        call.mask,
        None if call.mask_matrix is None else host_scalars(call.mask_matrix),
        seed.reshape(()) if isinstance(seed, Tensor) else None,
        stream.reshape(()) if isinstance(stream, Tensor) else None,
        noise.sample_ids,
        *call.inputs,
        *(v.expand(lead) if v.ndim == 0 else v for v in vectors),
    )
    return _unflatten(static, flat)


def _unflatten(s: Any, flat: Sequence[Any]) -> Combined:
    rest = iter(flat)
    outputs = tuple(next(rest) for kept in s.store if kept)
    return Combined(outputs, *(next(rest) if asked else None for asked in (s.gram, s.cross, s.sums)))


def _flatten(result: Combined) -> tuple[Tensor, ...]:
    return (*result.outputs, *(r for r in result[1:] if r is not None))


@torch.compiler.allow_in_graph
def _apply(static: tuple[Any, ...], *args: Any) -> tuple[Tensor, ...]:
    return _Combine.apply(static, *args)


# ---- the torch operator ---------------------------------------------------------------------------------------------

_library = torch.library.Library("pyflowmap", "FRAGMENT")
_library.define(_SCHEMA)


def _operator(body: Callable[[Call], Combined]) -> Callable[..., list[Tensor]]:
    def function(
        inputs,
        vectors,
        scalars,
        like,
        mask,
        mask_scalars,
        seed,
        seed_data,
        stream,
        stream_data,
        sample_ids,
        noise,
        sample_dims,
        leading,
        vector_index,
        mask_vector_index,
        clamped,
        bounds,
        dtypes,
        store,
        gram,
        cross,
        sums,
    ):
        static = Static(
            len(inputs),
            noise,
            sample_dims,
            leading,
            tuple(vector_index),
            tuple(mask_vector_index),
            tuple(clamped),
            tuple(bounds),
            tuple(dtypes),
            tuple(store),
            gram,
            cross,
            sums,
        )
        field = (
            Noise(
                seed if seed_data is None else seed_data,
                stream if stream_data is None else stream_data,
                sample_ids,
                sample_dims,
            )
            if noise
            else None
        )
        return list(_flatten(body(_call(static, inputs, vectors, scalars, like, mask, mask_scalars, field))))

    return function


def _fake(call: Call) -> Combined:
    outputs = tuple(new_output(call, d) for d, s in zip(call.dtypes, call.store, strict=True) if s)
    return Combined(outputs, *new_reductions(call))


_library.impl("combine", _operator(run), "CompositeExplicitAutograd")
torch.library.register_fake("pyflowmap::combine", _operator(_fake), lib=_library)


class _Combine(torch.autograd.Function):
    """(static, seed, stream, scalars, like, mask, mask_scalars, seed_data, stream_data, sample_ids, *inputs, "
    "*vectors)"""

    @staticmethod
    def forward(static, seed, stream, scalars, like, mask, mask_scalars, seed_data, stream_data, sample_ids, *tensors):
        s = Static(*static)
        flat = torch.ops.pyflowmap.combine(
            tensors[: s.input_count],
            tensors[s.input_count :],
            scalars,
            like,
            mask,
            mask_scalars,
            seed,
            seed_data,
            stream,
            stream_data,
            sample_ids,
            s.noise,
            s.sample_dims,
            s.leading,
            s.vector_index,
            s.mask_vector_index,
            s.clamped,
            s.bounds,
            s.dtypes,
            s.store,
            s.gram,
            s.cross,
            s.sums,
        )
        return tuple(flat)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        static, seed, stream, *tensors = inputs
        ctx.static, ctx.seed, ctx.stream = Static(*static), seed, stream
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def restore(ctx) -> tuple[Call, Sequence[Tensor]]:
        """The call and its vectors. Asks for the saved tensors once: torch.utils.checkpoint allows no more."""
        s = ctx.static
        scalars, like, mask, mask_scalars, seed_data, stream_data, sample_ids, *tensors = ctx.saved_tensors
        noise = Noise(
            ctx.seed if seed_data is None else seed_data,
            ctx.stream if stream_data is None else stream_data,
            sample_ids,
            s.sample_dims,
        )
        inputs, vectors = tensors[: s.input_count], tensors[s.input_count :]
        return _call(s, inputs, vectors, scalars, like, mask, mask_scalars, noise if s.noise else None), vectors

    @staticmethod
    def backward(ctx, *grads):
        from pyflowmap.ops.combine_derivatives import gradients

        s = ctx.static
        needs = ctx.needs_input_grad[10:]
        call, vectors = _Combine.restore(ctx)
        found = gradients(
            call, vectors, s.vector_index, _unflatten(s, grads), needs[: s.input_count], needs[s.input_count :]
        )
        return (None,) * 10 + found

    @staticmethod
    def jvp(ctx, *tangents):
        from pyflowmap.ops.combine_derivatives import tangent

        s = ctx.static
        if tangents[5] is not None:
            raise ValueError("combine: mask has no tangent here; detach it, or write it as an operand")
        call, _ = _Combine.restore(ctx)
        d_tensors = tangents[10:]
        return _flatten(tangent(call, s.vector_index, d_tensors[: s.input_count], d_tensors[s.input_count :]))

    @staticmethod
    def vmap(
        info,
        in_dims,
        static,
        seed,
        stream,
        scalars,
        like,
        mask,
        mask_scalars,
        seed_data,
        stream_data,
        sample_ids,
        *tensors,
    ):
        s = Static(*static)
        if s.noise:
            raise ValueError(
                "combine: noise inside torch.func.vmap has no sample ids; draw it outside with "
                "pfm.evaluate(pfm.noise(...))"
            )
        size = info.batch_size

        def batched(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            return x.movedim(dim, 0) if dim is not None else x.unsqueeze(0).expand(size, *x.shape)

        dims = in_dims[10:]
        flat = _apply(
            tuple(s._replace(leading=s.leading + 1)),
            seed,
            stream,
            scalars,
            batched(like, in_dims[4]),
            batched(mask, in_dims[5]),
            mask_scalars,
            seed_data,
            stream_data,
            sample_ids,
            *(batched(x, d) for x, d in zip(tensors, dims, strict=True)),
        )
        return flat, (0,) * len(flat)


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
        return _flatten(run(call))

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
            *gradients(call, vectors, index, _unflatten(static, grads), needs[: ctx.count], needs[ctx.count :]),
        )


class _Shape(NamedTuple):
    """What `_unflatten` asks of a Static."""

    store: tuple[bool, ...]
    gram: bool
    cross: bool
    sums: bool


def _index_of(matrix: Matrix, vectors: Sequence[Tensor]) -> tuple[int, ...]:
    place = {id(v): i for i, v in enumerate(vectors)}
    return tuple(-1 if v is None else place[id(v)] for row in matrix for _, v in row)


def record(call: Call) -> Combined:
    """The eager road with a gradient: one launch and one node on the tape."""
    vectors = call.vectors()
    lead = call.like.shape[: call.leading]
    index = _index_of(call.matrix, vectors), _index_of(call.mask_matrix or (), vectors)
    wide = [v.expand(lead) if v.ndim == 0 else v for v in vectors]
    flat = _Recorded.apply(call, index, *call.inputs, *wide)
    return _unflatten(_Shape(call.store, call.gram, call.cross, call.sums), flat)


def _is_watched() -> bool:
    """Whether functorch, forward-mode AD, a dispatch mode or a tracer wants to see every operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _tensors(call: Call) -> list[Tensor]:
    return [*call.inputs, *call.vectors(), *(() if call.mask is None else (call.mask,))]


def _is_exact(call: Call) -> bool:
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in (*_tensors(call), call.like))


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(call))


def needs_operator(call: Call) -> bool:
    """Whether anyone watches: autograd, functorch, forward-mode AD, a dispatch mode, the tracer, a tensor subclass."""
    return _is_watched() or not _is_exact(call) or _needs_grad(call)


def dispatch(call: Call) -> Combined:
    """The road that this call needs."""
    if _is_watched() or not _is_exact(call):
        return apply(call)
    return record(call) if _needs_grad(call) else run(call)


__all__ = ["Entry", "apply", "dispatch", "needs_operator", "record"]
