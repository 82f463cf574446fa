"""FlowEdit: an image goes from one condition to another along the difference of two velocities, without inversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate, lazy
from ..arguments import network_dtype
from ..flow_map import FlowMap
from ..solvers import Solver, integrate
from .branches import Branches, check_guidance, conditions_of, in_model_time, linear_time, refuse_grad, times_of

__all__ = ["flow_edit"]


def flow_edit(
    model: FlowMap,
    x_source: Tensor,  # (B, ...) clean data, or latents
    steps: int | None = None,  # 28
    *,
    grid: Sequence[float] | Tensor | None = None,  # in place of steps; rising, ends at the data
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    guidance_source: Callable | None = None,
    guidance_target: Callable | None = None,
    skip: int = 0,
    ordinary: int = 0,
    draws: int = 1,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,  # (B,)
    callback: Callable[[dict], None] | None = None,
    on_nan: str = "raise",
) -> Tensor:
    """Edit `x_source`, which `source` describes, so that `target` describes it. Kulikov et al. 2024, algorithm 1.

        z <- z + h mean_k [ b(z_target, s | target) - b(z_source, s | source) ],      h = t - s, n_k ~ N(0, 1)
        z_source = s x_source + (1-s) n_k,      z_target = z + z_source - x_source

    z starts at x_source and stays a clean image; both branches see the same noise, which is what keeps them together.
    Not an inversion: nothing is carried to noise. Euler in time, so of order 1 in the step.

    source, target  conditions, e.g. {"label": y}
    guidance_source, guidance_target  the paper guides the target harder: 3.5 and 13.5 (SD3), 1.5 and 5.5 (FLUX)
    skip      leave out the first steps, those nearest the noise, to stay nearer the source: n_max = steps - skip in the
              paper, which has steps = 50, skip = 17 (SD3) or steps = 28, skip = 4 (FLUX)
    ordinary  take that many last steps as ordinary sampling under `target`, from z + z_source - x_source: n_min. With
              skip + ordinary = steps this is SDEdit
    draws     noises averaged over in each step: n_avg
    seed, sample_ids  of the noise: a sample's edit depends on its seed and id, not on its batch
    callback  called with {"step", "steps", "s", "t", "x", "nfe"} after each step, in the model's own time

    2 NFE per step and draw, twice that with guidance, 1 per ordinary step; all those of a draw go in one network call
    where the conditions can be stacked. Works on any path: z is data, the points between are scaled as the path asks.

    Returns the edited image, shape and dtype of x_source; z itself is at least float32.
    Raises ValueError or TypeError for bad arguments, FloatingPointError naming the step and samples that became NaN.

    >>> towards = pfm.FlowMap(lambda x, s, t, goal: (goal[:, None] - x) / (1 - s[:, None]))  # all data is `goal`
    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> flow_edit(towards, torch.tensor([[1.0, 1.0]]), 4, source={"goal": one}, target={"goal": two}, seed=0)
    tensor([[2., 2.]])
    """
    _check(model, x_source, draws)
    times = times_of(steps, grid, 28)
    count = len(times) - 1
    if not 0.0 <= times[0] < times[-1] == 1.0:
        raise ValueError(f"grid goes from {times[0]:g} to {times[-1]:g}; an edit ends at the data: rise to 1")
    for name, value in (("skip", skip), ("ordinary", ordinary)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} = {value!r}; it is a number of steps, 0 or more")
    if skip >= count:
        raise ValueError(f"skip = {skip} leaves none of {count} steps; skip at most {count - 1}, or take more steps")
    if skip + ordinary > count:
        raise ValueError(
            f"skip = {skip} and ordinary = {ordinary} are more than {count} steps; ordinary is at most {count - skip}"
        )
    start = x_source.to(torch.promote_types(x_source.dtype, torch.float32))
    conditions = [conditions_of(name, each, start) for name, each in (("source", source), ("target", target))]
    guidances = [
        check_guidance(each, name, "flow_edit")
        for each, name in ((guidance_source, "guidance_source"), (guidance_target, "guidance_target"))
    ]
    times = [linear_time(model, r) for r in times[skip:]]
    for each in guidances:
        if each is not None and each.idle(times):
            raise ValueError(
                f"{type(each).__name__} leaves its first {each.idle(times)} steps idle, which is for sampling from "
                "noise; switch its zero-init off for an edit, and use skip"
            )
    dtype = network_dtype(model, start)
    direct = len(times) - 1 - ordinary

    def run(solver, field, x, times, port, noise, grad, callback, progress, trajectory):
        velocity = Branches(model, list(zip(conditions, guidances)), x, dtype)
        draw, here = noise.source(x), lazy(x)
        spare = [torch.empty_like(x), torch.empty_like(x)]
        moved: Lazy | None = None  # z - x_source: exactly 0 while the branches agree
        ordinarily: Lazy | None = None  # the state of the last steps
        state, nfe = here, 0
        for k, (s, t) in enumerate(pairwise(times)):
            out = spare[k & 1]
            if k < direct:
                before = moved
                for _ in range(draws):
                    z_source = s * here + (1.0 - s) * draw()
                    z_target = z_source if before is None else z_source + before
                    b_source, b_target = velocity((z_source, z_target), s)
                    change = (t - s) / draws * (b_target - b_source)
                    moved = lazy(evaluate(change if moved is None else moved + change, out=out))
                nfe += 2 * draws
            else:
                if ordinarily is None:
                    z_source = s * here + (1.0 - s) * draw()
                    z_target = z_source if moved is None else z_source + moved
                    ordinarily = lazy(evaluate(z_target, out=spare[1 - (k & 1)]))
                _, b_target = velocity((None, ordinarily), s)
                ordinarily = lazy(evaluate(ordinarily + (t - s) * b_target, out=out))
                nfe += 1
            state = ordinarily if ordinarily is not None else here if moved is None else here + moved
            if callback is not None:
                kept = evaluate(state, out=torch.empty_like(x))
                callback({"step": k + 1, "steps": len(times) - 1, "s": s, "t": t, "x": kept, "nfe": nfe})
        return evaluate(state, out=torch.empty_like(x))

    if callback is not None:
        callback = in_model_time(callback, model)
    edited = integrate(
        Solver(run, "flow_edit", 1, 2, stochastic=True, loop=run),
        run,
        start,
        times,
        seed=seed,
        sample_ids=sample_ids,
        callback=callback,
        on_nan=on_nan,
    )
    return edited.to(x_source.dtype)


def _check(model: FlowMap, x_source: Tensor, draws: int) -> None:
    if not isinstance(model, FlowMap):
        raise TypeError(
            f"model is {type(model).__name__}; wrap the network: pfm.FlowMap(network, prediction=..., call=...)"
        )
    if not isinstance(x_source, Tensor) or not x_source.is_floating_point() or x_source.dim() == 0:
        shown = getattr(x_source, "dtype", type(x_source).__name__)
        raise TypeError(f"x_source is {shown}; pass clean data, a floating-point tensor (B, ...)")
    refuse_grad(x_source=x_source)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws = {draws!r}; it is a number of noises, at least 1")
