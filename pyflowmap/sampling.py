"""`sample`: noise to data with a flow map, in any number of steps, with any solver and guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .algebra import Lazy, evaluate, lazy, noise
from .flow_map import FlowMap

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
    grad: bool = False,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    cuda_graph: bool = False,
) -> Tensor:
    """Carry noise to data: x <- X_{s,t}(x) over the grid, or a solver's step on the velocity.

    With a shape, the noise is drawn from (seed, sample id): the same id gives the same picture whatever batch it is in.
    Without a grid, `steps` equal steps from 0 to 1. A grid that falls, say [1.0, 0.5, 0.0], carries data to noise.

    solver     "flow_map" (jumps), "euler", "heun", or a step function (see `pyflowmap.solvers`)
    condition  keywords for the network, e.g. {"label": y}
    guidance   e.g. pfm.guidance.cfg(3.0, null={"label": 10})
    grad       record for backward
    callback   called with {"step", "steps", "s", "t", "x", "nfe"} after each step
    trajectory return every state, (steps + 1, B, ...), instead of the last

    Returns the state at the end of the grid, shape (B, ...), the dtype of the noise (float32 for a shape).
    Raises ValueError or TypeError for bad arguments, FloatingPointError naming the step where the state became NaN.

    >>> import pyflowmap as pfm
    >>> fm = pfm.FlowMap(lambda x, s, t: torch.ones_like(x))
    >>> sample(fm, torch.zeros(2, 3), steps=4)[0]
    tensor([1., 1., 1.])
    """
    if not isinstance(model, FlowMap):
        raise TypeError(
            f"model is {type(model).__name__}; wrap the network: pfm.FlowMap(network, prediction=..., call=...)"
        )
    step, takes = _step_of(solver)
    times = solvers.driver.time_grid(_uniform(steps) if grid is None else grid)
    outside = next((t for t in times if not 0.0 <= t <= 1.0), None)
    if outside is not None:
        raise ValueError(f"grid contains {outside:g}; times lie in [0, 1], 0 = noise to 1 = data")
    x = _start(model, noise_or_shape, seed, sample_ids)
    condition = _condition(condition, x)
    if cuda_graph and not (torch.cuda.is_available() and x.is_cuda):
        raise ValueError(f"cuda_graph=True needs a CUDA device, the noise is on {x.device}; leave it out on the CPU")
    if cuda_graph:
        raise NotImplementedError(
            "cuda_graph=True is not built yet; capture pfm.sample yourself with torch.cuda.graph, it does not sync"
        )
    field = _field(model, condition, guidance, takes)
    return solvers.integrate(
        step, field, x, times, grad=grad, callback=callback, progress=progress, trajectory=trajectory
    )


def _uniform(steps: int) -> list[float]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; it is a whole number, at least 1")
    return [k / steps for k in range(steps + 1)]


def _step_of(solver: str | Callable) -> tuple[Callable, str]:
    if isinstance(solver, str):
        if solver not in solvers.named:
            raise ValueError(f"solver = {solver!r}; named ones are {', '.join(solvers.named)}, or pass a step function")
        solver = solvers.named[solver]
    if isinstance(solver, solvers.Solver):
        return solver.step, solver.takes
    if not callable(solver):
        raise TypeError(f"solver is {type(solver).__name__}; pass a name or step(velocity, x, s, t, memory)")
    return solver, "velocity"


def _start(model: FlowMap, noise_or_shape, seed, sample_ids) -> Tensor:
    if isinstance(noise_or_shape, Tensor):
        if seed is not None or sample_ids is not None:
            raise ValueError(f"seed = {seed} with the noise given; seeds and sample ids only go with a shape")
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


def _field(model: FlowMap, condition: dict, guidance: Callable | None, takes: str) -> Callable[..., Lazy]:
    """velocity(x, t) or jump(x, s, t), guided, as a lazy."""

    def jump(x, s, t):
        return model.as_jump(model.output(x, s, t, condition), x, s, t)

    def velocity(x, t):
        return model.as_velocity(model.output(x, t, t, condition), x, t)

    if guidance is None:
        return jump if takes == "jump" else velocity
    if not callable(guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; pass an object such as pfm.guidance.cfg(3.0, null=...)"
        )
    guide: Callable = guidance

    def mean_velocities(x, s, t, conditions, batched):  # velocities where s = t
        return [model.as_mean_velocity(each, x, s, t) for each in model.outputs(x, s, t, conditions, batched)]

    def guided_jump(x, s, t):
        return lazy(x) + (t - s) * guide(mean_velocities, x, s, t, condition)

    def guided_velocity(x, t):
        return guide(mean_velocities, x, t, t, condition)

    return guided_jump if takes == "jump" else guided_velocity
