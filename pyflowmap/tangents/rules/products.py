"""Products that are linear in each operand: matrix products, einsum, linear layers. One product per tangent."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pyflowmap.ops.dual_linear import few_rows

from ..parts import is_dual, primal, primals, tangent
from ..registry import pair, rule
from .arithmetic import sum_of


def bilinear(function, a, b):
    """f(da, b) + f(a, db), each only where there is a tangent."""
    da, db = tangent(a), tangent(b)
    left = None if da is None else function(da, primal(b))
    return left if db is None else sum_of(left, function(primal(a), db))


def _product(dx, weight):
    found = None if torch.compiler.is_compiling() else few_rows(dx, None, weight)
    return F.linear(dx, weight) if found is None else found[0]


@rule("linear")
def _linear(y, input, weight, bias=None):
    dx, dw, db = tangent(input), tangent(weight), tangent(bias)
    dy = None if dx is None else _product(dx, primal(weight))
    if dw is not None:
        dy = sum_of(dy, F.linear(primal(input), dw))
    return dy if db is None else sum_of(dy, db)


@pair("linear")
def _linear_pair(input, weight, bias=None):
    if is_dual(weight) or is_dual(bias):
        return None
    return few_rows(input.primal, input.tangent, weight, bias)


@rule("matmul", torch.linalg.matmul)
def _matmul(y, input, other):
    return bilinear(torch.matmul, input, other)


@rule("__rmatmul__")
def _rmatmul(y, input, other):
    return _matmul(y, other, input)


@rule("bmm")
def _bmm(y, input, mat2):
    return bilinear(torch.bmm, input, mat2)


@rule("mm")
def _mm(y, input, mat2):
    return bilinear(torch.mm, input, mat2)


@rule("mv")
def _mv(y, input, vec):
    return bilinear(torch.mv, input, vec)


@rule("dot", torch.inner, torch.Tensor.inner)
def _dot(y, input, other=None, *, tensor=None):
    return bilinear(torch.inner, input, tensor if other is None else other)


@rule("outer", "ger")
def _outer(y, input, vec2):
    return bilinear(torch.outer, input, vec2)


@rule("kron")
def _kron(y, input, other):
    return bilinear(torch.kron, input, other)


@rule("cross")
def _cross(y, input, other, dim=None):
    axis = {} if dim is None else {"dim": dim}
    return bilinear(lambda a, b: torch.cross(a, b, **axis), input, other)


@rule(torch.linalg.cross)
def _linalg_cross(y, input, other, *, dim=-1):
    return bilinear(lambda a, b: torch.linalg.cross(a, b, dim=dim), input, other)


@rule(torch.linalg.vecdot)
def _vecdot(y, x, y_, *, dim=-1):
    return bilinear(lambda a, b: torch.linalg.vecdot(a, b, dim=dim), x, y_)


@rule("tensordot")
def _tensordot(y, a, b, dims=2, out=None):
    return bilinear(lambda a, b: torch.tensordot(a, b, dims), a, b)


def _added(function, input, a, b, beta, alpha):
    """beta input + alpha f(a, b)."""
    dy = bilinear(function, a, b)
    if dy is not None and alpha != 1:
        dy = alpha * dy
    dinput = tangent(input)
    return dy if dinput is None or beta == 0 else sum_of(dy, dinput if beta == 1 else beta * dinput)


@rule("addmm")
def _addmm(y, input, mat1, mat2, *, beta=1, alpha=1):
    return _added(torch.mm, input, mat1, mat2, beta, alpha)


@rule("baddbmm")
def _baddbmm(y, input, batch1, batch2, *, beta=1, alpha=1):
    return _added(torch.bmm, input, batch1, batch2, beta, alpha)


@rule("addbmm")
def _addbmm(y, input, batch1, batch2, *, beta=1, alpha=1):
    return _added(lambda a, b: torch.bmm(a, b).sum(0), input, batch1, batch2, beta, alpha)


@rule("addmv")
def _addmv(y, input, mat, vec, *, beta=1, alpha=1):
    return _added(torch.mv, input, mat, vec, beta, alpha)


@rule("addr")
def _addr(y, input, vec1, vec2, *, beta=1, alpha=1):
    return _added(torch.outer, input, vec1, vec2, beta, alpha)


@rule("einsum")
def _einsum(y, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    every = (equation, *operands)  # in the form einsum(a, [0, 1], b, [1, 2], [0, 2]) there is no equation
    plain = primals(every)
    terms = [
        None if tangent(x) is None else torch.einsum(*plain[:i], tangent(x), *plain[i + 1 :])
        for i, x in enumerate(every)
    ]
    return sum_of(*terms)


@rule("bilinear")
def _bilinear(y, input1, input2, weight, bias=None):
    dy = bilinear(lambda a, b: F.bilinear(a, b, primal(weight)), input1, input2)
    if tangent(weight) is not None:
        dy = sum_of(dy, F.bilinear(primal(input1), primal(input2), tangent(weight)))
    return sum_of(dy, tangent(bias))
