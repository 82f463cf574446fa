"""Sums, moments, norms, products, softmax."""

from __future__ import annotations

import math

import torch

from ..parts import primal, tangent
from ..registry import composite, linear, rule
from .alone import of_one
from .ordering import restored

linear("sum", "mean", "cumsum", "trace")
composite("softmin", "normalize")

aten = torch.ops.aten


def _dims(x, dim):
    return tuple(range(x.ndim)) if dim is None or dim == () else dim


def _reduce(terms, dim, keepdim):
    return terms.sum(_dims(terms, dim), keepdim=keepdim)


def _aligned(y, input):
    """dx and x in the value's dtype, which a dtype= or autocast may have set."""
    dx, x = tangent(input), primal(input)
    if x.dtype == y.dtype or (x.is_complex() and not y.is_complex()):
        return dx, x
    return dx.to(y.dtype), x.to(y.dtype)


# ---- sums ----


@rule("nansum")
def _nansum(y, input, dim=None, keepdim=False, *, dtype=None):
    dx, x = _aligned(y, input)
    return _reduce(torch.where(x.isnan(), 0.0, dx), dim, keepdim)


@rule("nanmean")
def _nanmean(y, input, dim=None, keepdim=False, *, dtype=None):
    dx, x = _aligned(y, input)
    there = x.isnan().logical_not()
    return _reduce(torch.where(there, dx, 0.0), dim, keepdim) / _reduce(there, dim, keepdim)


# ---- moments: d var = 2/(n - correction) sum (x - mean) dx ----


