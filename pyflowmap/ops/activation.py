"""`activation`, a function of every element, and `gated_unit`, such a function as the gate of another tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from pyflowmap import reference

from .backend import direct
from .fused import Fused
from .modulation import check_floating, launch, of_one_kind

__all__ = ["KINDS", "activate", "activation", "activation_dual", "gated_unit", "gated_unit_dual"]

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")  # in the order of ActivationKind
_NUMBER = {kind: i for i, kind in enumerate(KINDS)}


def activation(
    x: Any,  # Tensor or Dual, any shape
    kind: str,  # "silu", "gelu", "gelu_tanh", "relu", "sigmoid" or "tanh"
) -> Any:
    """f(x), element by element, in one pass over memory. Of a Dual, value and tangent: f(x) and f'(x) dx.

    silu x / (1 + e^-x); gelu x Phi(x) (Hendrycks & Gimpel 2016), gelu_tanh its approximation; relu with f'(0) = 0. Half
    precision is computed in float32 and rounded once. At infinity the result is the limit, where torch has NaN.

    Raises ValueError for another kind, TypeError for integers and complex numbers.

    >>> activation(torch.tensor([-1.0, 2.0]), "relu")
    tensor([0., 2.])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(activation, (x,), x, kind)
    found = activate(x, None, kind)
    return found if found is not None else plain(*_operands("activation", kind, x=x))


def activate(x: Tensor, dx: Tensor | None, kind: str) -> Any:
    """f(x), or (f(x), f'(x) dx): one call of the kernel, which makes its results; None where Python must look, since
    somebody records or watches, or x and dx differ in type."""
    return direct.activate(x, dx, _NUMBER.get(kind, -1))


def gated_unit(
    a: Any,  # Tensor or Dual, any shape: the gate, before its activation
    b: Any,  # of the same shape: what it is multiplied with
    kind: str,  # as for `activation`
) -> Any:
    """f(a) * b in one pass over memory. Of Duals, value and tangent: f'(a) b da + f(a) db. torch's promoted dtype.

    SwiGLU is kind="silu", GEGLU "gelu", ReGLU "relu". Shazeer 2020 (GLU Variants), eq. 5. The halves of one tensor,
    `gated_unit(*h.chunk(2, -1), "silu")`, are read where they lie.

    Raises ValueError for another kind and where the shapes differ, TypeError for integers and complex numbers.

    >>> gated_unit(torch.tensor([-1.0, 2.0]), torch.tensor([5.0, 5.0]), "relu")
    tensor([ 0., 10.])
    """
    if has_torch_function((a, b)):
        return handle_torch_function(gated_unit, (a, b), a, b, kind)
    options, operands = _operands("gated_unit", kind, a=a, b=b)
    return gated(options, of_one_kind(operands))


def activation_dual(x: Any, kind: str, *, tangents: tuple[Any, ...], tracked: bool) -> Any:
    """(y, dy) of a tensor and its tangent (dx,)."""
    found = activate(x, tangents[0], kind) if tangents[0] is not None else None
    return found if found is not None else plain(*_operands("activation", kind, x=x), tangents, tracked)


def gated_unit_dual(a: Any, b: Any, kind: str, *, tangents: tuple[Any, ...], tracked: bool) -> Any:
    """(y, dy) of tensors and their tangents (da, db)."""
    options, operands = _operands("gated_unit", kind, a=a, b=b)
    every = of_one_kind((*operands, *tangents))
    return gated(options, every[:2], every[2:], tracked)


def _operands(function: str, kind: str, **operands: Any) -> tuple[tuple[float, ...], tuple[Any, ...]]:
    if kind not in _NUMBER:
        raise ValueError(f"{function}: kind={kind!r} is not an activation; choose one of {', '.join(KINDS)}")
    check_floating(function, **operands)
    values = tuple(operands.values())
    if values[0].shape != values[-1].shape:
        raise ValueError(
            f"{function}: b has shape {tuple(values[-1].shape)} but a has shape {tuple(values[0].shape)}; they must "
            "agree"
        )
    return (float(_NUMBER[kind]),), values


class _Activation(Fused):
    """ga = f' gy, and through the tangent: ga = f' gy + f'' da gdy, gda = f' gdy."""

    name = "activation"
    operands: tuple[str, ...] = ("x",)

    def value(self, options, *operands):
        formula: Any = reference.activation if self.count == 1 else reference.gated_unit
        return formula(*operands, KINDS[int(options[0])])

    def empty(self, options, operands, pair):
        return [torch.empty_like(operands[0], dtype=_promoted(operands)) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        dy = results[1] if len(results) > 1 else None
        given = (*_two(operands), *_two(tangents))
        launch(self.name, module.activation, given, (results[0], dy), int(options[0]))

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        found = [None if not need else torch.empty_like(v) for v, need in zip((*operands, *tangents), needs)]
        if any(x is not None for x in found):
            given = (*_two(operands), *_two(tangents), gy, gdy)
            wanted = (*_two(found[: self.count]), *_two(found[self.count :]))
            launch(self.name, module.activation_backward, given, wanted, int(options[0]))
        return found


class _GatedUnit(_Activation):
    """ga = (f' b) gy + (f'' b da + f' db) gdy, gb = f gy + f' da gdy, gda = f' b gdy, gdb = f gdy."""

    name = "gated_unit"
    operands = ("a", "b")


def _promoted(operands: Any) -> torch.dtype:
    return torch.promote_types(operands[0].dtype, operands[-1].dtype)


def _two(xs: Any) -> tuple[Any, Any]:
    return (*xs, None, None)[:2]


plain, gated = _Activation(), _GatedUnit()
