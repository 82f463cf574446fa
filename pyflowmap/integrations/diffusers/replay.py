"""`Replay`: a solver's own step when somebody else calls the network.

A step asks `velocity(argument, time)` in the middle of its work, but a diffusers pipeline calls the network first and
the scheduler afterwards. Steps are pure functions of their inputs and lazy, so nothing needs to be suspended: the step
is run again from its start with the velocities known so far, until it asks for one more. That costs host time only
(nothing is evaluated twice), and the numbers are bit for bit those of `pyflowmap.solvers.integrate`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...algebra import Lazy, evaluate, lazy
from ...solvers import Solver
from ...solvers.buffers import Memory
from ...solvers.driver import Noise

__all__ = ["Replay", "plan", "settle"]


class _Asked(Exception):
    def __init__(self, argument: Lazy, time: float) -> None:
        self.argument, self.time = argument, time


class Replay:
    """One run of `solver` along the linear times `times`, from x at the start of step `first`.

    `time` is when the network is to be asked next, at the point last handed out (at first: x); None after the last
    step. `advance` takes its answer and hands out the next point, which in the end is the final state.
    """

    def __init__(
        self,
        solver: Solver,
        times: list[float],
        x: Tensor,  # (B, ...)
        *,
        singular: frozenset[float] = frozenset(),
        seed: int | Tensor | None = None,
        first: int = 0,
    ) -> None:
        visits = solver.visits(times)
        self.name, self.step = solver.name, solver.configured
        self.pairs, self.k = list(pairwise(visits)), first
        self.draw = Noise(seed).source(x)
        self.visits, self.singular = visits, singular
        self.memories, self.memory, self.stream = Memory(x), None, 0
        self.known: list[Lazy] = []
        self.point, self.state = x, lazy(x)
        self.time: float | None = None
        self.free = True  # the point handed out is the state itself, so another may come back in its place
        self._forward()
        if not self.free:
            raise ValueError(
                f"{solver.name} asks the network away from the state it is given, before any scheduler can move it; "
                "use it with pfm.sample, or with options that leave the first state alone"
            )

    def advance(self, x: Tensor, velocity: Lazy) -> Tensor:
        """`velocity` is the network's answer at x, the point handed out last. Returns the next one.

        Where that point was the state, x may differ from it: inpainting and callbacks change the state between steps.
        """
        if self.time is None:
            raise ValueError(f"{self.name} has finished its {len(self.pairs)} steps; begin a new run")
        changed = x is not self.point or _version(x) != self.version
        if changed and not self.free:
            raise ValueError(
                f"the state was changed between two evaluations of one step of {self.name}; "
                "change it between steps, or use a solver with one evaluation per step"
            )
        if x is not self.point:
            self.point, self.state = x, lazy(x)
        elif self.free:
            self.state = lazy(x)  # it may have been written to
        self.known.append(velocity)
        self._forward()
        return self.point

    def _velocity(self, argument: Lazy, *at: float) -> Lazy:
        if self.asked == len(self.known):
            raise _Asked(argument, at[0])
        self.asked += 1
        return self.known[self.asked - 1]

    def _forward(self) -> None:
        """On to the next question, through the ends of as many steps as ask none."""
        while self.k < len(self.pairs):
            self.asked, self.draw.stream = 0, self.stream  # the same noise fields at each replay of a step

            def velocity(argument: Lazy, *at: float) -> Lazy:
                return self._velocity(argument, *at)

            told: Any = velocity
            told.noise, told.times, told.end, told.singular = self.draw, self.visits, self.visits[-1], self.singular
            try:
                x_next, returned = self.step(velocity, self.state, *self.pairs[self.k], self.memory)
            except _Asked as question:
                self.time = question.time
                if question.argument is self.state:
                    self.point, self.free = self.state.operands[0], not self.known
                else:
                    (self.point,) = settle((question.argument,), self.point)
                    self.free = False
                self.version = _version(self.point)
                return
            fresh, _ = self.memories.gather(returned)
            self.point, *values = settle((x_next, *fresh), self.point)
            self.memory = self.memories.settle(values)
            self.state, self.known = lazy(self.point), []
            self.k, self.stream = self.k + 1, self.draw.stream
        self.time = None


def settle(combinations: tuple[Lazy, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Evaluate in one launch, into new tensors of the dtype of `like`, the state."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in combinations):
        values = evaluate(*combinations, dtype=like.dtype)
        return values if isinstance(values, tuple) else (values,)
    with torch.inference_mode(False):  # a tensor of inference mode does not tell whether it was written to
        outs = tuple([torch.empty_like(like) for _ in combinations])
    evaluate(*combinations, out=outs if len(outs) > 1 else outs[0])
    return outs


def _version(x: Tensor) -> int | None:
    """Grows when x is written to. The first state of a run may be one of inference mode, which has none."""
    return None if x.is_inference() else x._version


def plan(solver: Solver, times: list[float], singular: frozenset[float]) -> list[list[float]]:
    """The times at which each step asks the network, found by running the steps on two numbers."""
    asked: list[list[float]] = [[] for _ in range(len(solver.visits(times)) - 1)]
    run = Replay(solver, times, torch.ones(1, 2), singular=singular, seed=0)
    while run.time is not None:
        asked[run.k].append(run.time)
        point: Any = run.point
        run.advance(point, 0.5 * lazy(point))
    return asked
