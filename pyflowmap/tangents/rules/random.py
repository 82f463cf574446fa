"""Random functions. Dropout draws one mask, which value and tangent share; noise has no tangent."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parts import primal, recording, tangent
from ..registry import Kind, constant, rule, write

constant("bernoulli", "multinomial")


def _dropout(input, p, training, draw):
    """x * draw(ones): dropout of ones is the mask with its scale, from the numbers that dropout of x would draw."""
    x, dx = primal(input), tangent(input)
    if not training or p == 0.0:
        draw(x)  # which checks p and the shape
        return x, dx  # torch, too, gives back x itself, and writes to the result are writes to x
    mask = draw(torch.ones_like(x, requires_grad=False))
    value = x * mask
    if dx is None:
        return value, None
    with recording(input):
        return value, dx * mask


@rule("dropout", kind=Kind.JOINT)
def _plain_dropout(input, p=0.5, training=True, inplace=False, *, train=None):
    training = training if train is None else train
    return _dropout(input, p, training, lambda x: F.dropout(x, p, training))


@rule("feature_dropout", kind=Kind.JOINT)
def _feature_dropout(input, p, train):
    return _dropout(input, p, train, lambda x: torch.feature_dropout(x, p, train))


@rule("dropout1d", kind=Kind.JOINT)
def _dropout1d(input, p=0.5, training=True, inplace=False):
    return _dropout(input, p, training, lambda x: F.dropout1d(x, p, training))


@rule("dropout2d", kind=Kind.JOINT)
def _dropout2d(input, p=0.5, training=True, inplace=False):
    return _dropout(input, p, training, lambda x: F.dropout2d(x, p, training))


@rule("dropout3d", kind=Kind.JOINT)
def _dropout3d(input, p=0.5, training=True, inplace=False):
    return _dropout(input, p, training, lambda x: F.dropout3d(x, p, training))


_ALPHA = 1.7580993408473766  # -(the value of selu at minus infinity): Klambauer et al. 2017, arXiv:1706.02515


def _alpha(input, p, training, shape):
    """a (m x - (1 - m) alpha) + b: a dropped number becomes selu's lowest; a and b keep mean and variance."""
    x, dx = primal(input), tangent(input)
    if not training or p == 0.0:
        return x, dx
    kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p)
    a = 0.0 if p == 1.0 else 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1.0) * (1.0 - p))
    scale = kept * a
    value = x * scale + ((kept - 1.0) * (_ALPHA * a) + _ALPHA * a * p)
    if dx is None:
        return value, None
    with recording(input):
        return value, dx * scale


@rule("alpha_dropout", kind=Kind.JOINT)
def _alpha_dropout(input, p=0.5, training=False, inplace=False, *, train=None):
    return _alpha(input, p, training if train is None else train, input.shape)


@rule("feature_alpha_dropout", kind=Kind.JOINT)
def _feature_alpha_dropout(input, p=0.5, training=False, inplace=False, *, train=None):
    shape = (*input.shape[:2], *(1,) * (input.ndim - 2))
    return _alpha(input, p, training if train is None else train, shape)


# ---- noise drawn in place, x.new_empty(...).bernoulli_(p): the values are forgotten, and so is the tangent ----------


def _noise(name):
    draw = getattr(Tensor, name)

    def drawn(x, *args, **kwargs):
        return draw(torch.empty_like(x, requires_grad=False), *args, **kwargs)

    constant(drawn)
    write([draw], drawn)


for _name in (
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_",
):  # fmt: skip
    _noise(_name)
