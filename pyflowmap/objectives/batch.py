"""What objectives do with a batch: check it, draw its path, and split it into rows that learn different things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..algebra import inner, lazy
from ..flow_map import FlowMap
from .loss import Loss

__all__ = [
    "Batch",
    "check_inputs",
    "check_share",
    "draw_pairs",
    "draw_path",
    "described",
    "flow_matching_error",
    "loss_of",
    "seeded",
    "whole",
]


@dataclass(frozen=True)
class Batch:
    """Points of the path with their velocity and times; the first `equal` rows have t = s."""

    x: Tensor  # (B, ...) x_s
    velocity: Tensor  # (B, ...) dx_s/ds
    s: Tensor  # (B,)
    t: Tensor  # (B,)
    condition: dict[str, Any]
    equal: int
    sample_ids: Tensor | None = None  # (B,)

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def size(self) -> int:
        """Elements of a sample."""
        return self.x[0].numel()

    @property
    def near(self) -> Batch | None:
        """The rows of plain flow matching, t = s."""
        return self._rows(0, self.equal) if self.equal > 0 else None

    @property
    def far(self) -> Batch | None:
        """The rows that learn a jump."""
        return self._rows(self.equal, len(self)) if self.equal < len(self) else None

    def _rows(self, start: int, stop: int) -> Batch:
        if (start, stop) == (0, len(self)):
            return self
        return Batch(
            self.x[start:stop],
            self.velocity[start:stop],
            self.s[start:stop],
            self.t[start:stop],
            rows_of(self.condition, start, stop),
            min(max(self.equal - start, 0), stop - start),
            None if self.sample_ids is None else self.sample_ids[start:stop],
        )


def draw_pairs(
    flow_map: FlowMap,
    x1: Tensor,
    x0: Tensor | None,
    condition: Mapping[str, Any] | None,
    times: Callable,
    equal: float,
    seed: int | None,
    sample_ids: Tensor | None,
) -> Batch:
    """A batch with pairs of times, of which an expected share `equal` has t = s."""
    rows = x1.shape[0]
    n = whole(equal * rows, rows, seed)
    _check_law(times, "pfm.times.uniform_pair")
    drawn = times(x1, **seeded(seed, sample_ids))
    if isinstance(drawn, Tensor) and drawn.dim() > 1 and len(drawn) == 2:
        drawn = drawn.unbind(0)
    pair = isinstance(drawn, (tuple, list)) and len(drawn) == 2
    if not pair or not all(isinstance(t, Tensor) and t.shape[:1] == x1.shape[:1] for t in drawn):
        shown = " and ".join(described(t) for t in drawn) if isinstance(drawn, (tuple, list)) else described(drawn)
        raise ValueError(
            f"times gave {shown}; here it is a law of pairs, two tensors ({x1.shape[0]},), e.g. pfm.times.uniform_pair"
        )
    s, t = drawn
    t = torch.cat([s[:n], t[n:]])
    x, velocity = flow_map.interpolant.draw(x1, s, x0=x0, seed=seed, sample_ids=sample_ids)
    return Batch(x, velocity, s, t, condition_of(condition, x1.shape[0]), n, sample_ids)


def draw_path(
    flow_map: FlowMap,
    x1: Tensor,
    x0: Tensor | None,
    condition: Mapping[str, Any] | None,
    times: Callable,
    seed: int | None,
    sample_ids: Tensor | None,
) -> Batch:
    """A batch with one time per row: all of it is flow matching."""
    _check_law(times, "pfm.times.uniform")
    t = times(x1, **seeded(seed, sample_ids))
    if isinstance(t, (tuple, list)):
        raise ValueError(f"times gave {len(t)} times; this takes a law of one, e.g. pfm.times.uniform")
    x, velocity = flow_map.interpolant.draw(x1, t, x0=x0, seed=seed, sample_ids=sample_ids)
    return Batch(x, velocity, t, t, condition_of(condition, x1.shape[0]), x1.shape[0], sample_ids)


def flow_matching_error(flow_map: FlowMap, batch: Batch) -> Tensor:
    """|| v_s(x_s) - dx_s/ds ||^2, the sum over a sample, (B,)."""
    output = flow_map.output(batch.x, batch.s, batch.t, batch.condition)
    return inner(flow_map.as_velocity(output, batch.x, batch.s) - lazy(batch.velocity))


def loss_of(batch: Batch, weight: Callable, **errors: Tensor | None) -> Loss:
    """The loss of errors (sums of squares) named in the order of the rows; None where no row has that part."""
    parts = {name: error for name, error in errors.items() if error is not None}
    error = torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
    shown = {name: part.detach().mean() / batch.size for name, part in parts.items()}
    return Loss(weight(error, s=batch.s, t=batch.t, size=batch.size), error.detach() / batch.size, shown)


def check_inputs(
    flow_map: FlowMap,
    x1: Tensor,
    x0: Tensor | None,
    weight: Callable,
    teacher: FlowMap | None = None,
    *,
    one_path: bool = True,
) -> None:
    """One-line errors for what every objective is given. `one_path`: the teacher is asked for velocities at points of
    the flow map's own path."""
    for name, each in (("flow_map", flow_map), ("teacher", flow_map if teacher is None else teacher)):
        if not isinstance(each, FlowMap):
            raise TypeError(f"{name} is {type(each).__name__}; wrap the network: pfm.FlowMap(network, call=...)")
    if one_path and teacher is not None and teacher.interpolant != flow_map.interpolant:
        raise ValueError(
            f"the teacher's path is {teacher.interpolant}, the flow map's {flow_map.interpolant}; a velocity "
            "belongs to one path, give both the same interpolant="
        )
    if not callable(weight):
        raise TypeError(
            f"weight = {weight!r}; it is a function of (error, s=, t=, size=), e.g. pfm.weights.constant(2)"
        )
    if isinstance(x1, Tensor) and x1.is_floating_point() and x1.dim() < 2:
        raise ValueError(f"x1 has shape {tuple(x1.shape)}; data is a batch (B, ...), e.g. x1[:, None] or x1[None]")
    if not isinstance(x1, Tensor) or not x1.is_floating_point():
        shown = f"{x1.dtype} of shape {tuple(x1.shape)}" if isinstance(x1, Tensor) else type(x1).__name__
        raise TypeError(f"x1 is {shown}; data is a floating-point tensor (B, ...), e.g. x1.float()")
    if x1.shape[0] == 0:
        raise ValueError(f"x1 has shape {tuple(x1.shape)}: an empty batch has no loss; skip it")
    if x0 is not None and x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}; give them one shape")


