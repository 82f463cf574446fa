"""<Y, Y> per row of one combination Y = sum_j c_j X_j: the inner product that every loss is made of, on a short road.

    value      one launch reads the X_j and stores one number per row
    gradient   dX_j = 2 g c_j Y, one more launch; Y is never stored

The same kernel, and the same bits, as `combine(..., gram=True)`, which takes whatever this road refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflowmap.ops.backend import direct
from pyflowmap.ops.combine_call import Call
from pyflowmap.ops.combine_derivatives import gradients
from pyflowmap.reference import Combined

_empty, _empty_like = torch.empty, torch.empty_like


def squared_norm(inputs: tuple[Tensor, ...], coefficients: tuple[Any, ...]) -> Tensor | None:
    """(B,) numbers, or None where `combine` must look at the call. A coefficient is a float or (float, tensor (B,))."""
    first = inputs[0]
    if type(first) is not Tensor and type(first) is not torch.nn.Parameter:
        return None
    if first.ndim == 0:
        return None
    vectors = [c[1] for c in coefficients if type(c) is tuple]
    recorded = torch.is_grad_enabled()
    if recorded and any([v.requires_grad for v in vectors]):  # noqa: C419
        return None
    kind = torch.float64 if first.dtype == torch.float64 else torch.float32
    gram = _empty(first.shape[0], dtype=kind, device=first.device)
    with torch.no_grad():
        row = (coefficients,)
        if not direct.combine(inputs, row, (None,), 1, False, None, None, None, gram, False, False, first):
            return None
    if recorded and any([x.requires_grad for x in inputs]):  # noqa: C419
        return _SquaredNorm.apply(gram, coefficients, len(inputs), *inputs, *vectors)
    return gram


class _SquaredNorm(torch.autograd.Function):
    """The node of a value that is there already."""

    @staticmethod
    def forward(ctx, gram, coefficients, count, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.scalars = [c[0] if type(c) is tuple else c for c in coefficients]
        ctx.places = [type(c) is tuple for c in coefficients]
        ctx.count = count
        return gram.view(gram.shape)

    @staticmethod
    def backward(ctx, g):
        inputs, vectors = ctx.saved_tensors[: ctx.count], iter(ctx.saved_tensors[ctx.count :])
        factors = [next(vectors) if there else None for there in ctx.places]
        wanted = [j for j in range(ctx.count) if ctx.needs_input_grad[3 + j]]
        scaled: list[Any] = [None] * ctx.count if torch.is_grad_enabled() else _times(g, factors)
        found: list[Tensor | None] | None = None
        if not torch.is_grad_enabled() and all([factors[j] is None for j in wanted]):  # noqa: C419
            rows = tuple([tuple([(2.0 * ctx.scalars[j] * c, w) for c, w in zip(ctx.scalars, scaled)]) for j in wanted])
            outputs = tuple([_empty_like(inputs[j]) for j in wanted])
            if direct.combine(inputs, rows, outputs, 1, False):
                found = [None] * ctx.count
                for j, value in zip(wanted, outputs, strict=True):
                    found[j] = value
        if found is None:
            found = _general(inputs, ctx.scalars, factors, g, ctx.needs_input_grad[3 : 3 + ctx.count])
        return (None, None, None, *found, *[None] * sum(ctx.places))


def _times(g: Tensor, factors: list[Tensor | None]) -> list[Tensor]:
    """g, or g times the per-row factor; each product once."""
    made: dict[int, Tensor] = {}
    for v in factors:
        if v is not None and id(v) not in made:
            made[id(v)] = g * v
    return [g if v is None else made[id(v)] for v in factors]


def _general(inputs: Any, scalars: list[float], factors: list[Any], g: Tensor, needs: Any) -> list[Tensor | None]:
    """By the derivative of `combine`, which can be differentiated again."""
    lead = inputs[0].shape[:1]
    factors = [v.expand(lead) if v is not None and v.ndim == 0 else v for v in factors]
    call = Call(
        tuple(inputs), (tuple(zip(scalars, factors, strict=True)),), inputs[0], 1, (g.dtype,), (False,), gram=True
    )
    vectors = call.vectors()
    places = {id(v): i for i, v in enumerate(vectors)}
    index = [-1 if v is None else places[id(v)] for v in factors]
    grads = Combined((), g[:, None, None], None, None)
    return list(gradients(call, vectors, index, grads, needs, [False] * len(vectors))[: len(inputs)])
