"""What the tests of row-wise layers share: shapes and layouts, and value, tangent and gradients by our kernel and by
plain torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyflowmap import _C
from pyflowmap.ops import backend as backends

# x, then a vector: on both sides of the seams (lanes of 16, chunks of 512 columns, warps, blocks, rows read again).
SHAPES = [
    ((2, 3, 1), (2, 1)),
    ((2, 5, 7), (2, 7)),
    ((3, 4, 16), (3, 4, 16)),  # per token
    ((2, 9, 33), (1, 33)),
    ((2, 6, 40), (2, 1, 40)),
    ((3, 6, 40), (1, 6, 40)),  # shared by rows that are apart
    ((4, 24), (4, 24)),
    ((4, 24), (1, 24)),
    ((2, 3, 4, 50), (2, 50)),
    ((2, 3, 4, 50), (2, 3, 1, 50)),  # per frame
    ((2, 3, 4, 50), (2, 1, 4, 50)),
    ((1, 70, 384), (1, 384)),
    ((2, 3, 700), (2, 700)),
    ((1, 3, 3100), (1, 3100)),
    ((1, 2, 6200), (1, 6200)),
    ((0, 3, 8), (0, 8)),
    ((2, 0, 8), (2, 8)),
]
CHEAP = SHAPES[1:5] + SHAPES[8:10]


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise."""
    if layout == "chunk":  # a piece of a wider row, as `chunk(6, -1)` makes
        return torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], -1).chunk(3, -1)[1]
    if layout == "odd":  # rows that begin anywhere
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        return wide[..., 1:-2].copy_(x)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "swapped" and x.dim() > 2:  # (B, T, D) of (T, B, D)
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


@contextmanager
def on(backend: str, **options: object) -> Iterator[None]:
    """A back end; of the emulator with options."""
    with backends.use(backend):
        if backend == "simt":
            backends.simt().set_options(**options)
        try:
            yield
        finally:
            if backend == "simt":
                backends.simt().set_options()


def instruction_sets() -> list[str]:
    names = ("base", "v3", "v4")
    return list(names[: names.index(_C.build()["best_isa"]) + 1])


Results = dict[str, Tensor]


def gradients(
    y: Tensor, leaves: dict[str, Tensor], cotangent: Tensor, dy: Tensor | None, dcotangent: Tensor
) -> Results:
    outputs, with_ = ((y,), (cotangent,)) if dy is None else ((y, dy), (cotangent, dcotangent))
    found = torch.autograd.grad(outputs, tuple(leaves.values()), with_, allow_unused=True)
    return {f"g{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def by_kernel(
    fused: Callable, options: tuple, names: tuple[str, ...], operands, tangents, cotangents, both: bool
) -> Results:
    """y and its gradients; with `both` y, dy and the gradients through both."""
    xs = [x.detach().requires_grad_() for x in operands]
    leaves = dict(zip(names, xs, strict=True))
    if not both:
        y = fused(options, xs)
        return {"y": y.detach(), **gradients(y, leaves, cotangents[0], None, cotangents[1])}
    dxs = [None if dx is None else dx.detach().requires_grad_() for dx in tangents]
    leaves |= {f"d{n}": dx for n, dx in zip(names, dxs, strict=True) if dx is not None}
    y, dy = fused(options, xs, dxs, True)
    return {"y": y.detach(), "dy": dy.detach(), **gradients(y, leaves, cotangents[0], dy, cotangents[1])}


def by_torch(formula: Callable, names: tuple[str, ...], operands, tangents, cotangents, both: bool) -> Results:
    """The same from a formula in plain torch, in the type of the operands."""
    xs = [x.detach().requires_grad_() for x in operands]
    leaves = dict(zip(names, xs, strict=True))
    if not both:
        y = formula(*xs)
        return {"y": y.detach(), **gradients(y, leaves, cotangents[0], None, cotangents[1])}
    dxs = [torch.zeros_like(x) if dx is None else dx.detach() for x, dx in zip(operands, tangents, strict=True)]
    dxs = [dx.requires_grad_() for dx in dxs]
    leaves |= {f"d{n}": dx for n, dx, t in zip(names, dxs, tangents, strict=True) if t is not None}
    y, dy = torch.func.jvp(formula, tuple(xs), tuple(dxs))
    return {"y": y.detach(), "dy": dy.detach(), **gradients(y, leaves, cotangents[0], dy, cotangents[1])}


def wide(tensors):
    return [None if x is None else x.detach().double() for x in tensors]


def worst(found: Results, exact: Results) -> dict[str, float]:
    """The largest error of each result, in units of the largest number of it."""
    assert found.keys() == exact.keys()
    errors = {}
    for name, e in exact.items():
        assert found[name].shape == e.shape, name
        if e.numel():
            largest = float(e.abs().max())
            errors[name] = float((found[name].double() - e).abs().max()) / (largest or 1.0)
            assert errors[name] == errors[name], f"{name} has NaN"
    return errors
