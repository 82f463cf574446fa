"""`norm_rope`: what happens to queries and keys before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyflowmap import reference

from .fused import Fused, check
from .fused_formula import above_autograd
from .modulation import check_floating

__all__ = ["norm_rope", "norm_rope_dual"]


def norm_rope(
    x: Any,  # (B, H, N, E) Tensor or Dual: queries or keys
    weight: Any,  # (E,)
    cos: Any,  # (N, E/2), or broadcastable to (B, H, N, E/2)
    sin: Any,  # as cos
    *,
    eps: float = 1e-6,
) -> Any:
    """y = R n(x): RMS norm of each head, then rotary positions. Shape and dtype of `x`.

        n(x) = weight * x / sqrt(mean(x^2) + eps)
        y[..., :E/2] = cos * a - sin * b,   y[..., E/2:] = cos * b + sin * a,     n(x) = [a, b]

    cos and sin of the angles of each position, best in float32; `pyflowmap.nn.rope_2d` makes them. Without rotation
    (`cos = sin = None`) it is the norm alone. Su et al. 2021 (RoPE), eq. 34; qk-norm: Dehghani et al. 2023, sec. 2.1.

    `x` may be a strided part of a projection and is not copied; y is contiguous, so that the tokens of a head, which
    attention walks, follow one another. Angles are constants of a tangent: a Dual raises NotImplementedError.

    Raises ValueError where shapes do not fit, TypeError for integers.

    >>> norm_rope(torch.tensor([[[[3.0, 4.0]]]]), torch.ones(2), torch.zeros(1, 1), torch.ones(1, 1), eps=0.0)
    tensor([[[[-1.1314,  0.8485]]]])
    """
    if has_torch_function((x, weight, cos, sin)):
        return handle_torch_function(norm_rope, (x, weight, cos, sin), x, weight, cos, sin, eps=eps)
    operands = _operands(x, weight, cos, sin)
    return _shaped(fused((float(eps),), operands), x)


def norm_rope_dual(
    x: Any, weight: Any, cos: Any, sin: Any, *, tangents: tuple[Any, ...], tracked: bool, eps: float = 1e-6
) -> Any:
    """(y, dy) of tensors and the tangents (dx, dweight)."""
    operands = _operands(x, weight, cos, sin)
    dx, dweight = tangents
    dx = None if dx is None else _four(dx)
    y, dy = fused((float(eps),), operands, (dx, _of_kind(dweight, x)), tracked)
    return _shaped(y, x), _shaped(dy, x)


def _operands(x: Any, weight: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    check_floating("norm_rope", x=x, weight=weight)
    size = x.shape[-1]
    if tuple(weight.shape) != (size,):
        raise ValueError(f"norm_rope: weight has shape {tuple(weight.shape)} but heads have {size} channels")
    if cos is None and sin is None:
        return _four(x), _of_kind(weight, x), None, None
    if cos is None or sin is None or cos.shape != sin.shape or 2 * cos.shape[-1] != size:
        shapes = [None if each is None else tuple(each.shape) for each in (cos, sin)]
        raise ValueError(
            f"norm_rope: cos and sin have shapes {shapes[0]} and {shapes[1]} but heads have {size} channels; both end "
            f"in {size // 2}, one angle per pair"
        )
    want = x.shape[:-1]
    given = cos.shape[:-1]
    if len(given) > len(want) or any(a not in (1, b) for a, b in zip(reversed(given), reversed(want), strict=False)):
        raise ValueError(
            f"norm_rope: cos and sin have shape {tuple(cos.shape)} but x has shape {tuple(x.shape)}; they are "
            f"({', '.join(str(n) for n in (*want[-1:], size // 2))}), or broadcast to {(*want, size // 2)}"
        )
    if len(x.shape) > 4 and len(given) > 3:
        cos, sin = (_four(each.expand(*want, size // 2)) for each in (cos, sin))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _four(x), _of_kind(weight, x), cos.to(wide), sin.to(wide)


def _four(x: Any) -> Any:
    """With four dimensions."""
    missing = 4 - len(x.shape)
    return x if missing == 0 else x[(None,) * missing] if missing > 0 else x.flatten(0, -missing)


def _shaped(y: Any, x: Any) -> Any:
    return y if len(x.shape) == 4 else y.view(x.shape)


def _of_kind(weight: Any, x: Any) -> Any:
    """float64 where x is, and only there."""
    if weight is None or (weight.dtype == torch.float64) == (x.dtype == torch.float64):
        return weight
    return weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class _NormRope(Fused):
    """Gradients: csrc/norm_rope/norm_rope.h. Angles have one too, by the formula in plain torch."""

    name = "norm_rope"
    operands = ("x", "weight")

    def value(self, options, x, weight, cos, sin):
        return reference.norm_rope(x, weight, cos, sin, options[0])

    def empty(self, options, operands, pair):
        # Contiguous: the tokens of a head, which attention walks, follow one another.
        x = operands[0]
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        dy = results[1] if len(results) > 1 else None
        _launch(self.name, module.norm_rope, (*operands, *(tangents or (None, None))), (results[0], dy), options)

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        if any(needs[2:4]):
            with above_autograd():
                return self.gradients(options, operands, tangents, gy, gdy)
        inputs = (*operands, *tangents)
        found: list[Tensor | None] = [torch.empty_like(v) if n else None for v, n in zip(inputs, needs, strict=True)]
        gx, gweight, _, _, gdx, gdweight = (*found, None, None)[:6]
        given = (*operands, *(tangents or (None, None)), gy, gdy)
        _launch(self.name, module.norm_rope_backward, given, (gx, gweight, gdx, gdweight), options)
        return found


def _launch(name: str, function: Any, inputs: Any, outputs: Any, options: tuple[float, ...]) -> None:
    """Runs the kernel on rows, each of which is one run of memory; what does not lie so is copied."""
    if function((*inputs, *outputs), *options):
        return
    inputs = [None if x is None else x.resolve_neg().contiguous() for x in inputs]
    results = [None if y is None else torch.empty_like(y, memory_format=torch.contiguous_format) for y in outputs]
    check(name, function((*inputs, *results), *options))
    for y, result in zip(outputs, results, strict=True):
        if y is not None and result is not None:
            y.copy_(result)


fused = _NormRope()
