"""`View`: a flow map as a solver sees it, conditions and guidance applied: on the linear path, in linear time.

Every affine Gaussian path X_r = alpha(r) x1 + sigma(r) x0 is the linear one, x_t = t x1 + (1-t) x0, after

    x = X / (alpha + sigma),      t = alpha / (alpha + sigma)

with the same data and noise predictions and the velocity b = x1 - x0. So no solver knows of any path but the linear
one; the network is still asked with its own (X, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .algebra import Lazy, lazy
from .flow_map import FlowMap
from .guidance.guidance import guided
from .interpolants import Linear
from .predictions import jump_coefficients, linear_velocity_coefficients
from .solvers import Port

__all__ = ["View", "singular_times"]


class View:
    """The field of `solvers.integrate` for a flow map: `view(argument, x, t)` or `view(argument, x, s, t)`."""

    exact_times = True  # per-sample times may come in float64: coefficients near an end are made of 1 - t

    def __init__(
        self,
        model: FlowMap,
        condition: Mapping[str, Any],
        guidance: Any = None,
        *,
        takes: str = "velocity",
        like: Tensor,  # (B, ...) the state
        dtype: torch.dtype | None = None,  # of the network's argument; None: the state's
    ) -> None:
        self.model, self.takes, self.like = model, takes, like
        self._guidance = guidance
        self.begin()
        self.conditions = (condition,) if guidance is None else guidance.conditions(condition)
        slots = 1 if guidance is None else guidance.slots(condition)
        path = model.interpolant
        self.linear = isinstance(path, Linear)
        scale = None if self.linear else lambda t: path.scale(path.model_time(t))
        singular = singular_times(model)
        self.port = Port(slots, dtype, scale, singular if guidance is None else singular | guidance.singular)
        self.wide = torch.float64 if (dtype or like.dtype) == torch.float64 else torch.float32  # of the network's times
        self.expected = 2 if takes == "jump" else 1
        self.watched = not torch.compiler.is_compiling()
        self.rows: dict[tuple[float, int], Tensor] = {}
        self._packed: dict[Any, Mapping[str, Any]] = {}

    def begin(self) -> None:
        """A run starts: a guidance that remembers starts afresh."""
        self.guidance = None if self._guidance is None else self._guidance.begin()

    # ---- times ---------------------------------------------------------------------------------------------------

    def linear_time(self, r: float) -> float:
        """The path's own time as linear time."""
        return r if self.linear else self.model.interpolant.linear_time(r)

    def model_time(self, t: Any) -> Any:
        """Linear time as the network's own."""
        return t if self.linear else self.model.interpolant.model_time(t)

    def prepare(self, times: Sequence[float]) -> None:
        """Put the times that the run will ask for on the device, once, as rows of a table."""
        rows = self.like.shape[0]
        own = [self.model_time(t) for t in times]
        with _versioned():
            for count in {1, self.port.slots}:
                column = torch.tensor(own, dtype=self.wide).to(self.like.device)[:, None]
                table = column.expand(-1, count * rows).contiguous()
                self.rows.update(zip(((t, count) for t in times), table.unbind(0)))

    def _row(self, t: Any, count: int) -> Tensor:
        if isinstance(t, Tensor):  # per sample
            with _versioned():
                t = self.model_time(t).to(self.wide)  # as the rows of the table
                t = t.expand(self.like.shape[0]) if t.dim() == 0 else t
                t = t.repeat(count, *(1,) * (t.dim() - 1)) if count > 1 else t
                return t.clone() if self.watched and t.is_inference() else t
        found = self.rows.get((t, count))
        if found is None:  # a time that no plan foresaw
            size = (count * self.like.shape[0],)
            with _versioned():
                found = torch.full(size, self.model_time(t), dtype=self.wide, device=self.like.device)
            self.rows[t, count] = found
        return found

    # ---- the field -----------------------------------------------------------------------------------------------

    def __call__(self, argument: Tensor, x: Lazy, *at: Any) -> Lazy:
        if len(at) != self.expected:
            raise TypeError(_miscounted(self.takes, len(at)))
        s, t = at[0], at[-1]
        if self.guidance is None:
            output = self._output(self.model, argument, s, t, 1, self.conditions[0])
            if self.takes == "jump":
                return self._jump(self.model, output, x, s, t)
            return self.velocity(self.model, output, x, s)

        def ask(*which: int, model: Any = None) -> list[Lazy]:
            """One velocity (of a jump: mean velocity) per condition named, of `model` in place of the view's own: a
            flow map, or a network to be called like the view's."""
            asked = self.model if model is None else self._other(model)
            outputs = self._outputs(asked, argument, s, t, which)
            make = self.mean_velocity if self.takes == "jump" else self.velocity
            return [make(asked, each, x, s, t) for each in outputs]

        mean = guided(self.guidance, ask, x, s, t, len(self.conditions))
        return x + (t - s) * mean if self.takes == "jump" else mean

    def _other(self, model: Any) -> FlowMap:
        if not isinstance(model, FlowMap):
            model = replace(self.model, network=model)
        if model.interpolant != self.model.interpolant:
            raise ValueError(
                f"a guidance asks a flow map on the path {model.interpolant!r}, but the model's is "
                f"{self.model.interpolant!r}; both must be on one path"
            )
        return model

    def _outputs(self, model: FlowMap, argument: Tensor, s: Any, t: Any, which: Sequence[int]) -> Sequence[Tensor]:
        slots = self.port.slots
        if slots > 1 and tuple(which) == tuple(range(slots)):
            together = self._packed.get("all")
            if together is None:
                together = self._packed["all"] = _stack(self.conditions, self.like)
            return self._output(model, argument, s, t, slots, together).chunk(slots)
        part = argument if slots == 1 else argument.narrow(0, 0, self.like.shape[0])
        return [self._output(model, part, s, t, 1, self.conditions[i]) for i in which]

    def _output(self, model: FlowMap, argument: Tensor, s: Any, t: Any, count: int, condition: Any) -> Tensor:
        start = self._row(s, count)
        end = start if t is s else self._row(t, count)
        if not self.watched:
            return model.output(argument, start, end, condition)
        before = start._version, end._version
        output = model.output(argument, start, end, condition)
        if (start._version, end._version) != before:
            raise RuntimeError(
                "the network changed its time argument in place (such as t.mul_), which later evaluations read; let it "
                "make a new tensor, e.g. t * 1000"
            )
        return output

    def velocity(self, model: FlowMap, output: Tensor, x: Lazy, s: Any, t: Any = None) -> Lazy:
        """What `model` returned at x as the linear path's velocity there."""
        r = self.model_time(s)
        c_x, c_p = linear_velocity_coefficients(model.prediction, model.interpolant, r)
        if not self.linear:
            c_x = c_x * model.interpolant.scale(r)
        return _combine(c_x, x, c_p * model.sign, output)

    def _jump(self, model: FlowMap, output: Tensor, x: Lazy, s: Any, t: Any) -> Lazy:
        path, r, q = model.interpolant, self.model_time(s), self.model_time(t)
        c_x, c_p = jump_coefficients(model.prediction, path, r, q)
        if not self.linear:
            c_x, c_p = c_x * path.scale(r) / path.scale(q), c_p / path.scale(q)
        return _combine(c_x, x, c_p * model.sign, output)

    def mean_velocity(self, model: FlowMap, output: Tensor, x: Lazy, s: Any, t: Any) -> Lazy:
        """What `model` returned at x as the mean velocity of its jump from s to t, on the linear path."""
        if self.linear:
            return model.as_mean_velocity(output, x, s, t)
        if isinstance(s, float) and s == t:
            return self.velocity(model, output, x, s)
        return (self._jump(model, output, x, s, t) - x) / (t - s)


