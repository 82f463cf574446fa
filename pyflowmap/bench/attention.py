"""Attention with a tangent, and the backward passes through the value and through both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import pyflowmap as pfm

from .case import Case, Contestant, Target, case

fused: Any = scaled_dot_product_attention
SHAPE = (4, 6, 256, 64)  # batch, heads, tokens, channels per head: DiT-S


def _inputs(shape: tuple[int, ...] = SHAPE) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(torch.randn(shape) for _ in range(3)), tuple(torch.randn(shape) for _ in range(3))


def _math(function: Callable) -> Callable:
    def run() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function()

    return run


def _forward(xs: tuple[Tensor, ...], slower: float) -> Contestant:
    run = torch.no_grad()(lambda: (fused(*xs), None)[1])
    note = "2 matrix products of 6"
    return Contestant("torch's fused attention, forward alone", run, Target(slower=slower), role="limit", note=note)


def _pair_case(shape: tuple[int, ...], slower: float, note: str) -> Case:
    xs, dxs = _inputs(shape)
    ours = torch.no_grad()(lambda: pfm.jvp(pfm.ops.attention, xs, dxs))
    theirs = torch.no_grad()(lambda: torch.func.jvp(scaled_dot_product_attention, xs, dxs))
    return Case(
        [
            Contestant("pfm.jvp(pfm.ops.attention)", ours),
            _forward(xs, slower),
            Contestant("torch.func.jvp, math attention", _math(theirs), note="forms the matrices"),
        ],
        {"q, k, v and tangents": shape},
        tolerance=1e-4,
        note=note,
    )


@case("attention", "attention_jvp", "attention, value and tangent")
def attention_jvp() -> Case:
    return _pair_case(SHAPE, 3.2, "3.0 is the limit: six products instead of two.")


@case("attention", "attention_jvp_long", "attention, value and tangent, 2048 tokens")
def attention_jvp_long() -> Case:
    return _pair_case((1, 4, 2048, 64), 3.2, "The matrices of one head are 16 MB each.")


@case("attention", "attention_forward", "attention, value alone, no grad")
def attention_forward() -> Case:
    xs, _ = _inputs()
    return Case(
        [
            Contestant("pfm.ops.attention", torch.no_grad()(lambda: pfm.ops.attention(*xs))),
            Contestant("torch's fused attention", torch.no_grad()(lambda: fused(*xs))),
        ],
        {"q, k, v": SHAPE},
        tolerance=1e-4,
    )


@case("attention", "attention_backward", "attention, value recorded, and backward")
def attention_backward() -> Case:
    xs, _ = _inputs()
    xs = tuple(x.requires_grad_() for x in xs)
    g = torch.randn(SHAPE)
    with_grad = lambda function: lambda: torch.autograd.grad(function(*xs), xs, g)  # noqa: E731
    return Case(
        [
            Contestant("pfm.ops.attention", with_grad(pfm.ops.attention)),
            Contestant("torch's fused attention", with_grad(scaled_dot_product_attention)),
        ],
        {"q, k, v": SHAPE},
        tolerance=1e-4,
    )


@case("attention", "attention_backward_both", "attention, value and tangent, backward through both")
def attention_backward_both() -> Case:
    xs, dxs = _inputs()
    xs, dxs = (tuple(x.requires_grad_() for x in group) for group in (xs, dxs))
    g, dg = torch.randn(SHAPE), torch.randn(SHAPE)

    def ours() -> Any:
        return torch.autograd.grad(pfm.jvp(pfm.ops.attention, xs, dxs, track_tangent=True), (*xs, *dxs), (g, dg))

    def theirs() -> Any:
        return torch.autograd.grad(torch.func.jvp(scaled_dot_product_attention, xs, dxs), (*xs, *dxs), (g, dg))

    return Case(
        [
            Contestant("pfm.jvp, track_tangent=True", ours),
            Contestant("torch.func.jvp, math attention", _math(theirs), note="forms the matrices, keeps them"),
        ],
        {"q, k, v and tangents": SHAPE},
        tolerance=1e-4,
        note="6 products forward, 15 backward.",
    )
