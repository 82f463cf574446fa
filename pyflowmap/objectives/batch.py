"""What objectives do with a batch: check it, and split it into rows that learn different things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..flow_map import FlowMap

__all__ = ["check_inputs", "check_share", "pairs_of", "rows_of", "whole"]


def check_inputs(
    flow_map: FlowMap, x1: Tensor, x0: Tensor | None, weight: Callable, teacher: FlowMap | None = None
) -> None:
    """One-line errors for what every objective is given."""
    for name, each in (("flow_map", flow_map), ("teacher", flow_map if teacher is None else teacher)):
        if not isinstance(each, FlowMap):
            raise TypeError(f"{name} is {type(each).__name__}; wrap the network: pfm.FlowMap(network, call=...)")
    if not callable(weight):
        raise TypeError(
            f"weight = {weight!r}; it is a function of (error, s=, t=, size=), e.g. pfm.weights.constant(2)"
        )
    if not isinstance(x1, Tensor) or not x1.is_floating_point() or x1.dim() < 2:
        shown = f"{x1.dtype} of shape {tuple(x1.shape)}" if isinstance(x1, Tensor) else type(x1).__name__
        raise TypeError(f"x1 is {shown}; data is a floating-point tensor (B, ...), e.g. x1.float()")
    if x1.shape[0] == 0:
        raise ValueError(f"x1 has shape {tuple(x1.shape)}: an empty batch has no loss; skip it")
    if x0 is not None and x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}; give them one shape")


def check_share(share: float, name: str) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} = {share}; it is a share of the batch, e.g. 0.75")


def pairs_of(times: Callable, x1: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """(s, t) as the law `times` draws them, a row each."""
    drawn = times(x1) if seed is None else times(x1, seed=seed)
    if isinstance(drawn, Tensor) and drawn.dim() > 1 and len(drawn) == 2:
        drawn = drawn.unbind(0)
    pair = isinstance(drawn, (tuple, list)) and len(drawn) == 2
    if not pair or not all(isinstance(t, Tensor) and t.shape[:1] == x1.shape[:1] for t in drawn):
        shown = " and ".join(_shown(t) for t in drawn) if isinstance(drawn, (tuple, list)) else _shown(drawn)
        raise ValueError(
            f"times gave {shown}; here it is a law of pairs, two tensors ({x1.shape[0]},), e.g. pfm.times.uniform_pair"
        )
    return drawn[0], drawn[1]


def rows_of(condition: Mapping[str, Any], rows: int, start: int, stop: int) -> dict[str, Any]:
    """The condition of rows start to stop of `rows`; what has no row per sample is shared."""
    return {
        key: value[start:stop] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows else value
        for key, value in condition.items()
    }


def whole(expected: float, rows: int, seed: int | None) -> int:
    """`expected` of `rows` rows as a whole number, rounded at random so that its mean is kept: host only, no sync.

    Compiled code cannot branch on a random number: there it is the nearest one that leaves out neither part.
    """
    low = int(expected)
    if expected == low:
        return low
    if torch.compiler.is_compiling():
        if rows == 1:
            raise ValueError(
                "a batch of one row cannot be shared out in compiled code; compile the network alone, or use more rows"
            )
        return min(max(int(expected + 0.5), 1), rows - 1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return low + int(torch.rand((), generator=generator).item() < expected - low)


def _shown(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
