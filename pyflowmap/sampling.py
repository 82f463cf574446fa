"""`sample`: noise to data with a flow map, in any number of steps, with any solver and guidance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .algebra import evaluate, noise
from .flow_map import FlowMap
from .guidance import Guidance
from .view import View

__all__ = ["sample"]


def sample(
    model: FlowMap,
    noise_or_shape: Tensor | Sequence[int],  # (B, ...)
    steps: int = 4,
    *,
    grid: Sequence[float] | Tensor | None = None,  # replaces steps; strictly monotone, 0 = noise to 1 = data
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
    nfe: int | None = None,  # network evaluations to spend, in place of steps
    dtype: torch.dtype | None = None,  # of what the network is given; the state keeps the noise's
    on_nan: str = "raise",
) -> Tensor:
    """Carry noise to data: x <- X_{s,t}(x) over the grid, or a solver's step on the velocity.

    With a shape, the noise is drawn from (seed, sample id): the same id gives the same picture whatever batch it is in.
    Without a grid, `steps` equal steps from 0 to 1. A grid that falls, say [1.0, 0.5, 0.0], carries data to noise.

    grid       in the model's own time. Solvers work on the linear path (see `pyflowmap.view`), whatever the model's
    solver     a name in `pyflowmap.solvers.named`, such a solver with options (`solvers.heun_alpha.using(alpha=0.5)`),
               or a step function
    condition  keywords for the network, e.g. {"label": y}
    guidance   an object of `pyflowmap.guidance`, e.g. pfm.guidance.cfg(3.0, null={"label": 10}). Steps that it leaves
               out (the zero-init of `cfg_zero`) are neither called back nor in the trajectory
    seed       of the noise, and of the noise that stochastic solvers draw
    grad       record for backward; "checkpoint" keeps one state per step and runs each again in backward
    callback   called with {"step", "steps", "s", "t", "x", "nfe"} after each step, in the model's own time
    trajectory return every state, (steps + 1, B, ...), instead of the last
    nfe        the budget; ValueError where the solver cannot spend exactly that
    dtype      by default that of the network's parameters where they are half precision, else the noise's. The state
               and the solver's arithmetic stay in the dtype of the noise
    on_nan     "raise", or "keep": warn, and return the samples that are unharmed with the others

    Returns the state at the end of the grid, shape (B, ...), the dtype of the noise (float32 for a shape).
    Raises ValueError or TypeError for bad arguments, FloatingPointError naming the step and samples that became NaN.

    >>> import pyflowmap as pfm
    >>> fm = pfm.FlowMap(lambda x, s, t: torch.ones_like(x))
    >>> sample(fm, torch.zeros(2, 3), steps=4)[0]
    tensor([1., 1., 1.])
    """
    if not isinstance(model, FlowMap):
        raise TypeError(
            f"model is {type(model).__name__}; wrap the network: pfm.FlowMap(network, prediction=..., call=...)"
        )
    chosen = _solver_of(solver)
    if nfe is not None:
        if grid is not None:
            raise ValueError(f"nfe = {nfe} with a grid given; the grid says already how many steps there are")
        steps = chosen.steps_for(nfe)
    times = solvers.time_grid(_uniform(steps) if grid is None else grid)
    outside = next((t for t in times if not 0.0 <= t <= 1.0), None)
    if outside is not None:
        raise ValueError(f"grid contains {outside:g}; times lie in [0, 1], 0 = noise to 1 = data")
    x = _start(model, noise_or_shape, seed, sample_ids)
    if isinstance(noise_or_shape, Tensor) and not chosen.stochastic and (seed is not None or sample_ids is not None):
        raise ValueError(
            f"seed = {seed} with the noise given; {chosen.name} draws none; seeds and sample ids go with a shape"
        )
    condition = _condition(condition, x)
    if cuda_graph and not (torch.cuda.is_available() and x.is_cuda):
        raise ValueError(f"cuda_graph=True needs a CUDA device, the noise is on {x.device}; leave it out on the CPU")
    if cuda_graph:
        raise NotImplementedError(
            "cuda_graph=True is not built yet; capture pfm.sample yourself with torch.cuda.graph, it does not sync"
        )
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; pass an object such as pfm.guidance.cfg(3.0, null=...)"
        )
    if guidance is not None:
        guidance.check(chosen, grad)
    view = View(model, condition, guidance, takes=chosen.takes, like=x, dtype=dtype or _network_dtype(model, x))
    times = [view.linear_time(r) for r in times]
    if guidance is not None:
        idle = guidance.idle(times)
        if idle and nfe is not None:
            raise ValueError(f"nfe = {nfe} can't be met: the guidance leaves out {idle} of {steps} steps; pass steps")
        times = times[idle:]
    view.prepare(chosen.asks(chosen.visits(times)))
    if callback is not None and not view.linear:
        callback = _in_model_time(callback, view)
    result = solvers.integrate(
        chosen,
        view,
        x,
        times,
        port=view.port,
        seed=seed,
        sample_ids=sample_ids,
        grad=grad,
        callback=callback,
        progress=progress,
        trajectory=trajectory,
        on_nan=on_nan,
    )
    if isinstance(result, solvers.Adaptive):
        missing = result.explain(view.model_time)
        if missing is not None:
            warnings.warn(missing, RuntimeWarning, stacklevel=2)
        return result.x
    return result


def _network_dtype(model: FlowMap, x: Tensor) -> torch.dtype | None:
    """Half precision where the network's parameters are, and no autocast translates; None: as the state."""
    parameters = getattr(model.network, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    if first is None or first.dtype not in (torch.bfloat16, torch.float16) or first.dtype == x.dtype:
        return None
    return first.dtype


def _in_model_time(callback: Callable[[dict], None], view: View) -> Callable[[dict], None]:
    return lambda record: callback({**record, "s": view.model_time(record["s"]), "t": view.model_time(record["t"])})


def _uniform(steps: int) -> list[float]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; it is a whole number, at least 1")
    return [k / steps for k in range(steps + 1)]


def _solver_of(solver: str | Callable) -> solvers.Solver:
    if isinstance(solver, str):
        if solver not in solvers.named:
            raise ValueError(f"solver = {solver!r}; named ones are {', '.join(solvers.named)}, or pass a step function")
        solver = solvers.named[solver]
    if isinstance(solver, solvers.Solver):
        return solver
    if not callable(solver):
        raise TypeError(f"solver is {type(solver).__name__}; pass a name or step(velocity, x, s, t, memory)")
    # A step of one's own may draw noise, so seeds are its own business.
    return solvers.Solver(solver, getattr(solver, "__name__", "step"), None, 1, stochastic=True)


def _start(model: FlowMap, noise_or_shape, seed, sample_ids) -> Tensor:
    if isinstance(noise_or_shape, Tensor):
        if not noise_or_shape.is_floating_point() or noise_or_shape.dim() == 0:
            raise TypeError(
                f"noise has dtype {noise_or_shape.dtype} and shape {tuple(noise_or_shape.shape)}; "
                "pass a floating-point tensor (B, ...)"
            )
        return noise_or_shape
    shape = tuple(noise_or_shape)
    if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"shape = {shape}; pass the noise or a shape of whole numbers, e.g. (16, 1, 28, 28)")
    parameters = getattr(model.network, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    like = torch.empty(shape, dtype=torch.float32, device=None if first is None else first.device)
    return evaluate(noise(like, seed=seed, sample_ids=sample_ids), out=like)


def _condition(condition: Mapping[str, Any] | None, x: Tensor) -> dict[str, Any]:
    condition = dict(condition or {})
    for key, value in condition.items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"condition {key!r} is on {value.device} but the noise is on {x.device}; move one of them")
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != x.shape[0]:
            raise ValueError(
                f"condition {key!r} has {value.shape[0]} rows but the noise has {x.shape[0]}; give one row per sample"
            )
    return condition
