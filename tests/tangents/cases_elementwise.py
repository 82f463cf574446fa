"""Arithmetic, functions of one number, activations, choices, casts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tangents.case import Case, normal, positive
from torch.nn import functional as F

SHAPE = (3, 4)


def plain() -> tuple[Any, ...]:
    return (normal(*SHAPE),)


def above_zero() -> tuple[Any, ...]:
    return (positive(*SHAPE),)


def inside() -> tuple[Any, ...]:
    """Of (-0.9, 0.9)."""
    return (1.8 * torch.rand(*SHAPE, dtype=torch.float64) - 0.9,)


def unit() -> tuple[Any, ...]:
    """Of (0.05, 0.95)."""
    return (0.9 * torch.rand(*SHAPE, dtype=torch.float64) + 0.05,)


def above_one() -> tuple[Any, ...]:
    return (positive(*SHAPE) + 1.0,)


def two() -> tuple[Any, ...]:
    return normal(*SHAPE), normal(*SHAPE)


def two_of_different_shape() -> tuple[Any, ...]:
    return normal(3, 1), normal(2, 1, 4)


def two_positive() -> tuple[Any, ...]:
    return positive(*SHAPE), positive(*SHAPE)


def three() -> tuple[Any, ...]:
    return normal(*SHAPE), normal(4), positive(*SHAPE)


UNARY: dict[Callable[[], tuple[Any, ...]], str] = {
    plain: "neg positive square exp exp2 expm1 sin cos tan atan sinh cosh asinh sinc erf erfc sigmoid tanh abs frac "
    "deg2rad rad2deg nan_to_num",
    above_zero: "sqrt rsqrt reciprocal log log2 log10 log1p",
    inside: "asin acos atanh erfinv",
    unit: "logit",
    above_one: "acosh",
}


def unary() -> Iterator[Case]:
    for domain, names in UNARY.items():
        for name in names.split():
            yield Case(name, getattr(torch, name), domain)


ARITHMETIC = [
    Case("add", torch.add, two_of_different_shape),
    Case("add: alpha", lambda a, b: torch.add(a, b, alpha=0.3), two),
    Case("add: number", lambda a: 2 + (a + 1.5), plain),
    Case("sub", torch.sub, two_of_different_shape),
    Case("sub: alpha", lambda a, b: torch.sub(a, b, alpha=0.3), two),
    Case("rsub", lambda a, b: torch.rsub(a, b, alpha=2), two),
    Case("rsub: number", lambda a: 1.0 - a, plain),
    Case("mul", torch.mul, two_of_different_shape),
    Case("mul: number", lambda a: 3 * a * 0.5, plain),
    Case("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.7), three),
    Case("addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=0.7), three),
    Case("lerp", torch.lerp, three),
    Case("lerp: number", lambda a, b: torch.lerp(a, b, 0.3), two),
    Case("div", torch.div, lambda: (normal(3, 1), positive(2, 1, 4))),
    Case("div: number", lambda a: a / 3, plain),
    Case("div: of a number", lambda a: 3 / a, above_zero),
    Case("div: floor", lambda a: torch.div(a, 0.3, rounding_mode="floor") + a, plain),
    Case("remainder", torch.remainder, lambda: (normal(*SHAPE), positive(*SHAPE))),
    Case("remainder: number", lambda a: a % 0.7, plain),
    Case("fmod", torch.fmod, lambda: (normal(*SHAPE), positive(*SHAPE))),
    Case("pow", torch.pow, two_positive),
    Case("pow: square", lambda a: a**2, plain),
    Case("pow: cube", lambda a: a**3, plain),
    Case("pow: fraction", lambda a: a**0.37, above_zero),
    Case("pow: zeroth", lambda a: a**0 * a, plain),
    Case("pow: of a number", lambda a: 2.5**a, plain),
    Case("pow: integers", lambda a: torch.pow(a, torch.tensor([0, 1, 2, 3])), plain),
    Case("float_power", lambda a: torch.float_power(a, 1.7), above_zero),
    Case("ldexp", torch.ldexp, two),
    Case("hypot", torch.hypot, two),
    Case("atan2", torch.atan2, two),
    Case("logaddexp", torch.logaddexp, two),
    Case("logit: eps", lambda a: torch.logit(a, eps=0.2), unit),
]

# torch.compile does not ask an argument's class about F.hardswish and F.hardsigmoid, which torch.overrides forgot
ACTIVATIONS = [
    Case("silu", F.silu, plain),
    Case("gelu", F.gelu, plain),
    Case("gelu: tanh", lambda x: F.gelu(x, approximate="tanh"), plain),
    Case("mish", F.mish, plain),
    Case("softplus", F.softplus, plain),
    Case("softplus: beta", lambda x: F.softplus(x, 3.0, 2), plain),
    Case("logsigmoid", F.logsigmoid, plain),
    Case("softsign", F.softsign, plain),
    Case("tanhshrink", F.tanhshrink, plain),
    Case("relu", F.relu, plain),
    Case("relu6", lambda x: F.relu6(5 * x), plain),
    Case("hardtanh", lambda x: F.hardtanh(x, -0.3, 0.8), plain),
    Case("leaky_relu", lambda x: F.leaky_relu(x, 0.2), plain),
    Case("rrelu", lambda x: F.rrelu(x, 0.1, 0.4), plain),
    Case("elu", lambda x: F.elu(x, 1.3), plain),
    Case("celu", lambda x: F.celu(x, 0.7), plain, torch_error=1e-7),
    Case("selu", F.selu, plain),
    Case("hardswish", lambda x: F.hardswish(3 * x), plain, compiled=False),
    Case("hardsigmoid", lambda x: F.hardsigmoid(3 * x), plain, compiled=False, torch_error=1e-7),
    Case("threshold", lambda x: F.threshold(x, 0.2, -1.0), plain),
    Case("hardshrink", F.hardshrink, plain),
    Case("softshrink", F.softshrink, plain),
    Case("glu", F.glu, plain),
    Case("glu: dim", lambda x: F.glu(x, 0), lambda: (normal(4, 3),)),
    Case("prelu", F.prelu, lambda: (normal(2, 3, 4), positive(3))),
    Case("prelu: one", F.prelu, lambda: (normal(3, 4), positive(1))),
    Case("prelu: a number", F.prelu, lambda: (-positive(), positive(1))),
]

MASK = torch.tensor([[True, False, False, True]])

SELECTION = [
    Case("where", lambda a, b: torch.where(MASK, a, b), two),
    Case("where: number", lambda a: torch.where(MASK, a, 1.0), plain),
    Case("where: condition of the primal", lambda a, b: torch.where(a > b, a.sin(), b.cos()), two),
    Case("where: method", lambda a, b: a.where(MASK, b), two),
    Case("masked_fill", lambda a: a.masked_fill(MASK, -1e9), plain),
    Case("masked_fill: tensor", lambda a, b: a.masked_fill(MASK, b), lambda: (normal(*SHAPE), normal())),
    Case("maximum", torch.maximum, two_of_different_shape),
    Case("minimum", torch.minimum, two_of_different_shape),
    Case("fmax", torch.fmax, two),
    Case("fmin", torch.fmin, two),
    Case("clamp", lambda a: a.clamp(-0.5, 0.6), plain),
    Case("clamp: below", lambda a: a.clamp(min=0.1), plain),
    Case(
        "clamp: tensors", lambda a, b, c: torch.clamp(a, b, c), lambda: (2 * normal(3, 4), -positive(4), positive(3, 1))
    ),
    Case("clamp: crossed", lambda a, b, c: torch.clamp(a, b, c), lambda: (normal(3, 4), positive(4), -positive(3, 1))),
    Case("clamp_min", lambda a, b: torch.clamp_min(a, b), two),
    Case("clamp_max", lambda a: a.clamp_max(0.3), plain),
]

CASTS = [
    Case("to", lambda a: a.to(torch.float64).to("cpu").double(), plain),
    Case("type_as", lambda a: a.sin().type_as(a), plain),
]

CASES = [*unary(), *ARITHMETIC, *ACTIVATIONS, *SELECTION, *CASTS]
