"""`time_embedding`: two times as cosines and sines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyflowmap import reference

from .fused import Fused, check
from .fused_formula import above_autograd
from .modulation import check_floating, of_one_kind

__all__ = ["time_embedding", "time_embedding_dual"]

_SECONDS = ("end", "span")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def time_embedding(
    s: Any,  # (B,) Tensor or Dual: the time a jump starts from
    t: Any,  # (B,) Tensor or Dual: the time it goes to
    frequencies: Any,  # (h,)
    *,
    second: str = "span",
    dtype: torch.dtype | None = None,
) -> Any:
    """y = [cos(w a), sin(w a), cos(w b), sin(w b)] with w = frequencies and a = s: (B, 4h), of `dtype`, else float32.

        second="span"  b = t - s        second="end"   b = t

    The angles are float32 whatever the dtypes (float64 where a time is): in bfloat16 w t is off by up to 0.4 radians at
    w = 100. Of a Dual, value and tangent. The frequencies are constants of a tangent.
    Vaswani et al. 2017, sec. 3.5; the span beside s: Boffi et al. 2025.

    Raises ValueError where shapes do not fit, TypeError for integers.

    >>> time_embedding(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([[ 1.0000,  0.0000, -0.9900,  0.1411]])
    """
    if has_torch_function((s, t, frequencies)):
        return handle_torch_function(time_embedding, (s, t, frequencies), s, t, frequencies, second=second, dtype=dtype)
    options, operands, dtype = _operands(s, t, frequencies, second, dtype)
    return fused(options, operands).to(dtype)


def time_embedding_dual(
    s: Any,
    t: Any,
    frequencies: Any,
    *,
    tangents: tuple[Any, ...],
    tracked: bool,
    second: str = "span",
    dtype: torch.dtype | None = None,
) -> Any:
    """(y, dy) of tensors and the tangents (ds, dt)."""
    options, operands, dtype = _operands(s, t, frequencies, second, dtype)
    wide = operands[0].dtype == torch.float64
    moved = tuple(d.double() if wide and d is not None else d for d in tangents)
    y, dy = fused(options, operands, moved, tracked)
    return y.to(dtype), dy.to(dtype)


def _operands(s: Any, t: Any, frequencies: Any, second: str, dtype: torch.dtype | None) -> tuple[Any, Any, torch.dtype]:
    check_floating("time_embedding", s=s, t=t, frequencies=frequencies)
    if second not in _SECONDS:
        raise ValueError(f'time_embedding: second = {second!r}; it is "span" or "end"')
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"time_embedding: dtype = {dtype}; it is one of {', '.join(map(str, _DTYPES))}")
    if len(s.shape) != 1 or s.shape != t.shape:
        raise ValueError(
            f"time_embedding: s has shape {tuple(s.shape)} and t has shape {tuple(t.shape)}; both are (B,), one time "
            "per sample"
        )
    if len(frequencies.shape) != 1 or frequencies.shape[0] < 1:
        raise ValueError(f"time_embedding: frequencies has shape {tuple(frequencies.shape)}; it is (h,)")
    s, t = of_one_kind((s, t))
    wide = s.dtype == torch.float64
    stored = torch.float64 if wide else torch.float32 if dtype == torch.float64 else dtype
    options = (float(_SECONDS.index(second)), float(_DTYPES.index(stored)))
    return options, (s, t, frequencies.to(torch.float64 if wide else torch.float32).contiguous()), dtype


class _TimeEmbedding(Fused):
    """Gradients: csrc/time_embedding/time_embedding.h. Frequencies have one too, by the formula in plain torch."""

    name = "time_embedding"
    operands = ("s", "t")

    def value(self, options, s, t, frequencies):
        return reference.time_embedding(s, t, frequencies, bool(options[0])).to(_DTYPES[int(options[1])])

    def empty(self, options, operands, pair):
        s, _, frequencies = operands
        shape = (s.shape[0], 4 * frequencies.shape[0])
        return [torch.empty(shape, dtype=_DTYPES[int(options[1])], device=s.device) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        dy = results[1] if len(results) > 1 else None
        given = _plain((*operands, *(tangents or (None, None))))
        check(self.name, module.time_embedding((*given, results[0], dy), options[0]))

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        if needs[2]:
            with above_autograd():
                return self.gradients(options, operands, tangents, gy, gdy)
        inputs = (*operands, *tangents)
        found: list[Tensor | None] = [torch.empty_like(v) if n else None for v, n in zip(inputs, needs, strict=True)]
        gs, gt, _, gds, gdt = (*found, None, None)[:5]
        given = _plain((*operands, *(tangents or (None, None)), _dense(gy), _dense(gdy)))
        check(self.name, module.time_embedding_backward((*given, gs, gt, gds, gdt), options[0]))
        return found


def _plain(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if x is None else x.resolve_neg() for x in tensors]


def _dense(g: Tensor | None) -> Tensor | None:
    return None if g is None else g if g.stride(-1) == 1 else g.contiguous()


fused = _TimeEmbedding()
