"""The loop under adaptive Runge-Kutta solvers: tries a step, measures its error, takes it or tries a shorter one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..algebra import Lazy, evaluate, lazy
from ..ops.error_norm import error_norm
from .stages import Stages, tensor_of
from .step_control import Plan, StepControl

__all__ = ["Adaptive", "Tableau", "adaptive", "weigh"]

_LEAST_REST = 1e-6  # several of float32's last places at 1, and an error of its square
_LEAST_SPAN = 1e-12


class Adaptive(NamedTuple):
    """What an adaptive run returns."""

    x: Tensor  # (B, ...) the state at the last time, or (times, B, ...) with trajectory=True; on the model's own path
    converged: Tensor  # (B,) bool: reached the last time. Else x is the state where it stopped, or NaN
    nfe: int  # network evaluations, each of the whole batch
    accepted: int | Tensor  # steps; with control="sample" (B,), else one number for all
    rejected: int | Tensor
    t: float | Tensor  # the time reached, likewise

    def explain(self, model_time: Callable[[float], float] = float) -> str | None:
        """What to warn of, None where every sample has converged; `model_time`: the time to speak of."""
        missing = (~self.converged).nonzero().flatten().tolist()
        if not missing:
            return None
        times = self.t[missing].tolist() if isinstance(self.t, Tensor) else [self.t]
        low, high = (f"{model_time(each):.4g}" for each in (min(times), max(times)))
        where = f"t = {low}" if low == high else f"t between {low} and {high}"
        return (
            f"{len(missing)} of {len(self.converged)} samples did not reach the end of the grid: stopped at {where} "
            f"after {self.nfe} network evaluations; raise max_nfe or the tolerances"
        )


class Tableau(NamedTuple):
    """An embedded pair whose last stage is the next step's first. Raises at import where its sums are off."""

    c: tuple[float, ...]  # the stages' times
    a: tuple[tuple[float, ...], ...]  # row i weighs the stages before i; the last row is the step
    error: tuple[float, ...]  # the step's weights less those of the lower order
    order: int


def weigh(row: tuple[float, ...], k: list[Lazy]) -> Lazy:
    """sum_j row_j k_j; what has weight 0 is not read."""
    total: Lazy | None = None
    for weight, each in zip(row, k):
        if weight != 0.0:
            total = each * weight if total is None else total + each * weight
    if total is None:
        raise ValueError(f"the row {row} has no weight; a stage is formed of at least one before it")
    return total


def _checked(tableau: Tableau) -> Tableau:
    off = [abs(sum(row) - c) for row, c in zip(tableau.a, tableau.c)] + [abs(sum(tableau.error))]
    if max(off) > 1e-14:
        raise ValueError(f"a row of the tableau is off by {max(off):.3g}; each sums to its c, the error to 0")
    return tableau


def adaptive(tableau: Tableau) -> Callable:
    """The loop of `tableau`, for `Solver.loop`."""
    _checked(tableau)

    def loop(solver, field, x, times, port, draws, grad, callback, progress, trajectory):
        start = x if port.scale is None else evaluate(lazy(x) * (1.0 / port.scale(times[0])), dtype=x.dtype)
        run = _Run(tableau, solver.options, field, start, times, port, grad)
        return run.through(x, start, callback, progress, trajectory)

    return loop


def _rest(span: float, tolerance: float) -> float:
    """How far from an end without a velocity the last Runge-Kutta step ends: of the whole span, so that it does not
    depend on the times between, and not so little that a time there is rounded to the end."""
    if abs(span) < _LEAST_SPAN:
        raise ValueError(
            f"the grid is {abs(span):.3g} long and ends where the network's prediction has no velocity (0/0); "
            "begin it further from that end"
        )
    length = max(0.1 * tolerance**0.5 * abs(span), _LEAST_REST)
    return math.copysign(min(length, 0.5 * abs(span)), span)


