"""Complex numbers, as rotary embeddings use them. Functions of one complex number are holomorphic and have their usual
rules; here are those between the real and the complex."""

from __future__ import annotations

import torch

from ..parts import primal, tangent
from ..registry import linear, rule
from .arithmetic import sum_of

linear("real", "imag", "view_as_real", "view_as_complex", view="yes")
linear("conj", view="yes")
linear("resolve_conj", "resolve_neg", view="self")
linear("conj_physical")


@rule("complex")
def _complex(y, real, imag):
    parts = [torch.zeros_like(primal(x)) if tangent(x) is None else tangent(x) for x in (real, imag)]
    return torch.complex(*parts)


@rule("polar")
def _polar(y, abs, angle):  # z = r e^(i a)
    dr, da = tangent(abs), tangent(angle)
    one = torch.ones_like(primal(abs))
    turn = None if da is None else torch.complex(-y.imag * da, y.real * da)
    return sum_of(None if dr is None else dr * torch.polar(one, primal(angle)), turn)


@rule("abs", "absolute")
def _abs(y, input):
    x, dx = primal(input), tangent(input)
    if not x.is_complex():
        return dx * torch.sign(x)
    return torch.where(y == 0, 0.0, (x.real * dx.real + x.imag * dx.imag) / y)


@rule("sgn")
def _sgn(y, input):  # x / |x|, of a real number a step
    x, dx = primal(input), tangent(input)
    if not x.is_complex():
        return torch.zeros_like(dx)
    return torch.where(y == 0, 0.0, (dx - y * (y.conj() * dx).real) / x.abs())


@rule("angle")
def _angle(y, input):
    x, dx = primal(input), tangent(input)
    if not x.is_complex():
        return None
    return (x.real * dx.imag - x.imag * dx.real) / (x.real.square() + x.imag.square())
