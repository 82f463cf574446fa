"""`sample`: noise to data with a flow map, in any number of steps, with any solver and guidance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import chunks, graphs, solvers
from .algebra import evaluate, lazy, noise
from .arguments import (
    check_ids,
    check_model,
    check_seed,
    condition_of,
    like_of,
    network_dtype,
    solver_of,
    uniform,
    warn_of_training,
)
from .flow_map import FlowMap
from .guidance import Guidance
from .view import View, singular_times

__all__ = ["sample"]

_MOST_DATA = 0.05  # alpha at the start of a grid for which noise alone is drawn


def sample(
    model: FlowMap,
    noise_or_shape: Tensor | Sequence[int],  # (B, ...)
    steps: int | None = None,  # 4
    *,
    grid: Sequence[float] | Tensor | None = None,  # in place of steps; strictly monotone, 0 = noise to 1 = data
    solver: str | Callable = "flow_map",
    condition: Mapping[str, Any] | None = None,
    guidance: Callable | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,  # (B,) which samples of the seed's endless sequence these rows are
    grad: bool | str = False,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    cuda_graph: bool = False,
    nfe: int | None = None,  # evaluations of the velocity to spend, in place of steps
    dtype: torch.dtype | None = None,  # of what the network is given; the state keeps the noise's
    on_nan: str = "raise",
    chunk: int | None = None,  # rows at a time
    memory_limit: int | str | None = None,  # bytes, or "2GB": as many rows at a time as fit
) -> Tensor:
    """Carry noise to data: x <- X_{s,t}(x) over the grid, or a solver's step on the velocity.

    With a shape, the noise is drawn from (seed, sample id): the same id gives the same picture whatever batch it is in.
    Its standard deviation is sigma at the start of the grid, where alpha must be nearly 0 (at most 0.05).
    Without a grid, `steps` equal steps from 0 to 1. A grid that falls, say [1.0, 0.5, 0.0], carries data to noise.

    grid       in the model's own time. Solvers work on the linear path (see `pyflowmap.view`), whatever the model's
    solver     a name in `pyflowmap.solvers.named`, such a solver with options (`solvers.heun_alpha.using(alpha=0.5)`),
               or a step function
    condition  keywords for the network, e.g. {"label": y}; tensors have one row per sample, or no dimension
    guidance   an object of `pyflowmap.guidance`, e.g. pfm.guidance.cfg(3.0, null={"label": 10})
    seed       of the noise, and of the noise that stochastic solvers draw
    grad       record for backward; "checkpoint" keeps one state per step and runs each again in backward
    callback   called with {"step", "steps", "s", "t", "x", "nfe"} after each step, in the model's own time; with chunks
               also {"rows": (first, beyond the last)}
    trajectory return every state, (steps + 1, B, ...), instead of the last
    cuda_graph capture the whole loop at the first call and replay it at later ones like it; see `pyflowmap.graphs`
    nfe        the budget; ValueError where the solver cannot spend exactly that. Both conditions of a guidance count as
               one
    dtype      what the network is given; by default that of its parameters. The state and the solver's arithmetic stay
               in the dtype of the noise
    on_nan     "raise", or "keep": warn, and return the samples that are unharmed with the others
    chunk      run this many rows after one another: the same samples, in less memory
    memory_limit  the same, in as many rows as fit into what this call may allocate, its result included; measured, not
               guessed, see `pyflowmap.chunks`. Not on top: the model, the arguments and what is allocated already

    Returns the state at the end of the grid, shape (B, ...), the dtype of the noise (float32 for a shape).
    Raises ValueError or TypeError for bad arguments, FloatingPointError naming the step and samples that became NaN.

    >>> import pyflowmap as pfm
    >>> fm = pfm.FlowMap(lambda x, s, t: torch.ones_like(x))
    >>> sample(fm, torch.zeros(2, 3), steps=4)[0]
    tensor([1., 1., 1.])
    """
    check_model(model)
    warn_of_training(model.network)
    check_seed(seed)
    chosen = solver_of(solver)
    given = isinstance(noise_or_shape, Tensor)
    like = like_of(model, noise_or_shape)
    if nfe is not None:
        steps = _affordable(model, chosen, steps, grid, nfe, guidance, like)
    times = _times(steps, grid)
    if given and not chosen.stochastic and (seed is not None or sample_ids is not None):
        which = "seed" if seed is not None else "sample_ids"
        raise ValueError(
            f"{which} = {seed if seed is not None else '...'} with the noise given; {chosen.name} draws none, so seeds "
            "and sample ids go with a shape only"
        )
    check_ids(sample_ids, seed, like)
    if nfe is not None and isinstance(guidance, Guidance) and (idle := guidance.idle(times)):
        raise ValueError(
            f"nfe = {nfe} can't be met: the guidance leaves out {idle} of {len(times) - 1} steps; pass steps"
        )
    condition = condition_of(condition, like)
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; pass an object such as pfm.guidance.cfg(3.0, null=...), or "
            "subclass pfm.guidance.Guidance"
        )
    if guidance is not None:
        guidance.check(chosen, grad)
    if not grad and torch.is_grad_enabled() and _under_func_grad():
        raise ValueError(
            "torch.func.grad of sample with grad=False would be zero; pass grad=True, or sample inside torch.no_grad()"
        )
    spread = 1.0 if given else _spread(model, times)
    if grad and not torch.is_grad_enabled():
        raise ValueError(f"grad={grad!r} under torch.no_grad() or inference_mode records nothing; leave that block")
    if grad and isinstance(grid, Tensor) and grid.requires_grad:
        raise ValueError("grid requires grad, but times are numbers to a solver; pass grid.detach()")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype = {dtype!r}; the network is given floating-point numbers, e.g. torch.bfloat16")
    parts = chunk is not None or memory_limit is not None
    if seed is None and (not given or (chosen.stochastic and (parts or cuda_graph))):
        seed = _draw_seed(like)
    one = partial(
        _run,
        model,
        chosen,
        times,
        spread=spread,
        seed=seed,
        dtype=dtype or network_dtype(model, like),
        trajectory=trajectory,
    )
    if cuda_graph:
        for name, value in (("grad", grad), ("callback", callback), ("progress", progress)):
            if value:
                raise ValueError(f"cuda_graph=True replays the loop without Python, so {name}={value!r} cannot be kept")
        if memory_limit is not None:
            raise ValueError("cuda_graph=True keeps its memory between calls; use chunk= in place of memory_limit=")
        graphs.check(chosen, like)
        run = partial(graphs.default, one, on_nan=on_nan)
    else:
        run = partial(one, grad=grad, on_nan=on_nan)
    if not parts:
        own: dict[str, Any] = {} if cuda_graph else {"callback": callback, "progress": progress}
        return run(like, condition, guidance, sample_ids, drawn=not given, **own)
    if chosen.loop is not None and chosen.options.get("control") != "sample":
        raise ValueError(
            f"{chosen.name} chooses its steps for the batch that it sees, so chunks would change the result; with "
            'control="sample" they do not'
        )
    if memory_limit is not None and grad:
        raise ValueError(f"memory_limit with grad={grad!r}: what backward needs of every chunk is kept; use chunk=")
    conditions = (condition,) if guidance is None else guidance.conditions(condition)
    rows = chunks.Rows(like.shape[0])

    def part(lo: int, hi: int) -> Tensor:
        own = [rows.of(each, lo, hi) for each in conditions]
        # A graph makes the conditions itself, of those that it is given.
        guide = guidance if guidance is None or cuda_graph else chunks.Part(guidance, tuple(own))
        ids = torch.arange(lo, hi, device=like.device) if sample_ids is None else sample_ids[lo:hi]
        seen = None if callback is None else lambda record: callback({**record, "rows": (lo, hi)})
        extra: dict[str, Any] = {} if cuda_graph else {"callback": seen, "part": (lo, like.shape[0])}
        return run(like[lo:hi], own[0], guide, ids, drawn=not given, **extra)

    sizes = chunks.Sizes(like.shape[0], chunk, memory_limit, like.device)
    return chunks.collect(
        part, sizes, like=like if given else None, dim=int(trajectory), grad=bool(grad), progress=progress
    )


def _run(
    model: FlowMap,
    solver: solvers.Solver,
    grid: Sequence[float],
    x: Tensor,  # the noise, or with `drawn` a tensor that only says its shape, dtype and device
    condition: Mapping[str, Any],
    guidance: Guidance | None,
    sample_ids: Tensor | None,
    *,
    drawn: bool,
    spread: float,  # the standard deviation of what is drawn
    seed: int | Tensor | None,
    dtype: torch.dtype | None,
    callback: Callable[[dict], None] | None = None,
    times_on_device: dict | None = None,  # filled at first, used afterwards
    **options: Any,
) -> Tensor:
    """One batch, its arguments checked."""
    if drawn:
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        start = noise(x, seed=seed, sample_ids=sample_ids)
        evaluate(start if spread == 1.0 else start * spread, out=x)
    view = View(model, condition, guidance, takes=solver.takes, like=x, dtype=dtype)
    times = [view.linear_time(r) for r in grid]
    idle = 0 if guidance is None else guidance.idle(times)
    if idle >= len(times) - 1:
        raise ValueError(
            f"{type(guidance).__name__} leaves the first {idle} steps idle and the grid has {len(times) - 1}; take more"
        )
    if times_on_device is not None:
        view.rows = times_on_device
    if not view.rows:
        view.prepare(solver.asks(solver.visits(times[idle:])))
    if callback is not None and not view.linear:
        callback = _in_model_time(callback, view)
    resting = _rest(x, times[: idle + 1], view) if idle else []
    if callback is not None and idle:
        callback = _after(resting[1:], times, callback)
    result = solvers.integrate(
        solver,
        view,
        resting[-1] if idle else x,
        times[idle:],
        port=view.port,
        seed=seed,
        sample_ids=sample_ids,
        callback=callback,
        model_time=None if view.linear else view.model_time,
        idle=idle,
        **options,
    )
    if isinstance(result, solvers.Adaptive):
        missing = result.explain(view.model_time)
        if missing is not None:
            warnings.warn(missing, RuntimeWarning, stacklevel=3)
        result = result.x
    if idle and options.get("trajectory"):
        result = torch.cat([torch.stack(resting[:-1]), result])
    return result


def _rest(x: Tensor, times: Sequence[float], view: View) -> list[Tensor]:
    """The states at `times` where the velocity is zero: on the linear path the same one, so X moves with the path's
    scale."""
    scale = view.port.scale
    if scale is None:
        return [x] * len(times)
    return [x, *(evaluate(lazy(x) * (scale(t) / scale(times[0]))) for t in times[1:])]


def _after(resting: list[Tensor], times: list[float], callback: Callable[[dict], None]) -> Callable[[dict], None]:
    """The callback, told of the idle steps first."""
    idle = len(resting)

    def told(record: dict) -> None:
        steps = None if record["steps"] is None else record["steps"] + idle  # None: an adaptive solver
        if record["step"] == 1:
            for k, x in enumerate(resting):
                own = {"step": k + 1, "steps": steps, "s": times[k], "t": times[k + 1], "nfe": 0}
                callback({**record, **own, "x": x.clone()})
        callback({**record, "step": record["step"] + idle, "steps": steps})

    return told


def _affordable(model, solver, steps, grid, nfe, guidance, like) -> int:
    """How many steps `nfe` evaluations are."""
    if grid is not None:
        raise ValueError(f"nfe = {nfe} with a grid given; the grid says already how many steps there are")
    path, singular = model.interpolant, singular_times(model) | getattr(guidance, "singular", frozenset())
    linear = lambda steps: [path.linear_time(r) for r in uniform(steps)]  # noqa: E731
    wanted = solver.steps_for(nfe, linear, singular, like, path)
    if steps is not None and steps != wanted:
        raise ValueError(f"steps = {steps} with nfe = {nfe}, which is {wanted} steps of {solver.name}; give one")
    return wanted


def _times(steps: int | None, grid: Any) -> list[float]:
    if grid is None:
        return uniform(4 if steps is None else steps)
    times = solvers.time_grid(grid)
    if steps is not None and steps != len(times) - 1:
        raise ValueError(f"steps = {steps} with a grid of {len(times) - 1} steps; leave steps out")
    outside = next((t for t in times if not 0.0 <= t <= 1.0), None)
    if outside is not None:
        raise ValueError(f"grid contains {outside:g}; times lie in [0, 1], 0 = noise to 1 = data")
    return times


def _draw_seed(like: Tensor) -> int | Tensor:
    """From torch's generator. One seed serves the noise and the steps: they are different streams of it."""
    if torch.compiler.is_compiling():
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device)
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))


