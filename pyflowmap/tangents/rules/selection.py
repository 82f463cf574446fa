"""Functions that choose: each element of the result is one element of an argument, and so is its tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import primal, tangent
from ..registry import rule


def _or_zero(dx):
    return 0.0 if dx is None else dx


@rule("where")
def _where(y, condition, input=None, other=None):
    if tangent(input) is None and tangent(other) is None:
        return None  # where(condition): indices
    return torch.where(condition, _or_zero(tangent(input)), _or_zero(tangent(other)))


@rule(Tensor.where)
def _where_method(y, input, condition, other):
    return _where(y, condition, input, other)


@rule("masked_fill")
def _masked_fill(y, input, mask, value):
    return torch.where(mask, _or_zero(tangent(value)), _or_zero(tangent(input)))


# ---- the larger, the smaller; of equals each takes a half ----


@rule("maximum")
def maximum(y, input, other):
    a, b = primal(input), primal(other)
    return _choice(tangent(input), tangent(other), a > b, a == b)


@rule("minimum")
def minimum(y, input, other):
    a, b = primal(input), primal(other)
    return _choice(tangent(input), tangent(other), a < b, a == b)


@rule("fmax")
def _fmax(y, input, other):
    a, b = primal(input), primal(other)
    return _choice(tangent(input), tangent(other), (a >= b) | b.isnan(), None)


@rule("fmin")
def _fmin(y, input, other):
    a, b = primal(input), primal(other)
    return _choice(tangent(input), tangent(other), (a <= b) | b.isnan(), None)


def _choice(da, db, first, equal):
    da, db = _or_zero(da), _or_zero(db)
    chosen = torch.where(first, da, db)
    return chosen if equal is None else torch.where(equal, 0.5 * (da + db), chosen)


# ---- limits; at a limit the derivative is 1, as torch has it ----


@rule("clamp", "clip")
def _clamp(y, input, min=None, max=None):
    dx, low, high = _or_zero(tangent(input)), tangent(min), tangent(max)
    limit = _or_zero(low)
    if max is not None and (low is not None or high is not None):
        limit = torch.where(y == primal(max), _or_zero(high), limit)
    return torch.where(y == primal(input), dx, limit)


@rule("clamp_min")
def _clamp_min(y, input, min):
    return _clamp(y, input, min)


@rule("clamp_max")
def _clamp_max(y, input, max):
    return _clamp(y, input, None, max)
