"""Arithmetic of two and three operands: sums, products, quotients, powers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..parts import primal, tangent
from ..registry import constant, linear, rule
from .alone import refuse_duals

linear("neg", "negative", "deg2rad", "rad2deg")
linear("pos", "positive", view="self")
constant("floor_divide", "floordiv", "__rfloordiv__")


def sum_of(*terms):
    """The sum of the tangents that are not zero; None without any."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def times(dx, factor):
    """dx factor, None being zero."""
    return None if dx is None else dx * factor


# ---- sums ----


@rule("add")
def _add(y, input, other, *, alpha=1):
    refuse_duals("add", alpha)
    da, db = tangent(input), tangent(other)
    if db is None:
        return da
    if da is None:
        return db if alpha == 1 else alpha * db
    return torch.add(da, db, alpha=alpha)


@rule("sub", "subtract")
def _sub(y, input, other, *, alpha=1):
    refuse_duals("sub", alpha)
    da, db = tangent(input), tangent(other)
    if db is None:
        return da
    return -alpha * db if da is None else torch.sub(da, db, alpha=alpha)


@rule("rsub")
def _rsub(y, input, other, *, alpha=1):
    return _sub(y, other, input, alpha=alpha)


# ---- products ----


@rule("mul", "multiply")
def _mul(y, input, other):
    da, db = tangent(input), tangent(other)
    a, b = primal(input), primal(other)
    if da is None:
        return times(db, a)
    if db is None:
        return da * b
    return torch.addcmul(da * b, a, db) if da.dtype == a.dtype == b.dtype == db.dtype else da * b + a * db


@rule("addcmul")
def _addcmul(y, input, tensor1, tensor2, *, value=1):
    refuse_duals("addcmul", value)
    product = _mul(None, tensor1, tensor2)
    return sum_of(tangent(input), product if product is None or value == 1 else value * product)


@rule("lerp")
def _lerp(y, input, end, weight):
    da, db, dw = tangent(input), tangent(end), tangent(weight)
    w = primal(weight)
    if da is not None and db is not None:
        moved = torch.lerp(da, db, w)
    else:
        moved = times(db, w) if da is None else da * (1.0 - w)
    return sum_of(moved, None if dw is None else dw * (primal(end) - primal(input)))


# ---- quotients ----


@rule("div", "divide", "true_divide", "truediv")
def _div(y, input, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return None
    da, db, b = tangent(input), tangent(other), primal(other)
    if db is None:
        return None if da is None else da / b
    change = y * db
    return (-change if da is None else da - change) / b


@rule("__rdiv__", "__rtruediv__")
def _rdiv(y, input, other):
    return _div(y, other, input)


@rule("reciprocal")
def _reciprocal(y, input):
    return -tangent(input) * (y * y)


@rule("addcdiv")
def _addcdiv(y, input, tensor1, tensor2, *, value=1):
    refuse_duals("addcdiv", value)
    quotient = None
    if tangent(tensor1) is not None or tangent(tensor2) is not None:
        quotient = _div(primal(tensor1) / primal(tensor2), tensor1, tensor2)
    return sum_of(tangent(input), quotient if quotient is None or value == 1 else value * quotient)


@rule("remainder", "mod")
def _remainder(y, input, other):
    db = tangent(other)
    if db is None:
        return tangent(input)
    a, b = primal(input), primal(other)
    return sum_of(tangent(input), -db * torch.div(a, b, rounding_mode="floor"))


@rule("__rmod__")
def _rmod(y, input, other):
    return _remainder(y, other, input)


@rule("fmod")
def _fmod(y, input, other):
    db = tangent(other)
    if db is None:
        return tangent(input)
    return sum_of(tangent(input), -db * torch.div(primal(input), primal(other), rounding_mode="trunc"))


# ---- powers ----


@rule("pow", "float_power")
def _pow(y, input, exponent):
    da, de = tangent(input), tangent(exponent)
    x, e = primal(input), primal(exponent)
    return sum_of(
        None if da is None else _pow_base(da, x, e, y.dtype), None if de is None else _pow_exponent(de, x, e, y)
    )


@rule("__rpow__")
def _rpow(y, input, other):
    return _pow(y, other, input)


def _pow_base(dx, x, e, dtype):
    """e x^(e-1) dx, zero where e is, at x = 0 too."""
    x, dx = x.to(dtype), dx.to(dtype)
    if not isinstance(e, Tensor):
        if e == 0:
            return None
        return dx * (e * x) if e == 2 else dx * (e * x.pow(e - 1))
    zero = e == 0
    return torch.where(zero, 0.0, dx * (e * torch.pow(x, e.masked_fill(zero, 1) - 1)))


def _pow_exponent(de, x, e, y):
    """x^e log(x) de, zero at x = 0 with e >= 0, where x^e stays what it is."""
    if not isinstance(x, Tensor):
        if x == 0:
            return torch.where(e >= 0, 0.0, de * (y * -math.inf))
        return de * (y * (math.log(x) if x > 0 else math.nan))
    flat = (x == 0) & (e >= 0)
    return torch.where(flat, 0.0, de * (y * torch.log(torch.where(flat, 1.0, x))))


@rule("ldexp")
def _ldexp(y, input, other):
    if tangent(other) is not None:
        return sum_of(times(tangent(input), torch.exp2(primal(other))), tangent(other) * (y * math.log(2.0)))
    return torch.ldexp(tangent(input), primal(other))


# ---- lengths and angles ----


@rule("hypot")
def _hypot(y, input, other):
    change = sum_of(times(tangent(input), primal(input)), times(tangent(other), primal(other)))
    return (change / y).masked_fill(y == 0, 0.0)


@rule("atan2", "arctan2")
def _atan2(y, input, other):
    a, b = primal(input), primal(other)
    da, db = tangent(input), tangent(other)
    return sum_of(times(da, b), times(db, -a)) / (a * a + b * b)


@rule("logaddexp")
def _logaddexp(y, input, other):
    difference = primal(input) - primal(other)
    da, db = tangent(input), tangent(other)
    return sum_of(
        None if da is None else da * torch.sigmoid(difference),
        None if db is None else db * torch.sigmoid(-difference),
    )
