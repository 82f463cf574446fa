"""FlowChef: steers the sampling ODE towards a measurement, the velocity held fixed: no gradient of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate, lazy, union
from ..arguments import condition_of, network_dtype, start
from ..flow_map import FlowMap
from ..ops.combine import combine
from ..solvers import Solver, integrate
from ..solvers.buffers import Packed
from ..view import View
from .branches import check_guidance, in_model_time, refuse_grad, times_of
from .operators import Loss, Mask

__all__ = ["flow_chef"]


def flow_chef(
    model: FlowMap,
    noise_or_shape: Tensor | Sequence[int],  # (B, ...)
    measurement: Any,  # what operator.forward gives for the image looked for; for a Mask the image itself
    operator: Any,  # Mask, Blur, Downsample, Loss, or an object with forward, adjoint, norm_squared
    *,
    steps: int | None = None,  # 50
    strength: float,
    inner: int = 1,
    until: float = 1.0,
    grid: Sequence[float] | Tensor | None = None,  # in place of steps; rising
    condition: Mapping[str, Any] | None = None,
    guidance: Callable | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,  # (B,)
    callback: Callable[[dict], None] | None = None,
    on_nan: str = "raise",
) -> Tensor:
    """Sample an image of which A x1 = y was measured. Patel et al. 2024 (FlowChef), algorithm 1.

        b = b(x, s),   D = x + (1-s) b
        `inner` times:  D <- D - strength / ||A||^2  A'(A D - y)          b is held fixed, so dD/dx = 1
        x <- D - (1-t) b                                                  = x + h b + the change of D

    Not DPS or PiGDM, which differentiate the network. Euler in time; 1 NFE per step, 2 with guidance.

    operator  Mask (inpainting), Blur (deblurring), Downsample (super-resolution), any object with forward, adjoint,
              norm_squared and tight (see `pyflowmap.editing.operators`), or Loss: any differentiable function
    strength  what share of the residual one inner step takes off, whatever the resolution: 1 is all of it, and
              0 < strength < 2 is where the steps converge. The paper's loss is c0 mean(m (D - y)^2) with learning rate
              r, so its strength is 2 c0 r / numel. For a Loss: the plain step size
    inner     gradient steps at each time: 1 to 5 in the paper. For a Mask they are one, made in the launch of the step,
              D - [1 - (1 - strength m)^inner] (D - y). Where A A' is a multiple of the identity (Downsample) one too
    until     steer the steps that start before this time (the model's own); 1: all
    guidance  as in `pfm.sample`; the idle steps of cfg_zero are not steered either
    seed      of the noise, with a shape; see `pfm.sample`

    With strength 1 a Mask's known pixels end on the measurement exactly. Works on any path and any prediction, like
    `pfm.sample`. Returns the image, shape (B, ...), dtype of the noise.
    Raises ValueError or TypeError for bad arguments, FloatingPointError naming the step and samples that became NaN.

    >>> left = torch.tensor([[1.0, 0.0]])
    >>> fm = pfm.FlowMap(lambda x, s, t: -x)
    >>> flow_chef(fm, (1, 2), torch.tensor([[3.0, 0.0]]), Mask(left), steps=4, strength=1.0, seed=0)[0, 0]
    tensor(3.)
    """
    if not isinstance(model, FlowMap):
        raise TypeError(
            f"model is {type(model).__name__}; wrap the network: pfm.FlowMap(network, prediction=..., call=...)"
        )
    times = times_of(steps, grid, 50)
    if not 0.0 <= times[0] < times[-1] <= 1.0:
        raise ValueError(f"grid goes from {times[0]:g} to {times[-1]:g}; it rises within [0, 1], 0 = noise to 1 = data")
    if isinstance(noise_or_shape, Tensor) and (seed is not None or sample_ids is not None):
        raise ValueError(f"seed = {seed} with the noise given; seeds and sample ids go with a shape only")
    if not 0.0 < until <= 1.0:
        raise ValueError(f"until = {until!r}; it is a time above 0, at most 1")
    refuse_grad(noise=noise_or_shape, measurement=measurement)
    x = start(model, noise_or_shape, seed, sample_ids)
    _check(operator, measurement, strength, inner, x)
    condition = condition_of(condition, x)
    guidance = check_guidance(guidance, "guidance", "flow_chef")
    view = View(model, condition, guidance, like=x, dtype=network_dtype(model, x))
    times, last = [view.linear_time(r) for r in times], view.linear_time(until)
    idle = 0 if guidance is None else guidance.idle(times)
    if idle >= len(times) - 1:
        raise ValueError(f"{type(guidance).__name__} leaves all {len(times) - 1} steps idle; take more than {idle}")
    view.prepare(times[idle:])
    advance = _steering(operator, measurement, strength, inner, x)

    def run(solver, field, x, times, port, noise, grad, callback, progress, trajectory):
        size = port.scale or (lambda t: 1.0)
        apart = callback is not None or port.dtype is not None  # the state is not a part of the network's argument
        rings = [Packed.empty(x, port), Packed.empty(x, port)]
        states = [torch.empty_like(x), torch.empty_like(x)] if apart and callback is None else None
        point, state, count = lazy(x) * (1.0 / size(times[0])), x, len(times) - 1
        for k, (s, t) in enumerate(pairwise(times[: idle + 1])):  # the velocity is zero
            if callback is not None:
                kept = evaluate(size(t) * point, out=torch.empty_like(x))
                callback({"step": k + 1, "steps": count, "s": s, "t": t, "x": kept, "nfe": 0})
        argument = rings[(idle & 1) ^ 1]
        first = size(times[idle]) * point if idle else lazy(x)
        evaluate(*(first,) * port.slots, out=argument.parts)
        for k, (s, t) in enumerate(pairwise(times)):
            if k < idle:
                continue
            b = field(argument.whole, point, s)
            argument = rings[k & 1]
            if states is not None:
                state = states[k & 1]
            else:  # what is handed out is the caller's to keep
                state = torch.empty_like(x) if apart or k + 1 == count else argument.parts[0]
            outs = (state, *argument.parts[state is argument.parts[0] :])[: 1 if k + 1 == count else None]
            if s < last:
                advance(point, b, s, t, size(t), outs)
            else:
                evaluate(*(size(t) * (point + (t - s) * b),) * len(outs), out=outs)
            point = lazy(state) * (1.0 / size(t))
            if callback is not None:
                callback({"step": k + 1, "steps": count, "s": s, "t": t, "x": state, "nfe": k + 1 - idle})
        return state

    return integrate(
        Solver(run, "flow_chef", 1, 1, loop=run),
        view,
        x,
        times,
        port=view.port,
        callback=None if callback is None else in_model_time(callback, model),
        on_nan=on_nan,
    )


def _steering(operator: Any, y: Any, strength: float, inner: int, x: Tensor) -> Callable:
    """advance(x, b, s, t, scale, outs): writes scale times the steered point at t into each of `outs`."""
    if not isinstance(operator, Loss):
        y = y.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(operator, Mask):
        gain = operator.gain(strength, inner, torch.float64 if x.dtype == torch.float64 else torch.float32)
        known = lazy(y)

        def masked(x, b, s, t, scale, outs):
            step, change = scale * (x + (t - s) * b), scale * (known - x - (1.0 - s) * b)
            _evaluate_masked(step, gain, change, outs)

        return masked
    if isinstance(operator, Loss):
        rate, count = strength, inner
        gradient = lambda D: operator.gradient(D, y)  # noqa: E731
    else:
        tight = bool(getattr(operator, "tight", False))
        rate = -math.expm1(inner * math.log1p(-strength)) if strength < 1.0 else 1.0 - (1.0 - strength) ** inner
        rate, count = (rate, 1) if tight else (strength, inner)
        rate = rate / operator.norm_squared
        gradient = lambda D: operator.adjoint(evaluate(lazy(operator.forward(D)) - y))  # noqa: E731

    def descended(x, b, s, t, scale, outs):
        D = evaluate(x + (1.0 - s) * b)
        for _ in range(count - 1):
            evaluate(lazy(D) - rate * lazy(gradient(D)), out=D)
        after = scale * (lazy(D) - rate * lazy(gradient(D)) - (1.0 - t) * b)
        evaluate(*(after,) * len(outs), out=outs)

    return descended


def _evaluate_masked(base: Lazy, mask: Tensor, change: Lazy, outs: Sequence[Tensor]) -> None:
    """base + mask * change, elementwise in the mask, into each of `outs`: one launch."""
    operands, (a, b), field, leading = union((base, change))
    noise = None if field is None else field.noise
    combine(operands, (a,) * len(outs), out=tuple(outs), leading=leading, noise=noise, mask=(mask, (b,) * len(outs)))


def _check(operator: Any, y: Any, strength: float, inner: int, x: Tensor) -> None:
    if isinstance(inner, bool) or not isinstance(inner, int) or inner < 1:
        raise ValueError(f"inner = {inner!r}; it is a number of gradient steps, at least 1")
    if isinstance(operator, Loss):
        if not (math.isfinite(strength) and strength > 0.0):
            raise ValueError(f"strength = {strength}; it is a step size, above 0")
        return
    if not isinstance(operator, Mask):
        for name in ("forward", "adjoint", "norm_squared"):
            if not hasattr(operator, name):
                raise TypeError(
                    f"operator is {type(operator).__name__}, which has no {name}; pass pfm.editing.Mask, Blur, "
                    "Downsample or Loss, or an object with forward, adjoint and norm_squared"
                )
    if not 0.0 < strength < 2.0:  # NaN fails too
        raise ValueError(
            f"strength = {strength}; gradient steps converge for 0 < strength < 2, and 1 takes off all of the residual"
        )
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"measurement is {getattr(y, 'dtype', type(y).__name__)}; pass a floating-point tensor")
    if y.device != x.device:
        raise ValueError(f"measurement is on {y.device} but the noise is on {x.device}; move one of them")
    wanted = x.shape if isinstance(operator, Mask) else operator.forward(torch.empty_like(x).zero_()).shape
    if y.shape != wanted:
        raise ValueError(
            f"measurement has shape {tuple(y.shape)}; of a state {tuple(x.shape)} this operator measures "
            f"{tuple(wanted)}"
        )
    if not bool(y.isfinite().all()):
        raise ValueError("measurement has values that are not finite; where a mask is 0, put any number")
    if isinstance(operator, Mask):
        mask = operator.mask
        if mask.dim() != x.dim() or any(m not in (1, n) for m, n in zip(mask.shape, x.shape)):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} but the state {tuple(x.shape)}; each size is equal or 1"
            )
        if mask.device != x.device:
            raise ValueError(f"mask is on {mask.device} but the noise is on {x.device}; move one of them")
