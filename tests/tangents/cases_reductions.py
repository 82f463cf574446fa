"""Sums, moments, norms, products, extrema, softmax."""

from __future__ import annotations

from typing import Any

import torch
from tangents.case import Case, normal
from torch.nn import functional as F


def plain() -> tuple[Any, ...]:
    return (normal(3, 4),)


def cube() -> tuple[Any, ...]:
    return (normal(2, 3, 4),)


def with_zeros() -> tuple[Any, ...]:
    x = normal(4, 5)
    x[0, 2] = x[1, 1] = x[1, 3] = 0.0
    return (x,)


SUMS = [
    Case("sum", torch.sum, plain),
    Case("sum: dims", lambda x: x.sum((0, 2), keepdim=True), cube),
    Case("mean", lambda x: x.mean(), plain),
    Case("mean: dim", lambda x: x.mean(-1), cube),
    Case("nansum", lambda x: torch.nansum(x, 1), plain),
    Case("nanmean", lambda x: torch.nanmean(x, 1), plain),
    Case("cumsum", lambda x: x.cumsum(1), plain),
    Case("trace", torch.trace, plain),
    Case("diff", torch.diff, plain),
    Case("diff: ends", lambda x, a, b: torch.diff(x, 1, 0, a, b), lambda: (normal(3, 4), normal(1, 4), normal(2, 4))),
    Case("diff: none", lambda x, a: torch.diff(x, 0, 0, a), lambda: (normal(3, 4), normal(1, 4))),
    Case("diff: a constant end", lambda x: torch.diff(x, prepend=torch.ones(3, 1, dtype=x.dtype)), plain),
]

MOMENTS = [
    Case("var", torch.var, plain),
    Case("var: biased", lambda x: x.var(False), plain),
    Case("var: dims", lambda x: x.var((0, 2), unbiased=False, keepdim=True), cube),
    Case("var: correction", lambda x: x.var(-1, correction=2), cube),
    Case("std", torch.std, plain),
    Case("std: axis", lambda x: x.std(axis=1, keepdims=True), cube),
    Case("std: dim", lambda x: x.std(1, keepdim=True), cube),
    Case("var_mean", lambda x: torch.var_mean(x, dim=(1, 2), correction=0), cube),
    Case("std_mean", lambda x: torch.std_mean(x, 1, keepdim=True), plain),
]

NORMS = [
    Case("norm", torch.norm, plain),
    Case("norm: method", lambda x: x.norm(2, dim=-1, keepdim=True), cube),
    Case("norm: third", lambda x: x.norm(3, dim=1), cube),
    Case("norm: first", lambda x: x.norm(1, dim=(0, 1)), cube),
    Case("norm: largest", lambda x: x.norm(float("inf"), dim=1), cube),
    Case("linalg_norm", torch.linalg.norm, plain),
    Case("linalg_norm: dim", lambda x: torch.linalg.norm(x, 2.5, dim=-1), cube),
    Case("vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1), cube),
    Case("vector_norm: half", lambda x: torch.linalg.vector_norm(x, 0.5, dim=(0, 2), keepdim=True), cube),
    Case("vector_norm: smallest", lambda x: torch.linalg.vector_norm(x, float("-inf")), cube),
    Case("matrix_norm", torch.linalg.matrix_norm, cube),
    Case("normalize", lambda x: F.normalize(x, dim=-1), cube),
]

PRODUCTS = [
    Case("prod", torch.prod, lambda: (normal(2, 3),)),
    Case("prod: dim", lambda x: x.prod(1, keepdim=True), with_zeros),
    Case("cumprod", lambda x: x.cumprod(-1), plain),
    Case("cumprod: zeros", lambda x: x.cumprod(1), with_zeros),
]

EXTREMA = [
    Case("amax", lambda x: x.amax((0, 2)), cube),
    Case("amin", lambda x: x.amin(-1, keepdim=True), cube),
    Case("aminmax", lambda x: tuple(torch.aminmax(x, dim=1)), cube),
    Case("max", torch.max, plain),
    Case("max: dim", lambda x: x.max(1).values, cube),
    Case("max: keepdim", lambda x: x.max(dim=1, keepdim=True)[0], cube),
    Case("max: two", torch.max, lambda: (normal(3, 1), normal(1, 4))),
    Case("min", torch.min, plain),
    Case("min: dim", lambda x: torch.min(x, 0)[0], cube),
    Case("min: two", lambda a, b: torch.min(a, other=b), lambda: (normal(3, 1), normal(1, 4))),
    Case("median", torch.median, lambda: (normal(3, 3),)),
    Case("median: dim", lambda x: torch.median(x, 1)[0], cube),
    Case("sort", lambda x: x.sort(1, descending=True)[0], cube),
    Case("msort", torch.msort, plain),
    Case("topk", lambda x: x.topk(2, dim=1, largest=False).values, cube),
    Case("kthvalue", lambda x: x.kthvalue(2, dim=1)[0], cube),
    Case("cummax", lambda x: x.cummax(1)[0], plain),
    Case("cummin", lambda x: x.cummin(1)[0], plain),
]

SOFTMAX = [
    Case("softmax", lambda x: F.softmax(x, dim=1), cube),
    Case("softmax: method, dtype", lambda x: x.softmax(-1, torch.float64), cube),
    Case("softmax: masked", lambda x: x.masked_fill(torch.ones(3, 4).triu(1).bool(), float("-inf")).softmax(-1), cube),
    Case("softmin", lambda x: F.softmin(x, dim=-1), plain),
    Case("log_softmax", lambda x: x.log_softmax(1), cube),
    Case("log_softmax: dtype", lambda x: F.log_softmax(x, -1, dtype=torch.float64), cube),
    Case("logsumexp", lambda x: x.logsumexp(1), cube),
    Case("logsumexp: dims", lambda x: x.logsumexp((0, 2), keepdim=True), cube),
    Case("logcumsumexp", lambda x: x.logcumsumexp(1), cube),
]

CASES = [*SUMS, *MOMENTS, *NORMS, *PRODUCTS, *EXTREMA, *SOFTMAX]