def _moment_arguments(dim, unbiased, keepdim, correction):
    """var(x, unbiased), var(x, dim, unbiased, keepdim), var(x, dim, correction=, keepdim=)."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None or unbiased else 0
    return dim, keepdim, correction


def _d_mean(input, dim, keepdim):
    dx = tangent(input)
    return dx.mean(_dims(dx, dim), keepdim=keepdim)


def _d_var(y, input, dim, keepdim, correction):
    dx, x = _aligned(y, input)
    dims = _dims(x, dim)
    mean = x.mean(dims, keepdim=True)
    count = x.numel() // max(mean.numel(), 1)
    product = ((x - mean).conj() * dx).real if x.is_complex() else (x - mean) * dx
    degrees = count - correction
    return _reduce(product, dims, keepdim) * (2.0 / degrees if degrees > 0 else math.inf)  # as torch divides by zero


def _d_std(y, input, dim, keepdim, correction):
    return _quotient(_d_var(y, input, dim, keepdim, correction), y + y)


def _quotient(dx, y):
    """dx / y, zero where y is; its gradient there is zero, too, and not zero times infinity."""
    zero = y == 0
    return (dx / y.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


@rule("var")
def _var(y, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    return _d_var(y, input, *_moment_arguments(dim, unbiased, keepdim, correction))


@rule("std")
def _std(y, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    return _d_std(y, input, *_moment_arguments(dim, unbiased, keepdim, correction))


@rule("var_mean")
def _var_mean(y, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, keepdim, correction = _moment_arguments(dim, unbiased, keepdim, correction)
    return _d_var(y[0], input, dim, keepdim, correction), _d_mean(input, dim, keepdim)


@rule("std_mean")
def _std_mean(y, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, keepdim, correction = _moment_arguments(dim, unbiased, keepdim, correction)
    return _d_std(y[0], input, dim, keepdim, correction), _d_mean(input, dim, keepdim)


# ---- norms: d |x|_p = sum sign(x) (|x| / |x|_p)^(p-1) dx; zero at x = 0, as torch has it ----


def d_norm(y, input, order, dim, keepdim):
    dx, x = _aligned(y, input)
    if x.is_complex():  # the norm of the absolute values
        size = x.abs()
        x, dx = size, torch.where(size == 0, 0.0, (x.conj() * dx).real / size)
    dims = _dims(x, dim)
    if order == 0:
        return None
    if order in (float("inf"), float("-inf")):
        return _d_extreme_norm(y, x, dx, dims, keepdim)
    if order == 1:
        return _reduce(torch.sign(x) * dx, dims, keepdim)
    if order == 2:
        return _quotient(_reduce(x * dx, dims, keepdim), y)
    norm = y if keepdim else restored(y, x, dims)
    zero = (x == 0) | (norm == 0)
    share = (x.abs() / norm).masked_fill(zero, 1.0).pow(order - 1)
    return _reduce(torch.where(zero, 0.0, torch.sign(x) * share * dx), dims, keepdim)


def _d_extreme_norm(y, x, dx, dims, keepdim):
    best = x.abs() == (y if keepdim else restored(y, x, dims))
    return _reduce(torch.where(best, torch.sign(x) * dx, 0.0), dims, keepdim) / _reduce(best, dims, keepdim)


def _refuse_matrix_norm(order):
    raise NotImplementedError(
        f"the matrix norm {order!r} has no tangent rule; the Frobenius norm has one, and every vector norm: "
        "torch.linalg.vector_norm(x, ord, dim)"
    )


@of_one("norm")
def _norm(y, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if isinstance(p, str) and p != "fro":
        _refuse_matrix_norm(p)
    return d_norm(y, input, 2 if p is None or p == "fro" else p, dim, keepdim)


@of_one(torch.linalg.norm)
def _linalg_norm(y, A, ord=None, dim=None, keepdim=False, *, out=None, dtype=None):
    matrix = A.ndim == 2 if dim is None else isinstance(dim, (tuple, list)) and len(dim) == 2
    if ord is not None and matrix and ord != "fro":
        _refuse_matrix_norm(ord)
    return d_norm(y, A, 2 if ord is None or ord == "fro" else ord, dim, keepdim)


@rule("matrix_norm")
def _matrix_norm(y, A, ord="fro", dim=(-2, -1), keepdim=False, *, dtype=None):
    if ord != "fro":
        _refuse_matrix_norm(ord)
    return d_norm(y, A, 2, dim, keepdim)


@of_one("vector_norm")
def _vector_norm(y, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    return d_norm(y, x, ord, dim, keepdim)


# ---- products ----


@rule("prod")
def _prod(y, input, dim=None, keepdim=False, *, dtype=None):
    dx, x = _aligned(y, input)
    if dim is None or x.ndim == 0:
        return (_others(x.reshape(-1), 0) * dx.reshape(-1)).sum()
    return (_others(x, dim) * dx).sum(dim, keepdim=keepdim)


def _others(x, dim):
    """The product of all elements along `dim` but one's own: of those before and of those behind. No division, so
    that zeros are right."""
    if x.shape[dim] == 0:
        return x
    one = torch.ones_like(x.narrow(dim, 0, 1))
    before = torch.cat([one, x.narrow(dim, 0, x.shape[dim] - 1)], dim).cumprod(dim)
    behind = torch.cat([one, x.flip(dim).narrow(dim, 0, x.shape[dim] - 1)], dim).cumprod(dim).flip(dim)
    return before * behind


def _recurred(x, dx, dim):
    """d(y_i) = d(y_(i-1)) x_i + y_(i-1) dx_i, which has a derivative at zeros, too."""
    if x.shape[dim] == 0:
        return dx
    y, dy, parts = torch.ones_like(x.select(dim, 0)), 0.0, []
    for x_i, dx_i in zip(x.unbind(dim), dx.unbind(dim), strict=True):
        dy = dy * x_i + y * dx_i
        y = y * x_i
        parts.append(dy)
    return torch.stack(parts, dim)


@rule("cumprod")
def _cumprod(y, input, dim, *, dtype=None):
    # Before the first zero: y cumsum(dx / x). From there on all products are zero, and their tangents hold the first
    # zero's own: cumprod with dx in its place.
    dx, x = _aligned(y, input)
    if x.ndim == 0:
        return dx
    if input.tracked:
        return _recurred(x, dx, dim)
    zero = x == 0
    first = zero & (zero.cumsum(dim) == 1)
    before = y * (dx / x.masked_fill(zero, 1.0)).cumsum(dim)
    return torch.where(first.cumsum(dim) > 0, torch.where(first, dx, x).cumprod(dim), before)


# ---- softmax ----


@rule("logsumexp")
def _logsumexp(y, input, dim, keepdim=False):
    # sum softmax(x) dx. From y, which is rounded, exp(x - y) would be wrong by |y| eps.
    dx, x = _aligned(y, input)
    if x.ndim == 0 or x.numel() == 0:
        return dx if x.ndim == 0 else torch.zeros_like(y)
    weights = _shifted_exp(x, x.detach().amax(dim, keepdim=True))
    return _quotient(_reduce(weights * dx, dim, keepdim), _reduce(weights, dim, keepdim))


@rule("logcumsumexp")
def _logcumsumexp(y, input, dim):
    # sum_{j <= i} exp(x_j) dx_j / sum_{j <= i} exp(x_j), each prefix with its own largest exponent taken out: a scan,
    # in which sums of 2^k terms are joined to those of the 2^k before.
    dx, x = _aligned(y, input)
    if x.ndim == 0:
        return dx
    wide = torch.float32 if x.itemsize == 2 else x.dtype
    x, dx, count = x.to(wide), dx.to(wide), x.shape[dim]
    top = x.detach()
    weights = _shifted_exp(x, top)
    moved, step = weights * dx, 1
    while step < count:
        head, tail = (0, step), (step, count - step)
        largest = torch.maximum(top.narrow(dim, *tail), top.narrow(dim, 0, count - step))
        own = _shifted_exp(top.narrow(dim, *tail), largest)
        before = _shifted_exp(top.narrow(dim, 0, count - step), largest)
        moved, weights = (
            torch.cat([v.narrow(dim, *head), own * v.narrow(dim, *tail) + before * v.narrow(dim, 0, count - step)], dim)
            for v in (moved, weights)
        )
        top = torch.cat([top.narrow(dim, *head), largest], dim)
        step *= 2
    return _quotient(moved, weights)


def _shifted_exp(x, top):
    """exp(x - top); where all is minus infinity, 0."""
    return torch.exp(x - torch.where(top.isinf(), 0.0, top))


@rule("softmax")
def _softmax(y, input, dim=None, _stacklevel=3, dtype=None):
    return aten._softmax_backward_data(tangent(input).to(y.dtype), y, _softmax_dim(input, dim), y.dtype)


@rule("log_softmax")
def _log_softmax(y, input, dim=None, _stacklevel=3, dtype=None):
    dx = tangent(input).to(y.dtype)
    return dx - (torch.exp(y) * dx).sum(_softmax_dim(input, dim), keepdim=True)


def _softmax_dim(x, dim):
    """torch's choice for functional.softmax(x), which it warns of."""
    return dim if dim is not None else 0 if x.ndim in (0, 1, 3) else 1
