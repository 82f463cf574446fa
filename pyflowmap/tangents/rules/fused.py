"""The fused functions of `pyflowmap.ops`: value and tangent in one pass."""

from __future__ import annotations

from typing import Any

import torch

from pyflowmap.ops.activation import activation, activation_dual, gated_unit, gated_unit_dual
from pyflowmap.ops.attention import attention, attention_dual
from pyflowmap.ops.gated_residual import gated_residual, gated_residual_dual
from pyflowmap.ops.norm_modulate import norm_modulate, norm_modulate_dual
from pyflowmap.ops.norm_rope import norm_rope, norm_rope_dual
from pyflowmap.ops.time_embedding import time_embedding, time_embedding_dual

from ..parts import primal, primals, tangent
from ..registry import Kind, rule


def _pair(function: Any, operands: tuple[Any, ...], *others: Any, **options: Any) -> Any:
    """(y, dy), recorded for backward where an operand's tangent is."""
    tracked = torch.is_grad_enabled() and any(getattr(x, "tracked", False) for x in operands)
    return function(
        *primals(operands), *others, tangents=tuple(tangent(x) for x in operands), tracked=tracked, **options
    )


@rule(gated_residual, kind=Kind.JOINT)
def _gated_residual(x, gate, h):
    return _pair(gated_residual_dual, (x, gate, h))


@rule(attention, kind=Kind.JOINT)
def _attention(q, k, v, *, mask=None, lengths=None, scale=None, causal=False):
    if tangent(mask) is not None:
        raise NotImplementedError(
            "attention: mask has a tangent, for which there is no rule; pass mask.detach(), or write the attention "
            "with softmax and matmul"
        )
    options = {"mask": primal(mask), "lengths": lengths, "scale": scale, "causal": causal}
    return _pair(attention_dual, (q, k, v), **options)


@rule(norm_modulate, kind=Kind.JOINT)
def _norm_modulate(x, scale, shift, *, kind="layer", eps=1e-6):
    return _pair(norm_modulate_dual, (x, scale, shift), kind=kind, eps=eps)


@rule(activation, kind=Kind.JOINT)
def _activation(x, kind):
    return _pair(activation_dual, (x,), kind)


@rule(gated_unit, kind=Kind.JOINT)
def _gated_unit(a, b, kind):
    return _pair(gated_unit_dual, (a, b), kind)


@rule(norm_rope, kind=Kind.JOINT)
def _norm_rope(x, weight, cos, sin, *, eps=1e-6):
    if tangent(cos) is not None or tangent(sin) is not None:
        raise NotImplementedError(
            "norm_rope: cos or sin has a tangent, for which there is no rule; pass cos.detach() and sin.detach(), or "
            "write the rotation in torch"
        )
    return _pair(norm_rope_dual, (x, weight), primal(cos), primal(sin), eps=eps)


@rule(time_embedding, kind=Kind.JOINT)
def _time_embedding(s, t, frequencies, *, second="span", dtype=None):
    if tangent(frequencies) is not None:
        raise NotImplementedError(
            "time_embedding: frequencies has a tangent, for which there is no rule; pass frequencies.detach()"
        )
    return _pair(time_embedding_dual, (s, t), primal(frequencies), second=second, dtype=dtype)
