"""Reshaping, joining, indexing, writing at indices, complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tangents.case import Case, normal
from torch import Tensor
from torch.nn import functional as F


def plain() -> tuple[Tensor, ...]:
    return (normal(4, 6),)


def cube() -> tuple[Tensor, ...]:
    return (normal(2, 3, 4),)


def images() -> tuple[Tensor, ...]:
    return (normal(2, 8, 4, 6),)


def pair() -> tuple[Tensor, ...]:
    return (normal(4, 6), normal(4, 6))


ROWS = torch.tensor([2, 0, 0, 3])
PLACES = torch.tensor([[0, 1, 3, 2, 0, 1], [3, 3, 1, 0, 2, 2]])
ONCE = torch.tensor([[0, 1, 3, 2, 0, 1], [3, 2, 1, 0, 2, 3]])
MASK = torch.arange(24).view(4, 6) % 3 > 0


OF_COMPLEX = ["tanh: complex", "sigmoid: complex", "sgn: complex", "acosh: complex", "var: complex", "std: complex"]


def of_complex(function: Callable) -> Callable:
    return lambda x, y: [part(function(torch.complex(x, y))) for part in (torch.real, torch.abs)]


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding in complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def interleaved(x: Tensor) -> Tensor:
    """Rotary embedding written into an empty tensor."""
    angle = torch.arange(12, dtype=x.dtype).view(3, 4)
    out = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * angle.cos() - b * angle.sin()
    out[..., 1::2] = a * angle.sin() + b * angle.cos()
    return out


SHAPES = [
    Case("view", lambda x: x.view(3, -1), plain),
    Case("view_as", lambda x: x.view_as(torch.empty(8, 3)), plain),
    Case("view_as: of a plain tensor", lambda x: torch.ones(x.numel(), dtype=x.dtype).view_as(x) * x, plain),
    Case("reshape", lambda x: x.mT.reshape(4, 6), cube),
    Case("reshape_as", lambda x: x.reshape_as(torch.empty(6, 4)), plain),
    Case("flatten", lambda x: x.flatten(1), cube),
    Case("ravel", lambda x: x.ravel(), cube),
    Case("unflatten", lambda x: x.unflatten(-1, (2, 3)), plain),
    Case("transpose", lambda x: x.transpose(0, 2), cube),
    Case("t", lambda x: x.t(), plain),
    Case("T", lambda x: x.T, plain),
    Case("mT", lambda x: x.mT, cube),
    Case("permute", lambda x: x.permute(2, 0, 1), cube),
    Case("swapaxes", lambda x: torch.swapaxes(x, 0, 1), cube),
    Case("movedim", lambda x: torch.movedim(x, 0, -1), cube),
    Case("squeeze", lambda x: x[:1].squeeze(0), cube),
    Case("unsqueeze", lambda x: x.unsqueeze(1), plain),
    Case("expand", lambda x: x[:, :1].expand(-1, 5), plain),
    Case("expand_as", lambda x: x[:, :1].expand_as(x), plain),
    Case("broadcast_to", lambda x: torch.broadcast_to(x, (2, 4, 6)), plain),
    Case("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), lambda: (normal(4, 1), normal(3))),
    Case("atleast_3d", torch.atleast_3d, plain),
    Case("contiguous", lambda x: x.mT.contiguous(), plain),
    Case("contiguous: channels last", lambda x: x.contiguous(memory_format=torch.channels_last), images),
    Case("clone", lambda x: x.clone(), plain),
    Case("diagonal", lambda x: x.diagonal(1), plain),
    Case("unfold: of a tensor", lambda x: x.unfold(1, 3, 2), plain),
    Case("narrow", lambda x: x.narrow(1, 2, 3), plain),
    Case("select", lambda x: x.select(1, 2), plain),
]

PIECES = [
    Case("chunk", lambda x: x.chunk(3, -1), plain),
    Case("split", lambda x: x.split(4, 1), plain),
    Case("split: sizes", lambda x: torch.split(x, [1, 5], dim=-1), plain),
    Case("split_with_sizes", lambda x: x.split_with_sizes([1, 3]), plain),
    Case("tensor_split", lambda x: x.tensor_split(4, 1), plain),
    Case("unbind", lambda x: x.unbind(1), cube),
    Case("unbind: iteration", lambda x: [*x], cube),
    Case("cat", lambda x, y: torch.cat([x, y], -1), pair),
    Case("cat: a tuple", lambda x, y: torch.cat((x, y), -1), pair),
    Case("stack: a tuple", lambda x, y: torch.stack((x, y, x)), pair),
    Case("cat: one constant", lambda x: torch.cat([x, torch.ones(4, 2, dtype=x.dtype)], dim=1), plain),
    Case("stack", lambda x, y: torch.stack([x, y], 1), pair),
    Case("hstack", lambda x, y: torch.hstack([x, y]), pair),
    Case("vstack", lambda x, y: torch.vstack([x, y]), pair),
    Case("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="xy"), lambda: (normal(3), normal(4))),
    Case("block_diag", lambda x, y: torch.block_diag(x, y), lambda: (normal(2, 3), normal(1, 2))),
    Case("repeat", lambda x: x.repeat(2, 1, 3), plain),
    Case("tile", lambda x: x.tile(2), plain),
    Case("repeat_interleave", lambda x: x.repeat_interleave(3, 1), plain),
    Case(
        "repeat_interleave: counts", lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), 0, output_size=4), plain
    ),
    Case("roll", lambda x: x.roll((1, -2), (0, 1)), plain),
    Case("flip", lambda x: x.flip(1), plain),
    Case("rot90", lambda x: torch.rot90(x), plain),
    Case("tril", lambda x: x.tril(-1), plain),
    Case("triu", torch.triu, plain),
    Case("diag_embed", torch.diag_embed, plain),
    Case("unfold", lambda x: F.unfold(x, 3, padding=1), images),
    Case("fold", lambda x: F.fold(x, (4, 3), 2), lambda: (normal(2, 8, 6),)),
    Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), images),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), images),
    Case("channel_shuffle", lambda x: F.channel_shuffle(x, 4), images),
    *(
        Case(f"pad: {mode}", lambda x, mode=mode: F.pad(x, (1, 2, 1, 0), mode), images)
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Case("pad: value", lambda x: F.pad(x, (1, -1), value=3.0), plain),
]

INDICES = [
    Case("getitem", lambda x: x[1:, ::2], plain),
    Case("getitem: ellipsis", lambda x: x[..., None, -1], cube),
    Case("getitem: indices", lambda x: x[ROWS, 1:3], plain),
    Case("getitem: mask", lambda x: x[MASK], plain, compiled=False),
    Case("gather", lambda x: x.gather(0, PLACES), plain),
    Case("index_select", lambda x: x.index_select(0, ROWS), plain),
    Case("take_along_dim", lambda x: torch.take_along_dim(x, PLACES, 0), plain),
    Case("take", lambda x: x.take(PLACES), plain),
    Case("masked_select", lambda x: x.masked_select(MASK), plain, compiled=False),
    Case("embedding", lambda w: F.embedding(ROWS, w), plain),
    Case("scatter", lambda x, s: x.scatter(0, ONCE, s), lambda: (normal(4, 6), normal(2, 6))),
    Case("scatter: number", lambda x: x.scatter(0, PLACES, 2.0), plain),
    Case("scatter_add", lambda x, s: x.scatter_add(0, PLACES, s), lambda: (normal(4, 6), normal(2, 6))),
    Case("index_add", lambda x, s: x.index_add(0, ROWS, s, alpha=2.0), pair),
    Case("index_copy", lambda x, s: x.index_copy(0, ROWS[1:2], s), lambda: (normal(4, 6), normal(1, 6))),
    Case("index_put", lambda x, s: x.index_put((ROWS,), s, accumulate=True), pair),
    Case("masked_scatter", lambda x, s: x.masked_scatter(MASK, s), pair),
    Case("select_scatter", lambda x, s: torch.select_scatter(x, s, 1, 2), lambda: (normal(4, 6), normal(4))),
    Case("slice_scatter", lambda x, s: torch.slice_scatter(x, s, 1, 0, 6, 2), lambda: (normal(4, 6), normal(4, 3))),
    Case("diagonal_scatter", lambda x, s: torch.diagonal_scatter(x, s), lambda: (normal(4, 6), normal(4))),
    Case("setitem", interleaved, lambda: (normal(2, 3, 8),), func_jvp=False),
]  # fmt: skip

COMPLEX = [
    Case("complex", lambda x, y: torch.complex(x, y).abs(), pair),
    *[Case(name, of_complex(getattr(torch, name.partition(":")[0])), pair) for name in OF_COMPLEX],
    Case("norm: complex", lambda x, y: torch.complex(x, y).norm(3, dim=-1), pair),
    Case("angle", lambda x, y: torch.complex(x, y).angle(), pair),
    Case("polar", lambda r, a: torch.view_as_real(torch.polar(r.exp(), a)), pair),
    Case("view_as_complex", turned, lambda: (normal(2, 3, 8), normal(3, 4)), torch_error=1e-9),
    Case("real", lambda x, y: (torch.complex(x, y).conj() ** 2).real, pair),
    Case("imag", lambda x, y: (torch.complex(x, y) * 1j).imag, pair),
]

CASES = [*SHAPES, *PIECES, *INDICES, *COMPLEX]
