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

from pyflowmap.ops.combine_call import STORAGE, Call, Matrix
from pyflowmap.ops.combine_run import new_output, new_reductions, run
from pyflowmap.ops.forward_levels import outer_levels, without_tangents
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


def index_of(matrix: Matrix, vectors: Sequence[Tensor]) -> tuple[int, ...]:
    place = {id(v): i for i, v in enumerate(vectors)}
    return tuple(-1 if v is None else place[id(v)] for row in matrix for _, v in row)


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
        index_of(call.matrix, vectors),
        index_of(call.mask_matrix or (), vectors),
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
    return unflatten(static, flat)


def unflatten(s: Any, flat: Sequence[Any]) -> Combined:
    rest = iter(flat)
    outputs = tuple(next(rest) for kept in s.store if kept)
    return Combined(outputs, *(next(rest) if asked else None for asked in (s.gram, s.cross, s.sums)))


def flatten(result: Combined) -> tuple[Tensor, ...]:
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
        return list(flatten(body(_call(static, inputs, vectors, scalars, like, mask, mask_scalars, field))))

    return function


def _fake(call: Call) -> Combined:
    outputs = tuple(new_output(call, d) for d, s in zip(call.dtypes, call.store, strict=True) if s)
    return Combined(outputs, *new_reductions(call))


_library.impl("combine", _operator(run), "CompositeExplicitAutograd")
torch.library.register_fake("pyflowmap::combine", _operator(_fake), lib=_library)


class _Combine(torch.autograd.Function):
    """(static, seed, stream, scalars, like, mask, mask_scalars, seed_data, stream_data, sample_ids, *inputs,
    *vectors)"""

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
    def restore(ctx, in_jvp: bool = False) -> tuple[Call, Sequence[Tensor]]:
        """The call and its vectors. Asks for the saved tensors once: torch.utils.checkpoint allows no more."""
        s = ctx.static
        scalars, like, mask, mask_scalars, seed_data, stream_data, sample_ids, *tensors = ctx.saved_tensors
        if in_jvp:  # all but numbers, which have no tangent: those that a tracer holds must stay what they are
            like, *tensors = without_tangents((like, *tensors))
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
            call, vectors, s.vector_index, unflatten(s, grads), needs[: s.input_count], needs[s.input_count :]
        )
        return (None,) * 10 + found

    @staticmethod
    def jvp(ctx, *tangents):
        from pyflowmap.ops.combine_derivatives import tangent

        s = ctx.static
        if tangents[5] is not None:
            raise ValueError("combine: mask has no tangent here; detach it, or write it as an operand")
        d_tensors = tangents[10:]
        with outer_levels():
            call, _ = _Combine.restore(ctx, in_jvp=True)
            return flatten(tangent(call, s.vector_index, d_tensors[: s.input_count], d_tensors[s.input_count :]))

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