def check_share(share: float, name: str) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} = {share}; it is a share of the batch, e.g. 0.75")


def condition_of(condition: Any, rows: int) -> dict[str, Any]:
    """The condition as keywords; every tensor in it, also inside dicts and tuples, has a row per sample or no rows."""
    if condition is not None and not isinstance(condition, Mapping):
        raise TypeError(f'condition is {type(condition).__name__}; pass keywords for the network, e.g. {{"label": y}}')
    for key, value in (condition or {}).items():
        bad = next((x for x in tree_leaves(value) if isinstance(x, Tensor) and x.dim() and x.shape[0] != rows), None)
        if bad is not None:
            raise ValueError(
                f"condition {key!r} has {bad.shape[0]} rows for a batch of {rows}; give one row per sample, and what "
                "all samples share as a number, a 0-d tensor or part of call="
            )
    return dict(condition or {})


def rows_of(condition: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The condition of rows start to stop: of its tensors, also inside dicts and tuples."""
    return tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) and x.dim() else x, dict(condition))


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


def _check_law(times: Any, such_as: str) -> None:
    if not callable(times):
        raise TypeError(f"times is {type(times).__name__}; it is a law, called as times(x1), e.g. {such_as}")


def seeded(seed: int | None, sample_ids: Tensor | None) -> dict[str, Any]:
    """The keywords that a law of times is called with: only what was given, so that a law of one's own needs none."""
    if sample_ids is not None and seed is None:
        raise ValueError("sample_ids need a seed: what is drawn depends on (seed, sample id); pass seed=")
    given = {"seed": seed, "sample_ids": sample_ids}
    return {key: value for key, value in given.items() if value is not None}


def described(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
