"""`norm_modulate`: the entrance of an adaLN branch."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from pyflowmap import reference

from .fused import Fused
from .modulation import check_floating, fitted, launch, of_one_kind, over_tokens

__all__ = ["norm_modulate", "norm_modulate_dual"]

_KINDS = ("layer", "rms")


def norm_modulate(
    x: Any,  # (B, ..., D) Tensor or Dual
    scale: Any,  # (B, D), or with the dimensions of x: Tensor or Dual
    shift: Any,  # as scale
    *,
    kind: str = "layer",
    eps: float = 1e-6,
) -> Any:
    """y = n(x) (1 + scale) + shift, where n normalises the last dimension and has no parameters of its own.

        kind="layer"   n(x) = (x - mean) / sqrt(var + eps)
        kind="rms"     n(x) = x / sqrt(mean(x^2) + eps)

    Shape and dtype of `x` (torch's promotion where scale and shift are wider). Of a Dual, value and tangent.
    Peebles & Xie 2023 (DiT), sec. 3.2, adaLN.

    Raises ValueError where scale or shift is neither one vector per sample nor broadcastable to `x`, TypeError for
    integers.

    >>> norm_modulate(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 2), torch.zeros(1, 2), eps=0.0)
    tensor([[[-2.,  2.]]])
    """
    if has_torch_function((x, scale, shift)):
        return handle_torch_function(norm_modulate, (x, scale, shift), x, scale, shift, kind=kind, eps=eps)
    options = _options(x, scale, shift, kind, eps)
    return fused(options, of_one_kind((x, scale, shift)))


def norm_modulate_dual(
    x: Any, scale: Any, shift: Any, *, tangents: tuple[Any, ...], tracked: bool, kind: str = "layer", eps: float = 1e-6
) -> Any:
    """(y, dy) of tensors and the tangents (dx, dscale, dshift)."""
    options = _options(x, scale, shift, kind, eps)
    every = of_one_kind((x, scale, shift, *tangents))
    return fused(options, every[:3], every[3:], tracked)


def _options(x: Any, scale: Any, shift: Any, kind: str, eps: float) -> tuple[float, ...]:
    check_floating("norm_modulate", x=x, scale=scale, shift=shift)
    if kind not in _KINDS:
        raise ValueError(f'norm_modulate: kind = {kind!r}; it is "layer" or "rms"')
    if len(x.shape) < 2:
        raise ValueError(f"norm_modulate: x has shape {tuple(x.shape)}; it is (B, ..., D)")
    fitted(scale, x, "scale", "norm_modulate")
    fitted(shift, x, "shift", "norm_modulate")
    return float(_KINDS.index(kind)), float(eps)


class _NormModulate(Fused):
    """n = (x - mean(x)) r with r = (mean((x - mean(x))^2) + eps)^(-1/2) is differentiated in csrc/norm_modulate."""

    name = "norm_modulate"
    operands = ("x", "scale", "shift")

    def value(self, options, x, scale, shift):
        kind, eps = options
        return reference.norm_modulate(x, over_tokens(scale, x), over_tokens(shift, x), kind == 0.0, eps)

    def empty(self, options, operands, pair):
        x, scale, shift = operands
        dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), shift.dtype)
        return [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        dy = results[1] if len(results) > 1 else None
        inputs = (*operands, *(tangents or (None,) * 3))
        launch(self.name, module.norm_modulate, inputs, (results[0], dy), *options)

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        inputs = (*operands[:2], *(tangents[:2] or (None,) * 2), gy, gdy)
        found = [torch.empty_like(v) if need else None for v, need in zip((*operands, *tangents), needs, strict=True)]
        launch(self.name, module.norm_modulate_backward, inputs, (*found, *(None,) * (6 - len(found))), *options)
        return found


fused = _NormModulate()