def _spread(model: FlowMap, times: Sequence[float]) -> float:
    """The standard deviation of the noise that a grid starts from: X = alpha x1 + sigma x0 where alpha is nearly 0."""
    start, path = times[0], model.interpolant
    alpha = float(path.alpha(start))
    if abs(alpha) > _MOST_DATA:
        what = "the data end" if start == 1.0 else f"where the state is {alpha:.3g} data"
        raise ValueError(
            f"grid begins at t = {start:g}, {what}, and noise alone would be drawn; pass the state there, or begin at 0"
        )
    if times[1] < start:
        raise ValueError(f"grid falls from t = {start:g}, and noise would be drawn for it; pass the state at {start:g}")
    return float(path.sigma(start))


def _under_func_grad() -> bool:
    # Plain autograd says so by itself: a result without a graph refuses backward. torch.func.grad would return zeros;
    # and what it differentiates by may be anywhere, in the network's closure, say.
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    grad = torch._C._functorch.TransformType.Grad
    return any(each.key() == grad for each in torch._C._functorch.get_interpreter_stack() or ())


def _in_model_time(callback: Callable[[dict], None], view: View) -> Callable[[dict], None]:
    return lambda record: callback({**record, "s": view.model_time(record["s"]), "t": view.model_time(record["t"])})
