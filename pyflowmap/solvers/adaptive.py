"""The loop under adaptive Runge-Kutta solvers: tries a step, measures its error, takes it or tries a shorter one."""

from __future__ import annotations

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


class Adaptive(NamedTuple):
    """What an adaptive run returns."""

    x: Tensor  # (B, ...) the state at the last time, or (times, B, ...) with trajectory=True
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
        return _Run(tableau, solver.options, field, x, times, port, grad).through(x, callback, progress, trajectory)

    return loop


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
        self.last = times[-1]
        if self.last in port.singular:
            rest = min(0.1 * (options["rtol"] + options["atol"]) ** 0.5, 0.5)
            self.last -= rest * (self.last - times[-2])
        self.control = StepControl(x, times[0], self.last, options["control"] == "sample", tableau.order)

    def through(self, x: Tensor, callback: Any, progress: bool, trajectory: bool) -> Adaptive:
        start, grid = x, self.times
        kept = [x] if trajectory else None
        bar = None
        if progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=1.0, desc="sampling", leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
        if x.numel() == 0:
            self.control.t[:] = self.control.end = grid[-1]
            return Adaptive(x if kept is None else torch.stack([x] * len(grid)), *self._outcome())
        k = self._begin(x)
        for goal in grid[1:] if trajectory else grid[-1:]:
            ends = goal == grid[-1]
            x, k = self._towards(self.last if ends else goal, x, k, callback, bar)
            if ends and goal != self.last:
                h = self.control.plan(self.control.leap(goal), ()).h
                x = tensor_of(lazy(x) + k * h, x.dtype)
            if kept is not None:
                marked = self._marked(x)
                kept.append(marked.clone() if marked is x and not self.recorded else marked)
        if bar is not None:
            bar.close()
        if kept is not None:
            return Adaptive(torch.stack(kept), *self._outcome())
        x = self._marked(x)
        return Adaptive(x.clone() if x is start else x, *self._outcome())

    def _outcome(self) -> tuple:
        converged, *rest = self.control.outcome()
        return converged, self.nfe, *rest

    def _marked(self, x: Tensor) -> Tensor:
        marks = self.control.marks()
        return x if marks is None else evaluate(lazy(x) * marks, dtype=x.dtype)

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
                seen = self._marked(x)
                callback(
                    {
                        "step": self.taken,
                        "steps": None,
                        "s": before,
                        "t": control.slowest(),
                        "x": seen.clone() if seen is x and not self.recorded else seen,
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
