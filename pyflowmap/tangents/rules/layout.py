"""Functions that move elements and compute nothing."""

from __future__ import annotations

import torch
from torch.nn.functional import pad as torch_pad
from torch.nn.functional import unfold as torch_unfold

from ..parts import primal, tangent, tangents
from ..registry import linear, rule

linear(
    "reshape_as", "unflatten", "transpose", "t", "T", "mT", "H", "mH", "adjoint", "permute",
    "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to",
    "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_chunk", "unsafe_split",
    "unbind", "narrow", "select", "diagonal",
    view="yes",
)  # fmt: skip
linear("reshape", "flatten", "ravel", view="reshape")
linear("contiguous", view="self")
linear(torch.Tensor.unfold, view="yes")
linear(torch_unfold)
linear(
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack", "clone", "roll",
    "flip", "fliplr", "flipud", "rot90", "repeat", "tile", "repeat_interleave", "tril", "triu", "diag", "diag_embed",
    "diagflat", "fold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "narrow_copy",
)  # fmt: skip


@rule("view", "view_as", view="yes")
def _view(y, input, *size):
    if tangent(input) is None:  # plain.view_as(dual)
        return None
    if y.dtype != primal(input).dtype:
        raise TypeError(f"x.view({y.dtype}) reads the bits of a Dual, which have no tangent; use x.detach(), or x.to()")
    return tangent(input).reshape(y.shape)  # whose strides need not be those of the primal


@rule("pad", torch.constant_pad_nd)
def _pad(y, input, pad, mode="constant", value=None):
    constant = mode == "constant" or not isinstance(mode, str)  # constant_pad_nd has the number in its place
    return torch_pad(tangent(input), pad) if constant else torch_pad(tangent(input), pad, mode)


def _atleast(function):
    def tangent_of(y, *tensors):
        dxs = tangents(_listed(tensors))
        if len(tensors) == 1 and not isinstance(tensors[0], (list, tuple)):
            return function(dxs[0])  # type: ignore[index]
        return None if dxs is None else function(dxs)

    return tangent_of


for _name in ("atleast_1d", "atleast_2d", "atleast_3d"):
    rule(_name, view="each")(_atleast(getattr(torch, _name)))


@rule("diff")
def _diff(y, input, n=1, dim=-1, prepend=None, append=None):
    if n == 0:  # which gives back x without its ends
        return tangent(input)
    if prepend is None and append is None:
        return torch.diff(tangent(input), n, dim)
    ends = [x for x in (prepend, input, append) if x is not None]
    return torch.diff(torch.cat(tangents(ends), dim), n, dim)  # type: ignore[arg-type]


@rule("meshgrid", view="each")
def _meshgrid(y, *tensors, indexing="ij"):
    return torch.meshgrid(*tangents(_listed(tensors)) or (), indexing=indexing)


@rule("block_diag")
def _block_diag(y, *tensors):
    return torch.block_diag(*tangents(tensors) or ())


@rule("broadcast_tensors", view="each")
def _broadcast_tensors(y, *tensors):
    parts = zip(y, _listed(tensors), strict=True)
    return [None if tangent(x) is None else tangent(x).expand(value.shape) for value, x in parts]


def _listed(tensors):
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