def singular_times(model: FlowMap) -> frozenset[float]:
    """The ends of the path, in linear time, at which the network's prediction has no velocity (0/0)."""
    found = []
    for end in (0.0, 1.0):
        try:
            pair = linear_velocity_coefficients(model.prediction, model.interpolant, end)
        except (ValueError, ZeroDivisionError):
            pair = (float("inf"), 0.0)
        if any(abs(c) > 1e12 for c in pair):
            found.append(end)
    return frozenset(found)


def _versioned() -> Any:
    """Inside inference_mode, too, tensors that count what is written to them."""
    watched = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if watched else nullcontext()


def _miscounted(takes: str, given: int) -> str:
    if takes == "jump":
        return f"the step gave its jump {given} times; it is jump(x, s, t), from s to t"
    cure = '; a step of jumps says so: pfm.solvers.solver(takes="jump")(step)' if given == 2 else ""
    return f"the step gave its velocity {given} times; it is velocity(x, t), at one time{cure}"


def _combine(c_x: Any, x: Lazy, c_p: Any, output: Tensor) -> Lazy:
    prediction = c_p * lazy(output)
    return prediction if type(c_x) is float and c_x == 0.0 else c_x * x + prediction


def _stack(conditions: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Any]:
    """Several conditions as one of as many times the rows."""
    keys = [sorted(each) for each in conditions]
    if any(each != keys[0] for each in keys):
        raise ValueError(
            f"conditions name {keys[0]} and {next(k for k in keys if k != keys[0])}, so they cannot share one network "
            "call; pass batched=False to the guidance"
        )
    return {key: torch.cat([_rows(each[key], key, like) for each in conditions]) for key in keys[0]}


def _rows(value: Any, key: str, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != like.shape[0]:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"condition {key!r} is {shown}, not a tensor with {like.shape[0]} rows, so several conditions cannot share "
            "one network call; pass batched=False to the guidance"
        )
    return value
