"""The one loop under every solver: it settles what a step returns, and owns grid, buffers, noise, callback, NaN report.

A step is `step(velocity, x, s, t, memory) -> (x_next, memory)`. x is lazy; `velocity(argument, time)` evaluates its
argument in one launch and returns a lazy; x_next is lazy. `memory` is None before the first step, afterwards what
the last step returned: None, a lazy, or a tuple (a list becomes one) of lazies and plain values; its lazies are
evaluated in the launch that evaluates x_next. Without gradients everything goes into buffers allocated once.

    velocity.noise()    a standard normal field, another one at each call, drawn inside the launch that uses it
    velocity.times      the times of the run, in the order of the steps; velocity.end is the last
    velocity.singular   times at which there is no velocity: the data end for a network that predicts data
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..algebra import Lazy, evaluate, lazy, noise
from .buffers import Memory, Packed, Port, Workspace, flatten, unflatten
from .solver import Solver, time_grid

__all__ = ["Noise", "finite", "integrate"]


class Noise:
    """The normal fields of one run: its k-th (from 0) is stream k + 1; stream 0 is the noise that sampling starts from.

    A number depends on (seed, sample id, k, element) alone: not on the batch, the device or the steps' own work.
    """

    def __init__(self, seed: int | Tensor | None = None, sample_ids: Tensor | None = None) -> None:
        self.seed, self.sample_ids = seed, sample_ids

    def source(self, like: Tensor) -> Source:
        """Hands out the fields one after the other, from the first."""
        return Source(self, like)


class Source:
    def __init__(self, noise: Noise, like: Tensor) -> None:
        self.noise, self.like, self.stream = noise, like, 0

    def __call__(self) -> Lazy:
        self.stream += 1
        of = self.noise
        if of.seed is None:  # once, so that a second look at the same run sees the same fields
            of.seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
        return noise(self.like, seed=of.seed, sample_ids=of.sample_ids, stream=self.stream)


def integrate(
    solver: Solver | Callable,
    field: Callable[..., Lazy],
    x: Tensor,  # (B, ...) the state at grid[0]; never written to
    grid: Sequence[float] | Tensor,
    *,
    port: Port = Port(),
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    grad: bool | str = False,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    on_nan: str = "raise",
    out: Tensor | None = None,  # for the last state
    workspace: Workspace | None = None,
    part: tuple[int, int] | None = None,
    model_time: Callable[[float], float] | None = None,
    idle: int = 0,
) -> Any:
    """Run `solver`, or a bare step, along `grid`; return the last state, or all as (steps + 1, B, ...) with
    `trajectory`.

    field       field(argument, x, t) or field(argument, x, s, t): the velocity or jump as a lazy. `argument` is what
                the network sees (see Port), `x` the same point as a lazy
    seed, sample_ids  of the noise that stochastic steps draw
    grad        record for backward; every step then allocates. "checkpoint": keep the states only, and run each step
                again in backward
    callback    called after each step with {"step", "steps", "s", "t", "x", "nfe"}; x is the caller's to keep
    on_nan      "raise": FloatingPointError naming step and samples. "keep": a warning; the other samples are unharmed
    workspace   keeps the run's buffers for the next run of the same shape; with `out` as well, nothing is allocated
    part        (first, of): these rows are a part of a larger batch, and so are named in reports
    model_time, idle  reports speak of these times, and of these further steps that came before

    The state is looked at once, after the last step: only if it is bad are the steps rerun to find the first bad one,
    so the loop itself never waits for the device. During CUDA graph capture nothing is looked at.
    """
    if on_nan not in ("raise", "keep"):
        raise ValueError(f'on_nan = {on_nan!r}; it is "raise" or "keep"')
    if grad not in (False, True, "checkpoint"):
        raise ValueError(f'grad = {grad!r}; it is False, True or "checkpoint"')
    times = time_grid(grid)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}; the state is a floating-point tensor (B, ...)")
    if not isinstance(solver, Solver):
        solver = Solver(solver, getattr(solver, "__name__", "step"), None, None)
    run = given = solver.loop or _run
    if out is not None or workspace is not None:
        _check_out(solver, x, out, grad, trajectory)
        given = partial(_run, out=out, workspace=workspace)
    draws = Noise(seed, sample_ids)
    begin = getattr(field, "begin", None)  # of a field that remembers its evaluations
    if begin is not None:
        begin()
    with torch.set_grad_enabled(bool(grad) and torch.is_grad_enabled()):
        result = given(solver, field, x, times, port, draws, grad, callback, progress, trajectory)
        last = result if isinstance(result, Tensor) else result[0]
        if trajectory:
            last = last[-1]
        capturing = last.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not torch.compiler.is_compiling() and not finite(last):
            told = _Told(on_nan, part, model_time or float, idle, _share(out, x))
            _report(run, solver, field, x, times, port, draws, last, told)
        return result


def _check_out(solver: Solver, x: Tensor, out: Tensor | None, grad: bool | str, trajectory: bool) -> None:
    if solver.loop is not None or grad or trajectory:
        why = "grad records what it computes" if grad else "a trajectory has a place for every state"
        why = f"{solver.name} keeps buffers of its own" if solver.loop is not None else why
        raise ValueError(f"out= and workspace= are for a run that returns its last state; {why}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, the state {tuple(x.shape)} {x.dtype} on {x.device}"
        )


def _run(solver, field, x, times, port, draws, grad, callback, progress, trajectory, out=None, workspace: Any = None):
    times = solver.visits(times)
    if grad:
        return _recorded(solver, field, x, times, port, draws, grad, callback, progress, trajectory)
    step, scale, steps = solver.configured, port.scale, len(times) - 1
    cast = port.dtype is not None and port.dtype != x.dtype
    single = port.slots == 1 and not cast  # the state is the network's argument
    if out is None and workspace is not None:
        out = torch.empty_like(x)  # the caller's, while the workspace serves the next run
    states, rings, stages, free = (workspace or Workspace()).buffers(x, port)
    kept = torch.empty((steps + 1, *x.shape), dtype=x.dtype, device=x.device) if trajectory else None
    if kept is not None:
        kept[0].copy_(x)
    memories = Memory(x, free)
    memory = None
    nfe = stage = turn = 0
    start = times[0]
    now = start  # the time of the state
    state = lazy(x) if scale is None else lazy(x) * (1.0 / scale(start))
    current: Any = x if single else None

    def velocity(argument, *at):
        nonlocal nfe, stage, current
        nfe += 1
        # What the network is given of the state was written with the scale at the state's own time.
        if argument is state and (scale is None or at[:1] == (now,)):
            if current is None:  # the first one: later ones are written with the state
                packed = rings[1] = rings[1] or Packed.empty(x, port)
                _write((state if scale is None else state * scale(at[0]),) * port.slots, packed.parts)
                current = packed.whole
            return field(current, state, *at)
        mine = stages[turn]
        if stage == len(mine):
            mine.append(Packed.empty(x, port))
        whole, parts = mine[stage]
        stage += 1
        if scale is not None:
            factor = scale(_first(at))
            _write((argument * factor,) * len(parts), parts)
            return field(whole, argument if cast else lazy(parts[0]) * (1.0 / factor), *at)
        _write((argument,) * len(parts), parts)
        return field(whole, argument if cast else lazy(parts[0]), *at)

    _furnish(velocity, draws.source(x), times, port.singular)
    pairs: Any = list(pairwise(times))
    if progress:
        from tqdm.auto import tqdm

        pairs = tqdm(pairs, desc="sampling", unit="step", leave=False)
    lean = single and kept is None and callback is None
    for k, (s, t) in enumerate(pairs):
        now, turn, stage = s, k & 1, 0
        result = step(velocity, state, s, t, memory)
        if type(result) is not tuple or len(result) != 2 or type(result[0]) is not Lazy:
            _refuse(result)
        x_next, returned = result
        factor = 1.0 if scale is None else scale(t)
        if factor != 1.0:
            x_next = x_next * factor
        if kept is not None:
            here = kept[k + 1]
        elif out is not None and k + 1 == steps:
            here = out
        else:
            here = states[turn]
            if here is None:
                here = states[turn] = torch.empty_like(x)
        if lean and returned is None:  # one output, the commonest step
            evaluate(x_next, out=here)
            current, memory = here, None
        else:
            parts: tuple = ()
            if single:
                current = here
            elif k + 1 < steps:
                if rings[turn] is None:
                    rings[turn] = Packed.empty(x, port)
                current, parts = rings[turn]
                if not cast and kept is None:
                    here, parts = parts[0], parts[1:]
            fresh, buffers = memories.gather(returned if k + 1 < steps else None)
            if parts:
                _write((*(x_next,) * (1 + len(parts)), *fresh), (here, *parts, *buffers))
            else:
                _write((x_next, *fresh), (here, *buffers))
            memory = memories.settle(buffers)
        state = lazy(here) if factor == 1.0 else lazy(here) * (1.0 / factor)
        if callback is not None:
            callback({"step": k + 1, "steps": steps, "s": s, "t": t, "x": here.clone(), "nfe": nfe})
    memories.give_back()
    return here if kept is None else kept


def _furnish(velocity: Any, draw: Source, times: list[float], singular: frozenset[float]) -> None:
    velocity.noise, velocity.times, velocity.end, velocity.singular = draw, times, times[-1], singular


def _write(combinations: tuple[Lazy, ...], outs: tuple[Any, ...]) -> None:
    if len(outs) == 1:
        evaluate(combinations[0], out=outs[0])
    else:
        evaluate(*combinations, out=outs)


def _first(at: tuple) -> Any:
    if not at:
        raise TypeError("the step gave its velocity no time; it is velocity(x, t), or for a jump jump(x, s, t)")
    return at[0]


def _refuse(result: Any) -> NoReturn:
    two = isinstance(result, tuple) and len(result) == 2
    shown = f"{type(result[0]).__name__} as its state" if two else type(result).__name__
    raise TypeError(f"the step returned {shown}; return a lazy combination and memory: x + h * velocity(x, s), memory")


def _recorded(solver, field, x, times, port, draws, grad, callback, progress, trajectory):
    """The same steps for autograd: nothing is written twice, nothing is kept that backward does not need."""
    step, scale, steps = solver.configured, port.scale, len(times) - 1
    dtype = port.dtype or x.dtype
    draw = draws.source(x)
    nfe = 0
    state: Any = None
    tree: Any = None  # what the last step remembers, its tensors apart

    def velocity(argument, *at):
        nonlocal nfe
        nfe += 1
        factor = 1.0 if scale is None else scale(_first(at))
        if argument is state and factor == argument.coefficients[0] == 1.0 and dtype == x.dtype:
            whole = argument.operands[0]
        else:
            whole = evaluate(argument * factor, dtype=dtype)
        point = argument if argument is state or dtype != x.dtype else lazy(whole) * (1.0 / factor)
        return field(whole.repeat(port.slots, *(1,) * (x.dim() - 1)) if port.slots > 1 else whole, point, *at)

    _furnish(velocity, draw, times, port.singular)

    def advance(first_stream, s, t, shape, here, *leaves):
        nonlocal state, tree
        draw.stream = first_stream  # the same fields when backward runs it again
        state = lazy(here) if scale is None else lazy(here) * (1.0 / scale(s))
        result = step(velocity, state, s, t, unflatten(shape, leaves))
        if type(result) is not tuple or len(result) != 2 or type(result[0]) is not Lazy:
            _refuse(result)
        x_next, returned = result
        memory = Memory(here)
        memory.held = {id(each): each for each in leaves}
        fresh, _ = memory.gather(returned)
        first = x_next if scale is None else x_next * scale(t)
        values = evaluate(first, *fresh, dtype=x.dtype)
        values = values if fresh else (values,)
        tree, remembered = flatten(memory.settle(values[1:]))
        return (values[0], *remembered)

    pairs: Any = list(pairwise(times))
    if progress:
        from tqdm.auto import tqdm

        pairs = tqdm(pairs, desc="sampling", unit="step", leave=False)
    here, memory, states, again = x, (), [x], grad == "checkpoint"
    for k, (s, t) in enumerate(pairs):
        arguments = (draw.stream, s, t, tree, here, *memory)
        here, *memory = checkpoint(advance, *arguments, use_reentrant=False) if again else advance(*arguments)
        if trajectory:
            states.append(here)
        if callback is not None:
            callback({"step": k + 1, "steps": steps, "s": s, "t": t, "x": here.clone(), "nfe": nfe})
    return torch.stack(states) if trajectory else here


def finite(x: Tensor) -> bool:
    """Whether every number is."""
    # A sum propagates inf and NaN; it can also overflow by itself, so only a bad sum is looked at closely.
    return x.numel() == 0 or math.isfinite(x.sum().item()) or bool(x.isfinite().all())


class _Found(Exception):
    pass


class _Told(NamedTuple):
    """How a report is made."""

    on_nan: str
    part: tuple[int, int] | None
    time: Callable[[float], float]
    idle: int
    lost: bool  # where the run started from has been written over

    def __call__(self, message: str) -> None:
        if self.on_nan == "raise":
            raise FloatingPointError(message + '; on_nan="keep" returns the others')
        warnings.warn(message, RuntimeWarning, stacklevel=_callers_level())


def _share(out: Tensor | None, x: Tensor) -> bool:
    return out is not None and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def _report(run, solver, field, x, times, port, draws, last, told):
    """Raise or warn with the first step after which the state was not finite, and which samples it was."""
    if not told.lost and not finite(x):
        rows, start = _samples(x, told.part), told.time(times[0])
        told(f"the state of {rows} is not finite before the first step (t = {start:g}); check the noise")
        return
    where, rows = "in the last step", _samples(last, told.part)

    def look(record):
        nonlocal where, rows
        if not finite(record["x"]):
            steps = "an adaptive run" if record["steps"] is None else record["steps"] + told.idle
            s, t = told.time(record["s"]), told.time(record["t"])
            where = f"in step {record['step'] + told.idle} of {steps} (from t = {s:g} to {t:g})"
            if told.on_nan == "raise":
                rows = _samples(record["x"], told.part)
            raise _Found

    if told.lost:
        where = "by the last step (out= has written over x, so the steps cannot be run again to tell which)"
    else:
        if hasattr(field, "begin"):  # a guidance that remembers must not remember the first run
            field.begin()
        try:
            with torch.no_grad():
                run(solver, field, x, times, port, draws, False, look, False, False)
        except _Found:
            pass
    told(
        f"the state of {rows} became NaN or infinite {where}; look at the network's output there "
        "(half precision, a guidance scale, or a prediction that is singular at that time)"
    )


def _samples(x: Tensor, part: tuple[int, int] | None) -> str:
    first, of = part or (0, x.shape[0])
    bad = (~x.detach().flatten(1).isfinite().all(1)).nonzero().flatten().tolist() if x.dim() > 1 else []
    if not bad or len(bad) == of:
        return "every sample" if x.dim() > 1 else "the samples"
    shown = ", ".join(str(first + k) for k in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return f"sample{'s' if len(bad) > 1 else ''} {shown} (of {of})"


def _callers_level() -> int:
    """How far up the first frame outside this package is: a warning names the line that called it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyflowmap."):
        level, frame = level + 1, frame.f_back
    return level
