"""The one loop under every solver: it settles what a step returns, and owns grid, buffers, callback and NaN report.

A step is `step(velocity, x, s, t, memory) -> (x_next, memory)`. x is lazy; `velocity(argument, time)` evaluates its
argument in one launch and returns a lazy; x_next is lazy. `memory` is None before the first step, afterwards what
the last step returned: None, a lazy, or a tuple of lazies and plain values; its lazies are evaluated in the launch that
evaluates x_next. Without gradients everything goes into buffers allocated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate, lazy

__all__ = ["Solver", "integrate", "solver", "time_grid"]


@dataclass(frozen=True)
class Solver:
    """A step and what is known of it. Called as `heun(velocity, x, grid)` it runs under `integrate`."""

    step: Callable
    name: str
    order: int | None  # of convergence; None: exact up to the model
    nfe: int  # network evaluations per step
    takes: str = "velocity"  # or "jump": what the step's first argument is

    def __post_init__(self):
        if self.takes not in ("velocity", "jump"):
            raise ValueError(f'takes = {self.takes!r}; a step takes "velocity" or "jump"')

    def __call__(self, field: Callable, x: Tensor, grid: Sequence[float] | Tensor, **options) -> Tensor:
        """Integrate `field`: velocity(x, t) -> tensor, or jump(x, s, t) -> tensor, along `grid`. See `integrate`."""
        return integrate(self.step, lambda *arguments: lazy(field(*arguments)), x, grid, **options)


def solver(*, order: int | None = None, nfe: int = 1, takes: str = "velocity") -> Callable[[Callable], Solver]:
    """Decorator that makes a Solver of a step function."""

    def wrap(step: Callable) -> Solver:
        made = Solver(step, step.__name__, order, nfe, takes)
        object.__setattr__(made, "__doc__", step.__doc__)
        return made

    return wrap


def time_grid(grid: Sequence[float] | Tensor) -> list[float]:
    """`grid` as Python floats, once. Raises unless it is strictly monotone, finite, of two or more times."""
    values = grid.detach().double().cpu() if isinstance(grid, Tensor) else torch.as_tensor(grid, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(
            f"grid has shape {tuple(values.shape)}; it is one row of at least two times, e.g. [0.0, 0.5, 1.0]"
        )
    times = values.tolist()
    bad = next((t for t in times if not math.isfinite(t)), None)
    if bad is not None:
        raise ValueError(f"grid contains {bad}; times are finite, 0 = noise to 1 = data")
    steps = [b - a for a, b in pairwise(times)]
    if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise ValueError(f"grid {_short(times)} is not strictly monotone; each time must lie beyond the one before")
    return times


def _short(times: list[float]) -> str:
    shown = ", ".join(f"{t:.6g}" for t in times[:6])
    return f"[{shown}{', ...' if len(times) > 6 else ''}]"


class _Buffers:
    """Buffers by role, allocated at first use. A role alternates between two, so a step may read the old one."""

    def __init__(self, like: Tensor, reuse: bool):
        self.like, self.reuse, self.turn = like, reuse, 0
        self.held: dict[Any, Tensor] = {}

    def take(self, role: Any) -> Tensor | None:
        if not self.reuse:
            return None
        key = (role, self.turn % 2)
        if key not in self.held:
            self.held[key] = torch.empty_like(self.like)
        return self.held[key]


def integrate(
    step: Callable,
    field: Callable[..., Lazy],
    x: Tensor,  # (B, ...) the state at grid[0]; never written to
    grid: Sequence[float] | Tensor,
    *,
    grad: bool = False,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
    trajectory: bool = False,
) -> Tensor:
    """Run `step` along `grid`; return the last state, or all of them as (steps + 1, B, ...) with `trajectory`.

    field       evaluates a tensor and times to a lazy: velocity(x, t) or jump(x, s, t)
    grad        record for backward; every step then allocates
    callback    called after each step with {"step", "steps", "s", "t", "x", "nfe"}; x is the caller's to keep

    Raises FloatingPointError naming the step where the state stopped being finite. The state is looked at once, after
    the last step: only if it is bad are the steps rerun to find the first bad one, so the loop itself never waits for
    the device. During CUDA graph capture nothing is looked at.
    """
    times = time_grid(grid)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}; the state is a floating-point tensor (B, ...)")
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        states = _run(step, field, x, times, grad, callback, progress, trajectory)
        last = states[-1]
        capturing = last.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not torch.compiler.is_compiling() and not _finite(last):
            _report(step, field, x, times)
        return states if trajectory else last


def _run(step, field, x, times, grad, callback, progress, trajectory):
    steps = len(times) - 1
    buffers = _Buffers(x, reuse=not grad)
    kept = torch.empty((steps + 1, *x.shape), dtype=x.dtype, device=x.device) if trajectory and not grad else None
    states = [x]
    if kept is not None:
        kept[0].copy_(x)
    nfe = stage = 0
    state, memory = lazy(x), None

    def evaluated_field(argument, *at):
        nonlocal nfe, stage
        nfe += 1
        if argument is state:  # the state itself: already a tensor
            return field(states[-1], *at)
        stage += 1
        return field(_settle((argument,), (buffers.take(("stage", stage)),))[0], *at)

    pairs = list(pairwise(times))
    if progress:
        from tqdm.auto import tqdm

        pairs = tqdm(pairs, desc="sampling", unit="step", leave=False)
    for k, (s, t) in enumerate(pairs):
        buffers.turn, stage = k, 0
        x_next, returned = step(evaluated_field, state, s, t, memory)
        if not isinstance(x_next, Lazy):
            raise TypeError(
                f"the step returned {type(x_next).__name__} as its state; return a lazy combination and memory"
            )
        leaves: list[Lazy] = []
        shape = _strip(returned, leaves)
        target: Tensor | None = None  # a callback may keep its x, so each is new
        if kept is not None:
            target = kept[k + 1]
        elif callback is None:
            target = buffers.take("state")
        outs = (target, *(buffers.take(("memory", i)) for i in range(len(leaves))))
        x, *values = _settle((x_next, *leaves), outs, dtype=states[-1].dtype)
        memory = _restore(shape, iter([lazy(value) for value in values]))
        states = [*states, x] if trajectory and grad else [x]
        state = lazy(x)
        if callback is not None:
            callback({"step": k + 1, "steps": steps, "s": s, "t": t, "x": x, "nfe": nfe})
    if kept is not None:
        return kept
    return torch.stack(states) if trajectory else states


def _settle(combinations: tuple[Lazy, ...], outs: tuple, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """One launch for all; a missing buffer is allocated here where others are given, as `out` is all or nothing."""
    if all(out is None for out in outs):
        result = evaluate(*combinations, dtype=dtype) if dtype is not None else evaluate(*combinations)
    else:
        filled = tuple(
            torch.empty(c.shape, dtype=dtype or c.dtype, device=c.device) if out is None else out
            for c, out in zip(combinations, outs)
        )
        result = evaluate(*combinations, out=filled if len(filled) > 1 else filled[0])
    return result if isinstance(result, tuple) else (result,)


_LEAF = object()


def _strip(memory, leaves: list[Lazy]):
    """The shape of `memory`, its lazies moved to `leaves`."""
    if isinstance(memory, Lazy):
        leaves.append(memory)
        return _LEAF
    if isinstance(memory, (tuple, list)):
        return tuple(_strip(each, leaves) for each in memory)
    return memory


def _restore(shape, leaves):
    if shape is _LEAF:
        return next(leaves)
    if isinstance(shape, tuple):
        return tuple(_restore(each, leaves) for each in shape)
    return shape


def _finite(x: Tensor) -> bool:
    # A sum propagates inf and NaN; it can also overflow by itself, so only a bad sum is looked at closely.
    return x.numel() == 0 or bool(x.detach().sum().isfinite()) or bool(x.detach().isfinite().all())


class _Found(Exception):
    pass


def _report(step, field, x, times):
    where = "the last step"
    if not _finite(x):
        raise FloatingPointError(f"the state is not finite before the first step (t = {times[0]:g}); check the noise")

    def look(record):
        nonlocal where
        if not _finite(record["x"]):
            where = f"step {record['step']} of {record['steps']} (from t = {record['s']:g} to {record['t']:g})"
            raise _Found

    try:
        with torch.no_grad():
            _run(step, field, x, times, False, look, False, False)
    except _Found:
        pass
    raise FloatingPointError(
        f"the state became NaN or infinite in {where}; look at the network's output there "
        "(half precision, a guidance scale, or a prediction that is singular at that time)"
    )
