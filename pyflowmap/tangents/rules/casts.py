"""Casts and moves: the tangent goes where the value went. An integer has none."""

from __future__ import annotations

from torch import Tensor

from ..parts import tangent
from ..registry import constant, rule


@rule(
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "cfloat", "cdouble", "chalf",
    view="self",
)  # fmt: skip
def _to(y, input, *rest, **options):
    if tangent(input) is None or not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
        return None  # x.type() is a string; of plain.to(dual), only the dtype is used
    return tangent(input).to(y.device, y.dtype, non_blocking=bool(options.get("non_blocking", False)))


constant("bool", "byte", "char", "short", "int", "long")
