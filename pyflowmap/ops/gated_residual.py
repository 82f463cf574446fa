"""`gated_residual`: the exit of an adaLN branch."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from pyflowmap import reference

from .fused import Fused
from .modulation import check_floating, fitted, launch, of_one_kind, over_tokens

__all__ = ["gated_residual", "gated_residual_dual"]


def gated_residual(
    x: Any,  # (B, ..., D) Tensor or Dual: the stream
    gate: Any,  # (B, D), or with the dimensions of x
    h: Any,  # of the shape of x: what the branch made
) -> Any:
    """y = x + gate * h. Shape of `x`, torch's promoted dtype. Of a Dual, value and tangent: dx + dgate * h + gate * dh.

    A gate that starts at zero makes the block start as the identity. Peebles & Xie 2023 (DiT), sec. 3.2, adaLN-zero.

    Raises ValueError where `h` has another shape than `x` or `gate` does not fit, TypeError for integers.

    >>> gated_residual(torch.ones(1, 1, 2), torch.tensor([[0.0, 2.0]]), torch.full((1, 1, 2), 3.0))
    tensor([[[1., 7.]]])
    """
    if has_torch_function((x, gate, h)):
        return handle_torch_function(gated_residual, (x, gate, h), x, gate, h)
    _check(x, gate, h)
    return fused((), of_one_kind((x, gate, h)))


def gated_residual_dual(x: Any, gate: Any, h: Any, *, tangents: tuple[Any, ...], tracked: bool) -> Any:
    """(y, dy) of tensors and the tangents (dx, dgate, dh)."""
    _check(x, gate, h)
    every = of_one_kind((x, gate, h, *tangents))
    return fused((), every[:3], every[3:], tracked)


def _check(x: Any, gate: Any, h: Any) -> None:
    check_floating("gated_residual", x=x, gate=gate, h=h)
    if h.shape != x.shape:
        raise ValueError(
            f"gated_residual: h has shape {tuple(h.shape)} but x has shape {tuple(x.shape)}; they must agree"
        )
    fitted(gate, x, "gate", "gated_residual")


class _GatedResidual(Fused):
    """gh = gate gy + dgate gdy, ggate = sum over tokens of gy h + gdy dh, gdh = gate gdy, gdgate = sum of gdy h."""

    name = "gated_residual"
    operands = ("x", "gate", "h")

    def value(self, options, x, gate, h):
        return reference.gated_residual(x, over_tokens(gate, x), h)

    def empty(self, options, operands, pair):
        x, gate, h = operands
        dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), h.dtype)
        return [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        dy = results[1] if len(results) > 1 else None
        launch(self.name, module.gated_residual, (*operands, *(tangents or (None,) * 3)), (results[0], dy))

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        x, gate, h = operands
        _, dgate, dh = tangents or (None,) * 3
        needs = (*needs, *(False,) * (6 - len(needs)))
        inputs = (h, gate, dgate, dh, gy, gdy)
        sought: tuple[Any, ...] = ((h, needs[2]), (gate, needs[1]), (dh, needs[5]), (dgate, needs[4]))
        found = [torch.empty_like(v) if need else None for v, need in sought]
        if any(needs[i] for i in (1, 2, 4, 5)):
            launch(self.name, module.gated_residual_backward, inputs, found)
        gh, ggate, gdh, gdgate = found
        # The stream's gradients are what came; another kernel has nothing to add.
        gx = None if not needs[0] else torch.zeros_like(x) if gy is None else gy.to(x.dtype)
        gdx = gdy.to(tangents[0].dtype) if needs[3] else None
        return [gx, ggate, gh, gdx, gdgate, gdh][: len(operands) + len(tangents)]


fused = _GatedResidual()
