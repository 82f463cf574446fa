"""Activation functions. The untracked tangent is torch's own backward kernel, one pass: f'(x) is its own transpose.

Some of these kernels cannot be differentiated themselves; a tracked tangent is then written out. Where nothing is
recorded, the commonest have value and tangent by one fused kernel, whose value differs from torch's by rounding.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pyflowmap.ops.activation import activate

from ..parts import primal, tangent
from ..registry import pair, rule
from . import unary  # noqa: F401  # the rules of sigmoid and tanh, which `pair` adds to
from .alone import of_one

aten = torch.ops.aten


def _parts(y, input):
    """dx and x in the value's dtype, which under autocast is not that of x."""
    dx, x = tangent(input), primal(input)
    return (dx, x) if x.dtype == y.dtype else (dx.to(y.dtype), x.to(y.dtype))


# ---- smooth ----


@rule("silu")
def _silu(y, input, inplace=False):
    dx, x = _parts(y, input)
    if not input.tracked:
        return aten.silu_backward(dx, x)
    s = torch.sigmoid(x)
    return dx * (s * (1.0 + x * (1.0 - s)))


@rule("gelu")
def _gelu(y, input, approximate="none"):
    return aten.gelu_backward(*_parts(y, input), approximate=approximate)


@rule("mish")
def _mish(y, input, inplace=False):
    dx, x = _parts(y, input)
    if not input.tracked:
        return aten.mish_backward(dx, x)
    t = torch.tanh(F.softplus(x))
    return dx * (t + x * torch.sigmoid(x) * (1.0 - t * t))


@of_one("softplus")
def _softplus(y, input, beta=1, threshold=20):
    return aten.softplus_backward(*_parts(y, input), beta, threshold)


@rule("logsigmoid", "log_sigmoid")
def _logsigmoid(y, input):
    dx, x = _parts(y, input)
    return dx * torch.sigmoid(-x)


@rule("softsign")
def _softsign(y, input):
    dx, x = _parts(y, input)
    if x.is_complex():
        raise NotImplementedError("softsign of a complex number has no tangent rule; write x / (1 + x.abs())")
    return dx / (1.0 + x.abs()).square()


@rule("tanhshrink")
def _tanhshrink(y, input):
    dx, x = _parts(y, input)
    return dx * torch.tanh(x).square()


# ---- with corners; there, the derivative is torch's ----


@rule("relu")
def _relu(y, input, inplace=False):
    return aten.threshold_backward(*_parts(y, input), 0)


@rule("relu6")
def _relu6(y, input, inplace=False):
    return aten.hardtanh_backward(*_parts(y, input), 0.0, 6.0)


@of_one("hardtanh")
def _hardtanh(y, input, min_val=-1.0, max_val=1.0, inplace=False):
    return aten.hardtanh_backward(*_parts(y, input), min_val, max_val)


@of_one("leaky_relu")
def _leaky_relu(y, input, negative_slope=0.01, inplace=False):
    return aten.leaky_relu_backward(*_parts(y, input), negative_slope, False)


@of_one("rrelu")
def _rrelu(y, input, lower=1.0 / 8, upper=1.0 / 3, training=False, inplace=False, generator=None):
    if training:
        raise NotImplementedError("rrelu(training=True) draws slopes that its tangent would not share; use leaky_relu")
    return aten.leaky_relu_backward(*_parts(y, input), 0.5 * (lower + upper), False)


@of_one("elu")
def _elu(y, input, alpha=1.0, inplace=False):
    return _exponential(y, input, alpha, 1.0, 1.0)


@of_one("celu")
def _celu(y, input, alpha=1.0, inplace=False):
    return _exponential(y, input, alpha, 1.0, 1.0 / alpha)


@rule("selu")
def _selu(y, input, inplace=False):
    return _exponential(y, input, 1.6732632423543772, 1.0507009873554805, 1.0)


def _exponential(y, input, alpha, scale, input_scale):
    dx, x = _parts(y, input)
    return aten.elu_backward(dx, alpha, scale, input_scale, False, x)


@rule("hardswish")
def _hardswish(y, input, inplace=False):
    return aten.hardswish_backward(*_parts(y, input))


@rule("hardsigmoid")
def _hardsigmoid(y, input, inplace=False):
    dx, x = _parts(y, input)
    return aten.hardtanh_backward(dx, x, -3.0, 3.0) / 6.0


@of_one("threshold")
def _threshold(y, input, threshold, value, inplace=False):
    return aten.threshold_backward(*_parts(y, input), threshold)


@of_one("hardshrink")
def _hardshrink(y, input, lambd=0.5):
    return aten.hardshrink_backward(*_parts(y, input), lambd)


@of_one("softshrink")
def _softshrink(y, input, lambd=0.5):
    return aten.softshrink_backward(*_parts(y, input), lambd)


# ---- of two parts ----


@rule("glu")
def _glu(y, input, dim=-1):
    dx, x = _parts(y, input)
    if not input.tracked and not (y.is_cpu and y.itemsize == 2):  # which torch left out on the CPU
        return aten.glu_jvp(y, x, dx, dim)
    gate = torch.sigmoid(x.chunk(2, dim)[1])
    da, db = dx.chunk(2, dim)
    return gate * da + y * (1.0 - gate) * db


@rule("prelu")
def _prelu(y, input, weight):
    x, dx, w, dw = primal(input), tangent(input), primal(weight), tangent(weight)
    if w.numel() > 1 and x.ndim > 2:  # a weight per channel, which is dimension 1
        shape = (-1,) + (1,) * (x.ndim - 2)
        w, dw = w.reshape(shape), None if dw is None else dw.reshape(shape)
    elif x.ndim == 0:
        w, dw = w.reshape(()), None if dw is None else dw.reshape(())
    positive = x > 0
    change = None if dx is None else torch.where(positive, dx, w * dx)
    if dw is not None:
        change = torch.where(positive, 0.0, x * dw) + (0.0 if change is None else change)
    return change


# ---- value and tangent at once, where autograd has nothing to see ----


@pair("silu")
def _silu_pair(input, inplace=False):
    return _both(input, "silu")


@pair("gelu")
def _gelu_pair(input, approximate="none"):
    return _both(input, "gelu" if approximate == "none" else "gelu_tanh") if approximate in ("none", "tanh") else None


@pair("relu")
def _relu_pair(input, inplace=False):
    return _both(input, "relu")


@pair("sigmoid", "expit")
def _sigmoid_pair(input):
    return _both(input, "sigmoid")


@pair("tanh")
def _tanh_pair(input):
    return _both(input, "tanh")


def _both(input, kind):
    """In float32 alone: torch's own float64 is as accurate, and half precision rounds its value before the tangent."""
    x = input.primal
    if x.dtype is not torch.float32 or torch._C._is_any_autocast_enabled():
        return None
    return activate(x, input.tangent, kind)
