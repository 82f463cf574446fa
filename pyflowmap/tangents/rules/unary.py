"""Functions of one number: dy = f'(x) dx, by the table below."""

from __future__ import annotations

import math

import torch

from ..parts import primal, tangent
from ..registry import constant
from .alone import of_one

aten = torch.ops.aten


def elementwise(*names):
    """Decorator of f'(x) dx as a function of (dx, y, x), all of the value's dtype."""

    def add(formula):
        @of_one(*names)
        def unary(y, input, *rest, **options):
            dx, x = tangent(input), primal(input)
            if x.dtype != y.dtype:  # autocast computed y in float32
                dx, x = dx.to(y.dtype), x.to(y.dtype)
            return formula(dx, y, x)

        return formula

    return add


FORMULAS = {
    # powers and roots
    ("square",): lambda dx, y, x: dx * (x + x),
    ("sqrt",): lambda dx, y, x: dx / (y + y),
    ("rsqrt",): lambda dx, y, x: dx * (-0.5 * y * y * y),
    # exponentials and logarithms
    ("exp",): lambda dx, y, x: dx * y,
    ("exp2",): lambda dx, y, x: dx * (math.log(2.0) * y),
    ("expm1",): lambda dx, y, x: torch.addcmul(dx, dx, y),
    ("log",): lambda dx, y, x: dx / x,
    ("log2",): lambda dx, y, x: dx / (math.log(2.0) * x),
    ("log10",): lambda dx, y, x: dx / (math.log(10.0) * x),
    ("log1p",): lambda dx, y, x: dx / (1.0 + x),
    # trigonometric and hyperbolic
    ("sin",): lambda dx, y, x: dx * torch.cos(x),
    ("cos",): lambda dx, y, x: -dx * torch.sin(x),
    ("tan",): lambda dx, y, x: torch.addcmul(dx, dx * y, y),
    ("asin", "arcsin"): lambda dx, y, x: dx * torch.rsqrt(1.0 - x * x),
    ("acos", "arccos"): lambda dx, y, x: -dx * torch.rsqrt(1.0 - x * x),
    ("atan", "arctan"): lambda dx, y, x: dx / (1.0 + x * x),
    ("sinh",): lambda dx, y, x: dx * torch.cosh(x),
    ("cosh",): lambda dx, y, x: dx * torch.sinh(x),
    ("asinh", "arcsinh"): lambda dx, y, x: dx * torch.rsqrt(1.0 + x * x),
    ("acosh", "arccosh"): lambda dx, y, x: dx * torch.rsqrt(x - 1.0) * torch.rsqrt(x + 1.0),
    ("atanh", "arctanh"): lambda dx, y, x: dx / ((1.0 - x) * (1.0 + x)),
    ("sinc",): lambda dx, y, x: dx * torch.where(x == 0, 0.0, (torch.cos(math.pi * x) - y) / x),
    # of the normal and the logistic distribution
    ("erf",): lambda dx, y, x: dx * (2.0 / math.sqrt(math.pi) * torch.exp(-x * x)),
    ("erfc",): lambda dx, y, x: dx * (-2.0 / math.sqrt(math.pi) * torch.exp(-x * x)),
    ("erfinv",): lambda dx, y, x: dx * (0.5 * math.sqrt(math.pi) * torch.exp(y * y)),
    # (of a complex number, these kernels would conjugate)
    ("sigmoid", "expit"): lambda dx, y, x: dx * (y * (1.0 - y)) if y.is_complex() else aten.sigmoid_backward(dx, y),
    ("tanh",): lambda dx, y, x: dx * (1.0 - y * y) if y.is_complex() else aten.tanh_backward(dx, y),
    # of size
    ("frac",): lambda dx, y, x: dx,
    ("nan_to_num",): lambda dx, y, x: torch.where(torch.isfinite(x), dx, 0.0),
}

for _names, _formula in FORMULAS.items():
    elementwise(*_names)(_formula)


@of_one("logit")
def _logit(y, input, eps=None):
    x = primal(input)
    inside = x if eps is None else x.clamp(eps, 1.0 - eps)
    change = tangent(input) / (inside * (1.0 - inside))
    return change if eps is None else torch.where((x < eps) | (x > 1.0 - eps), 0.0, change)


# Steps: flat wherever they have a derivative.
constant("floor", "ceil", "round", "trunc", "fix", "sign")
