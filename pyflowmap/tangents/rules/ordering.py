"""Largest, smallest, sorted: the tangent of an element that torch gives by index is gathered there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import primal, tangent
from ..registry import constant, rule
from .selection import maximum, minimum

constant("argmax", "argmin", "argsort", "argwhere", "nonzero", "searchsorted", "bucketize", "count_nonzero")


def _gathered(y, input, dim):
    return torch.gather(tangent(input), dim, y[1]) if y[1].ndim else tangent(input), None


def _at(y, input, dim, keepdim):
    """The tangents of (values, indices) where the dimension may have gone."""
    dx, indices = tangent(input), y[1]
    if dx.ndim == 0:
        return dx, None
    if keepdim:
        return torch.gather(dx, dim, indices), None
    return torch.gather(dx, dim, indices.unsqueeze(dim)).squeeze(dim), None


def shared(y, input, dim=None, keepdim=False):
    """The tangent of an extremum; of equals, each has the same part in it."""
    x, dx = primal(input), tangent(input)
    dim = tuple(range(x.ndim)) if dim is None or dim == () else dim
    if dim == ():
        return dx
    if not keepdim:
        y = restored(y, x, dim)
    best = (x == y) | (x.isnan() & y.isnan())
    return torch.where(best, dx, 0.0).sum(dim, keepdim=keepdim) / best.sum(dim, keepdim=keepdim)


def restored(y, x, dim):
    """y with the dimensions of x back, of size 1, over which it was reduced."""
    if x.ndim == 0:
        return y
    dims = (dim,) if isinstance(dim, int) else dim
    for each in sorted(d % x.ndim for d in dims):
        y = y.unsqueeze(each)
    return y


@rule("sort")
def _sort(y, input, dim=-1, descending=False, *, stable=False):
    return _gathered(y, input, dim)


@rule("topk")
def _topk(y, input, k, dim=-1, largest=True, sorted=True):
    return _gathered(y, input, dim)


@rule("msort")
def _msort(y, input):
    return torch.gather(tangent(input), 0, torch.argsort(primal(input), dim=0, stable=True))


@rule("cummax", "cummin")
def _cummax(y, input, dim):
    return _gathered(y, input, dim)


@rule("kthvalue")
def _kthvalue(y, input, k, dim=-1, keepdim=False):
    return _at(y, input, dim, keepdim)


@rule("mode")
def _mode(y, input, dim=-1, keepdim=False):
    return _at(y, input, dim, keepdim)


@rule("amax", "amin")
def _amax(y, input, dim=(), keepdim=False):
    return shared(y, input, dim, keepdim)


@rule("aminmax")
def _aminmax(y, input, *, dim=None, keepdim=False):
    return shared(y[0], input, dim, keepdim), shared(y[1], input, dim, keepdim)


@rule("median", "nanmedian")
def _median(y, input, dim=None, keepdim=False):
    return shared(y, input) if dim is None else _at(y, input, dim, keepdim)


@rule("max")
def _max(y, input, dim=None, keepdim=False, *, other=None):
    return _extremum(y, input, other if dim is None else dim, keepdim, maximum)


@rule("min")
def _min(y, input, dim=None, keepdim=False, *, other=None):
    return _extremum(y, input, other if dim is None else dim, keepdim, minimum)


def _extremum(y, input, dim, keepdim, of_two):
    if dim is None:
        return shared(y, input)
    if isinstance(primal(dim), Tensor):  # max(x, other)
        return of_two(y, input, dim)
    return _at(y, input, dim, keepdim)
