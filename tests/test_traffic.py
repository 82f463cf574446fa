"""Launches and bytes, counted: what a dual block costs where launches are what costs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyflowmap as pfm
from pyflowmap.bench.plain import plain
from pyflowmap.bench.traffic import traffic

BATCH, TOKENS, WIDTH, HEADS = 2, 16, 64, 2


def block():
    torch.manual_seed(0)
    made = pfm.nn.DiTBlock(WIDTH, HEADS, 4)
    cos, sin = pfm.nn.rope_2d(4, 4, WIDTH // HEADS)
    shapes = (BATCH, TOKENS, WIDTH), (BATCH, WIDTH)
    x, e, dx, de = (torch.randn(shape) for shape in (*shapes, *shapes))
    ours, torchs = (lambda x, e, b=b: b(x, e, cos, sin) for b in (made, plain(made)))
    return ours, torchs, (x, e), (dx, de)


def test_counts_what_computes_and_what_it_moves():
    x = torch.zeros(1000)
    counted = traffic(lambda: (x + 1.0).view(10, 100).t().contiguous())
    assert (counted.launches, counted.bytes) == (2, 4 * 4000) and set(counted.by_name) == {"add", "clone"}
    wide = traffic(lambda: torch.zeros(1).expand(1000) * x)  # an expanded operand is read once
    assert wide.bytes == 4 * (1 + 1000 + 1000) + 4  # and the zeros written


def test_a_dual_block_launches_at_most_forty():
    ours, torchs, xs, dxs = block()
    with torch.no_grad():
        forward = traffic(lambda: ours(*xs))
        dual = traffic(lambda: pfm.jvp(ours, xs, dxs))
        with sdpa_kernel(SDPBackend.MATH):
            forward_mode = traffic(lambda: torch.func.jvp(torchs, xs, dxs))
    assert dual.launches <= 40 < 100 < forward_mode.launches
    assert dual.bytes < 2.5 * forward.bytes and dual.bytes < 0.5 * forward_mode.bytes


@pytest.mark.parametrize(
    "name, operands, rows",
    [  # rows: tensors of the stream's size that the contract reads and writes, of value and tangent
        ("norm_modulate", ("stream", "vector", "vector"), 2),
        ("gated_residual", ("stream", "vector", "stream"), 3),
        ("activation", ("stream",), 2),
        ("gated_unit", ("stream", "stream"), 3),
        ("norm_rope", ("heads", "weight"), 2),
    ],
)
def test_a_fused_layer_is_one_launch_at_the_minimum_of_its_bytes(name, operands, rows):
    shapes = {
        "stream": (BATCH, TOKENS, WIDTH),
        "vector": (BATCH, WIDTH),
        "heads": (BATCH, HEADS, TOKENS, WIDTH // HEADS),
        "weight": (WIDTH // HEADS,),
    }
    xs = [torch.randn(shapes[kind]) for kind in operands]
    dxs = [torch.randn(shapes[kind]) for kind in operands]
    cos, sin = pfm.nn.rope_2d(4, 4, WIDTH // HEADS)
    rest = {"activation": ("silu",), "gated_unit": ("silu",), "norm_rope": (cos, sin)}.get(name, ())
    function = lambda *xs: getattr(pfm.ops, name)(*xs, *rest)  # noqa: E731
    with torch.no_grad():
        value = traffic(lambda: function(*xs))
        pair = traffic(lambda: pfm.jvp(function, tuple(xs), tuple(dxs)))
    stream = 4 * BATCH * TOKENS * WIDTH
    small = sum(x.numel() for x in xs if x.numel() * 4 < stream) * 4
    angles = 4 * (cos.numel() + sin.numel()) if name == "norm_rope" else 0
    assert value.launches == pair.launches == 1
    assert value.bytes == rows * stream + small + angles
    assert pair.bytes == 2 * (rows * stream + small) + angles