class _Run:
    def __init__(self, tableau, options, field, x, times, port, grad):
        if times[0] in port.singular:
            raise ValueError(
                f"the grid starts at {times[0]:g}, where the network's prediction has no velocity (0/0); start it a "
                "little further on, e.g. by 1e-3"
            )
        self.tableau, self.options, self.times = tableau, options, times
        scale = 2.0 / 3.0 if options["error"] == "shampine" else 1.0
        self.weights = tuple([scale * each for each in tableau.error])
        self.stages = Stages(field, x, port, len(tableau.a), bool(grad))
        self.again, self.recorded = grad == "checkpoint", bool(grad)
        self.nfe, self.taken = 0, 0
        self.scale, self.last = port.scale, times[-1]
        if self.last in port.singular:
            self.last -= _rest(times[-1] - times[0], options["rtol"] + options["atol"])
        self.control = StepControl(x, times[0], self.last, options["control"] == "sample", tableau.order)
        if getattr(field, "exact_times", False):
            self.control.time_type = torch.float64

    def through(self, given: Tensor, x: Tensor, callback: Any, progress: bool, trajectory: bool) -> Adaptive:
        """From `given`, which is x on the linear path; what is returned is on the model's own path again."""
        grid = self.times
        kept = [given] if trajectory else None
        bar = None
        if progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=1.0, desc="sampling", leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
        if x.numel() == 0:
            self.control.t[:] = self.control.end = grid[-1]
            return Adaptive(given if kept is None else torch.stack([given] * len(grid)), *self._outcome())
        k, sign = self._begin(x), self.control.sign
        seen = given
        for goal in grid[1:] if trajectory else grid[-1:]:
            beyond = sign * (goal - self.last) > 0.0  # near an end without a velocity: straight on from `last`
            x, k = self._towards(self.last if beyond else goal, x, k, callback, bar)
            if beyond:
                h, reached = self.control.leap(goal)
                seen = self._shown(tensor_of(lazy(x) + k * h, x.dtype), reached)
            else:
                seen = self._shown(x)
            if kept is not None:
                kept.append(seen.clone() if seen is x and not self.recorded else seen)
        if self.last != grid[-1]:
            self.control.finish(grid[-1])
        if bar is not None:
            bar.close()
        if kept is not None:
            return Adaptive(torch.stack(kept), *self._outcome())
        return Adaptive(seen.clone() if seen is given else seen, *self._outcome())

    def _outcome(self) -> tuple:
        converged, *rest = self.control.outcome()
        return converged, self.nfe, *rest

    def _shown(self, x: Tensor, times: np.ndarray | None = None) -> Tensor:
        """x on the model's own path at the times that the samples have reached; NaN for those that are lost."""
        factor: Any = self.control.marks()
        if self.scale is not None:
            scale = self._scales(self.control.t if times is None else times)
            factor = scale if factor is None else factor * scale
        return x if factor is None else evaluate(lazy(x) * factor, dtype=x.dtype)

    def _scales(self, times: np.ndarray) -> Any:
        """The path's scale at `times`: one number where they agree, else (B,)."""
        assert self.scale is not None
        if (times == times[0]).all():
            return self.scale(float(times[0]))
        return torch.tensor([self.scale(each) for each in times.tolist()], dtype=torch.float64).to(self.control.device)

    def _begin(self, x: Tensor) -> Lazy:
        """The first velocity and the length of the first step. Hairer, Norsett & Wanner 1993, II.4."""
        control, stages, first = self.control, self.stages, self.options["first_step"]
        still = np.zeros_like(control.h)
        k = [stages.begin(control.plan(still, (0.0,)).times[0])]
        self.nfe = 1
        of_velocity = self._sums(k, (1.0,), x, x)
        if first is not None:
            control.h[:] = first
            control.look(of_velocity)
            return k[0]
        h0 = control.guess(self._sums([lazy(x)], (1.0,), x, x), of_velocity)
        step = control.plan(control.sign * h0, (1.0,))
        stages.ask(1, step.times[0], lambda: lazy(x) + k[0] * step.h, k)
        stages.settle(k)
        self.nfe = 2
        control.begin(h0, self._sums(k, (-1.0, 1.0), x, x))
        return k[0]

    def _towards(self, goal: float, x: Tensor, k: Lazy, callback: Any, bar: Any) -> tuple[Tensor, Lazy]:
        control, most, cost = self.control, self.options["max_nfe"], len(self.tableau.a) - 1
        control.aim(goal)
        while control.active.any() and self.nfe + cost <= most:
            before = control.slowest()
            plan = control.plan(control.propose(), self.tableau.c[1:])
            x_next, k_next, sums = (self._kept if self.again else self._attempt)(plan, x, k)
            self.nfe += cost
            choice = control.judge(sums)
            if choice is False:
                continue
            x, k = self.stages.accept(x, x_next, k, k_next, choice)
            self.taken += 1
            if bar is not None:
                bar.update(abs(control.slowest() - before) / abs(self.times[-1] - self.times[0]))
            if callback is not None:
                seen = self._shown(x)
                callback(
                    {
                        "step": self.taken,
                        "steps": None,
                        "s": before,
                        "t": control.slowest(),
                        "x": seen.clone() if seen is x else seen,
                        "nfe": self.nfe,
                    }
                )
        return x, k

    def _attempt(self, plan: Plan, x: Tensor, k1: Lazy) -> tuple[Tensor, Lazy, Tensor]:
        """One step tried: the new state, its velocity, and the squared errors per sample."""
        state, k, rows, h = lazy(x), [k1], self.tableau.a, plan.h
        x_next: Any = None
        for i in range(1, len(rows)):
            point = lambda row=rows[i]: state + weigh(row, k) * h  # noqa: E731
            x_next = self.stages.ask(i, plan.times[i - 1], point, k, keep=i + 1 == len(rows))
        self.stages.settle(k)
        return x_next, k[-1], self._sums(k, self.weights, x, x_next, h)

    def _kept(self, plan: Plan, x: Tensor, k1: Lazy) -> tuple[Tensor, Lazy, Tensor]:
        """The same, but of all tensors backward finds x and k1 only, and tries the step again."""
        found: list[Tensor] = []

        def attempt(x, k1):
            x_next, k_next, sums = self._attempt(plan, x, lazy(k1))
            found[:] = [sums]
            return x_next, tensor_of(k_next, x.dtype)

        x_next, k_next = checkpoint(attempt, x, tensor_of(k1, x.dtype), use_reentrant=False)
        return x_next, lazy(k_next), found[0]

    def _sums(self, k: list[Lazy], weights: tuple[float, ...], x: Tensor, y: Tensor, h: Any = 1.0) -> Tensor:
        """Per sample, the sum of squares of h sum_j w_j k_j in tolerances."""
        number = h if type(h) is float else 1.0
        pairs = [(w * number * each.coefficients[0], each.operands[0]) for w, each in zip(weights, k) if w != 0.0]
        return error_norm(
            [operand.detach() for _, operand in pairs],
            [c for c, _ in pairs],
            x.detach(),
            y.detach(),
            self.options["rtol"],
            self.options["atol"],
            None if type(h) is float else h,
        )
