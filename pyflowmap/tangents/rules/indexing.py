"""Reading and writing at indices. An index has no tangent."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..parts import primal, tangent
from ..registry import constant, linear, rule

linear("getitem", view="index")
linear("gather", "index_select", "take", "take_along_dim", "masked_select")
constant("one_hot", "argwhere", "nonzero", "searchsorted", "bucketize")


@rule(F.embedding)
def _embedding(
    y, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    return F.embedding(input, tangent(weight), padding_idx, None, norm_type, scale_grad_by_freq, sparse)


@rule(torch.embedding)
def _torch_embedding(y, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return torch.embedding(tangent(weight), indices, padding_idx, scale_grad_by_freq, sparse)


# ---- writing: x with source at the index; both tangents take the same way -------------------------------------------


def _or_zeros(x):
    return torch.zeros_like(primal(x)) if tangent(x) is None else tangent(x)


def _scattered(write, input, source, accumulates=False):
    """`write(x, source)` is linear in both; nothing is written where nothing would change."""
    if isinstance(source, (int, float)) or (accumulates and tangent(source) is None):
        return tangent(input) if accumulates else write(_or_zeros(input), 0.0)
    return write(_or_zeros(input), _or_zeros(source).to(primal(input).dtype))


@rule("scatter")
def _scatter(y, input, dim, index, src=None, value=None, *, reduce=None):
    if reduce is not None:
        raise NotImplementedError(f"scatter(reduce={reduce!r}) of a Dual; write scatter_add, or scatter of a product")
    return _scattered(lambda x, s: torch.scatter(x, dim, index, s), input, value if src is None else src)


@rule("scatter_add")
def _scatter_add(y, input, dim, index, src):
    return _scattered(lambda x, s: torch.scatter_add(x, dim, index, s), input, src, True)


@rule("index_add")
def _index_add(y, input, dim, index, source, *, alpha=1):
    return _scattered(lambda x, s: torch.index_add(x, dim, index, s, alpha=alpha), input, source, True)


@rule("index_copy")
def _index_copy(y, input, dim, index, source):
    return _scattered(lambda x, s: torch.index_copy(x, dim, index, s), input, source)


@rule("index_put")
def _index_put(y, input, indices, values, accumulate=False):
    return _scattered(lambda x, s: torch.index_put(x, indices, s, accumulate), input, values, accumulate)


@rule("masked_scatter")
def _masked_scatter(y, input, mask, source):
    return _scattered(lambda x, s: torch.masked_scatter(x, mask, s), input, source)


@rule("select_scatter")
def _select_scatter(y, input, src, dim, index):
    return _scattered(lambda x, s: torch.select_scatter(x, s, dim, index), input, src)


@rule("slice_scatter")
def _slice_scatter(y, input, src, dim=0, start=None, end=None, step=1):
    return _scattered(lambda x, s: torch.slice_scatter(x, s, dim, start, end, step), input, src)


@rule("diagonal_scatter")
def _diagonal_scatter(y, input, src, offset=0, dim1=0, dim2=1):
    return _scattered(lambda x, s: torch.diagonal_scatter(x, s, offset, dim1, dim2), input, src)
