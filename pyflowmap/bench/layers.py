"""The layers around attention and the MLP: one pass over the value and its tangent, beside a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm

import pyflowmap as pfm

from .case import Case, Contestant, case
from .peers import bytes_of, compiled, copy_of
from .plain import _turn

BATCH, TOKENS, WIDTH, HEADS = 4, 256, 384, 6


def _case(function: Callable, plain: Callable, xs: tuple[Any, ...], dxs: tuple[Any, ...], shapes: Any) -> Case:
    """Value and tangent: ours, the same function of torch's operations as Duals, and compiled."""
    ours = torch.no_grad()(lambda: pfm.jvp(function, xs, dxs))
    eager = torch.no_grad()(lambda: pfm.jvp(plain, xs, dxs))

    def with_compiler(compile: Callable) -> Callable:
        pair = compile(lambda *args: pfm.jvp(plain, args[: len(xs)], args[len(xs) :]))
        return torch.no_grad()(lambda: pair(*xs, *dxs))

    made, skipped = compiled("torch's operations, compiled", with_compiler)
    results: tuple[Tensor, ...] = ours()
    tensors = [x for x in (*xs, *dxs, *results) if isinstance(x, Tensor)]
    traffic = bytes_of(*tensors)
    pool = [torch.empty(traffic // 8 + 16) for _ in range(2)]
    return Case(
        [
            Contestant("pfm.jvp of ours", ours),
            Contestant("pfm.jvp of torch's operations", eager),
            *made,
            copy_of(traffic, pool),
        ],
        shapes,
        traffic=traffic,
        skipped=skipped,
        tolerance=1e-4,
        note="Results are allocated on all sides, not by the copy.",
    )


def _stream() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


@case("layers", "layer_norm_modulate", "layer norm and modulation, value and tangent")
def norm_modulate() -> Case:
    def plain(x: Any, scale: Any, shift: Any) -> Any:
        return layer_norm(x, (WIDTH,), eps=1e-6) * (1.0 + scale[:, None]) + shift[:, None]

    vectors = [torch.randn(BATCH, WIDTH) for _ in range(4)]
    xs, dxs = (_stream(), *vectors[:2]), (_stream(), *vectors[2:])
    return _case(pfm.ops.norm_modulate, plain, xs, dxs, {"x": xs[0].shape})


@case("layers", "layer_gated_residual", "gated residual, value and tangent")
def gated_residual() -> Case:
    def plain(x: Any, gate: Any, h: Any) -> Any:
        return x + gate[:, None] * h

    gates = [torch.randn(BATCH, WIDTH) for _ in range(2)]
    xs, dxs = (_stream(), gates[0], _stream()), (_stream(), gates[1], _stream())
    return _case(pfm.ops.gated_residual, plain, xs, dxs, {"x": xs[0].shape})


@case("layers", "layer_gelu", "GELU (tanh), value and tangent")
def activation() -> Case:
    h, dh = torch.randn(BATCH, TOKENS, 4 * WIDTH), torch.randn(BATCH, TOKENS, 4 * WIDTH)

    def plain(x: Any) -> Any:
        return gelu(x, approximate="tanh")

    return _case(lambda x: pfm.ops.activation(x, "gelu_tanh"), plain, (h,), (dh,), {"x": h.shape})


@case("layers", "layer_norm_rope", "qk-norm and rotary positions, value and tangent")
def norm_rope() -> Case:
    qkv, dqkv = (torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS) for _ in range(2))
    x, dx = qkv[:, :, 0].transpose(1, 2), dqkv[:, :, 0].transpose(1, 2)
    weight = torch.ones(WIDTH // HEADS)
    cos, sin = pfm.nn.rope_2d(16, 16, WIDTH // HEADS)

    def plain(x: Any) -> Any:
        return _turn(rms_norm(x, x.shape[-1:], weight, 1e-6), cos, sin)

    return _case(lambda x: pfm.ops.norm_rope(x, weight, cos, sin), plain, (x,), (dx,), {"x": x.shape})
