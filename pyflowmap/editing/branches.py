"""`Branches`: velocities at two points under two conditions at one time, from as few network calls as can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate
from ..arguments import condition_of, uniform
from ..flow_map import FlowMap
from ..guidance import Guidance
from ..guidance.guidance import guided
from ..interpolants import Linear
from ..solvers import Port, Solver, time_grid
from ..solvers.buffers import Packed
from ..view import View

__all__ = ["Branches", "check_guidance", "conditions_of", "in_model_time", "linear_time", "refuse_grad", "times_of"]

Asked = tuple[tuple[int, ...], ...]  # per branch: which of its conditions


class Branches:
    """`branches((x_a, x_b), t)` is one lazy velocity per branch; a point that is None is not evaluated.

    A branch is a condition and a guidance, None for none. The points are written into one network argument in one
    launch, one copy per condition that the branch's guidance batches, and one network call serves all. Where the
    conditions cannot be stacked (other keys, rows that are no rows, `batched=False`) each has its own call.

    A guidance may ask for fewer conditions at some times (an interval). What it asked last time is what the shared
    call computes this time; what is then missing is one call more.
    """

    def __init__(
        self,
        model: FlowMap,
        branches: Sequence[tuple[Mapping[str, Any], Guidance | None]],
        like: Tensor,  # (B, ...) the points
        dtype: torch.dtype | None = None,  # of what the network is given; None: the points'
    ) -> None:
        self.model, self.like = model, like
        self.views = [View(model, condition, guidance, like=like, dtype=dtype) for condition, guidance in branches]
        self.slots = [view.port.slots for view in self.views]
        self.batched = all(getattr(guidance, "batched", True) for _, guidance in branches)
        self.expected: Asked = tuple([tuple(range(n)) for n in self.slots])
        self.argument: Packed | None = None
        self.dtype = dtype
        self._stacked: dict[Asked, dict[str, Any] | None] = {}

    def __call__(self, points: Sequence[Lazy | None], t: float) -> tuple[Any, ...]:
        if self.argument is None:
            self.argument = Packed.empty(self.like, Port(sum(self.slots), self.dtype))
        scale = self.views[0].port.scale
        factor = 1.0 if scale is None else scale(t)
        live = [(x * factor, out) for x, out in zip(self._copies(points), self.argument.parts) if x is not None]
        arguments, outs = zip(*live)
        evaluate(*arguments, out=outs)
        asked: list[set[int]] = [set() for _ in self.views]
        known = self._shared(points, t)
        found = []
        for k, (x, view) in enumerate(zip(points, self.views)):
            found.append(None if x is None else self._velocity(k, view, x, t, known, asked[k]))
        if None not in points:
            self.expected = tuple([tuple(sorted(each)) for each in asked])
        return tuple(found)

    def _copies(self, points: Sequence[Lazy | None]) -> list[Lazy | None]:
        return [x for x, n in zip(points, self.slots) for _ in range(n)]

    def _shared(self, points: Sequence[Lazy | None], t: float) -> dict[tuple[int, int], Tensor]:
        """The outputs that one call gives at once, by (branch, condition)."""
        which = tuple([() if x is None else each[:n] for x, each, n in zip(points, self.expected, self.slots)])
        rows = [(k, i) for k, each in enumerate(which) for i in each]
        if len(rows) < 2 or not self.batched:
            return {}
        if which not in self._stacked:
            self._stacked[which] = stacked([self.views[k].conditions[i] for k, i in rows], self.like)
        condition = self._stacked[which]
        if condition is None:
            return {}
        # Copies of one point are alike; the last of the first branch and the first of the second lie side by side.
        outputs = self._call(self.model, self.slots[0] - len(which[0]), len(rows), t, condition)
        size = self.like.shape[0]
        return {row: outputs.narrow(0, j * size, size) for j, row in enumerate(rows)}

    def _call(self, model: FlowMap, start: int, count: int, t: float, condition: Mapping[str, Any]) -> Tensor:
        assert self.argument is not None
        size = self.like.shape[0]
        argument = self.argument.whole.narrow(0, start * size, count * size)
        time = self.views[0].model_time(t)
        row = torch.full((count * size,), time, dtype=self.views[0].wide, device=self.like.device)
        return model.output(argument, row, row, condition)

    def _velocity(self, k: int, view: View, x: Lazy, t: float, known: dict, asked: set[int]) -> Lazy:
        first = sum(self.slots[:k])

        def ask(*which: int, model: FlowMap | None = None) -> list[Lazy]:
            velocities = []
            for i in which:
                if model is not None and model is not self.model:
                    output = self._call(model, first, 1, t, view.conditions[i])
                else:
                    asked.add(i)
                    if (k, i) not in known:
                        known[k, i] = self._call(self.model, first, 1, t, view.conditions[i])
                    output = known[k, i]
                velocities.append(view.velocity(model or self.model, output, x, t))
            return velocities

        return ask(0)[0] if view.guidance is None else guided(view.guidance, ask, x, t, t, len(view.conditions))


def stacked(conditions: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Any] | None:
    """Several conditions as one of as many times the rows; None where they cannot be."""
    first, rows = conditions[0], like.shape[0]
    if any(each.keys() != first.keys() for each in conditions):
        return None
    result = {}
    for key in first:
        values = [each[key] for each in conditions]
        if all(isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == rows for v in values):
            if any(v.shape != values[0].shape or v.dtype != values[0].dtype for v in values):
                return None
            result[key] = torch.cat(values)
        elif all(v is values[0] for v in values):
            result[key] = values[0]
        else:
            return None
    return result


def check_guidance(guidance: Callable | None, name: str, editor: str) -> Guidance | None:
    if guidance is None:
        return None
    if not isinstance(guidance, Guidance):
        raise TypeError(
            f"{name} is {type(guidance).__name__}; pass an object such as pfm.guidance.cfg(3.0, null={{'label': 10}}), "
            "or subclass pfm.guidance.Guidance"
        )
    try:
        guidance.check(Solver(_euler, editor, 1, 1))  # an editor takes Euler's steps, in order and once
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return guidance


def _euler(velocity: Any, x: Any, s: Any, t: Any, memory: Any) -> Any:
    return x + (t - s) * velocity(x, s), memory


def times_of(steps: int | None, grid: Sequence[float] | Tensor | None, usual: int) -> list[float]:
    """The grid, or equal steps from 0 to 1: `steps` of them, or as many as are usual."""
    if grid is None:
        return uniform(usual if steps is None else steps)
    times = time_grid(grid)
    if steps is not None and steps != len(times) - 1:
        raise ValueError(f"steps = {steps} with a grid of {len(times) - 1} steps; leave steps out")
    return times


def conditions_of(name: str, condition: Mapping[str, Any] | None, x: Tensor) -> dict[str, Any]:
    """`condition` of the image `x`, checked."""
    for key, value in dict(condition).items() if isinstance(condition, Mapping) else ():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name}: condition {key!r} has {value.shape[0]} rows but x_source has {x.shape[0]}; give one row per "
                "image"
            )
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"{name}: condition {key!r} is on {value.device} but x_source is on {x.device}; move one")
    return condition_of(condition, x)


def linear_time(model: FlowMap, r: float) -> float:
    """The model's own time on the linear path; see `pyflowmap.view`."""
    return r if isinstance(model.interpolant, Linear) else model.interpolant.linear_time(r)


def in_model_time(callback: Callable[[dict], None], model: FlowMap) -> Callable[[dict], None]:
    path = model.interpolant
    if isinstance(path, Linear):
        return callback
    return lambda record: callback({**record, "s": path.model_time(record["s"]), "t": path.model_time(record["t"])})


def refuse_grad(**tensors: Any) -> None:
    """An edit records nothing for backward; say so rather than drop a gradient."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but nothing is recorded for backward here; pass {name}.detach()")
