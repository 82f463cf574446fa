"""Consistency models (CT, iCT, CD): two neighbouring points of a trajectory lead to the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import solvers, weights
from .. import times as time_laws
from ..algebra import Lazy, evaluate, inner, lazy, noise
from ..flow_map import FlowMap
from ..interpolants import Interpolant, Linear
from ..predictions import linear_velocity_coefficients
from .batch import check_inputs, described, seeded
from .loss import Loss, frozen_teacher

__all__ = ["consistency", "linear_velocity", "neighbours", "path_time"]

_mean_square = weights.constant()
_BELOW_ONE = 1.0 - 2.0**-24  # the last float32 before the data end, where a data prediction's jump is 0/0


def consistency(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = time_laws.karras_pair,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    solver: str | None = None,
    target: FlowMap | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Match the data ends of two neighbouring points of one trajectory, f(x, s) = X_{s,1}(x) the consistency function:

        || f(x_s, s) - sg[ f'(y, r) ] ||^2,    y = x_r with the *same* noise (CT), or one step of the teacher's ODE (CD)

    Song et al. 2023, alg. 2 (CD) and 3 (CT); iCT: Song & Dhariwal 2024. The error is a sum over a sample; their noise
    level is sigma = (1-s)/s. At r = 1 the point y is its own target. CT is biased by the gap: the exact map has a mean
    gradient of the order (r-s)^2, CD an error of the order of the step. Any `prediction` will do: "data" is their
    preconditioned network, "mean_velocity" asks the network for u_{s,1}.

    times    law of (s, r), s <= r, in times of the linear path, translated to any other. CT raises the number of
             levels: `partial(pfm.times.karras_pair, steps=pfm.times.consistency_steps(k, total))`
    weight   default the mean square; iCT: `pfm.weights.pseudo_huber(0.00054, norm="mean")` with
             `karras_pair(..., log_normal=(-1.1, 2.0))`
    teacher  None: CT. A FlowMap on any path, whose velocity makes the step: CD
    solver   the step of CD: "heun" (default) or "euler" of `pfm.solvers`, on the linear path. One that ends in a time
             without velocity, t = 1 of a data prediction, is Euler's
    target   f', e.g. the average of the weights (Song et al.: decay exp(N(0) log mu_0 / N(k))); default the network
             itself. It runs in the mode it is in and on the same random numbers as the network: one dropout mask for
             both. The teacher has no dropout

    Network evaluations: one with gradient, one of the target without, and those of the solver. Use it to distil a
    diffusion model without a JVP; from scratch, where gaps must shrink, `easy_consistency` is simpler and
    `continuous_consistency` has no gap at all. It fails where many small steps add up their errors, or where the gap
    stays wide: blurred data.
    Errors: TypeError, ValueError for data, times with s > r (not looked for on a GPU), a solver without teacher.

    >>> exact = FlowMap(lambda x, s, t: 0.0 * x + 3.0)                             # data = noise + 3
    >>> x0 = torch.randn(4, 2)
    >>> consistency(exact, x0 + 3.0, x0=x0, times=time_laws.uniform_pair).raw_error.max().item() < 1e-9
    True
    """
    check_inputs(flow_map, x1, x0, weight, teacher, one_path=False)
    s, r = neighbours(times, x1, seed, sample_ids)
    error = pair_error(flow_map, x1, x0, condition, s, r, teacher, solver, target, seed, sample_ids)
    return pair_loss("consistency", error, s, r, x1, weight)


def pair_loss(name: str, error: Tensor, s: Tensor, r: Tensor, x1: Tensor, weight: Callable) -> Loss:
    raw, size = error.detach(), x1[0].numel()
    return Loss(weight(error, s=s, t=r, size=size), raw / size, {name: raw.mean() / size})


def pair_error(
    flow_map: FlowMap,
    x1: Tensor,
    x0: Tensor | None,
    condition: Mapping[str, Any] | None,
    s: Tensor,
    r: Tensor,
    teacher: FlowMap | None,
    solver: str | None,
    target: FlowMap | None,
    seed: int | None,
    sample_ids: Tensor | None,
) -> Tensor:
    """|| f(x_s, s) - sg[ f'(y, r) ] ||^2, (B,)."""
    _check_step(teacher, solver, target)
    path, given = flow_map.interpolant, dict(condition or {})
    now, then = (path_time(path, t) for t in (s, r))
    data = lazy(x1)
    start = lazy(x0) if x0 is not None else noise(x1, seed, sample_ids)
    x = path.alpha(now) * data + path.sigma(now) * start
    if teacher is None:
        x, y = evaluate(x, path.alpha(then) * data + path.sigma(then) * start)
    else:
        x = evaluate(x)
        with frozen_teacher(teacher.network):
            y = evaluate(_step(teacher, solver, path, x, now, s, r, then, given), dtype=x.dtype)
    other = flow_map if target is None else target
    replay = _random_numbers(flow_map.network, x.device)
    with torch.no_grad():
        goal = _to_data(other, y, then, given, path, r)
    replay()
    return inner(_to_data(flow_map, x, now, given, path) - goal.detach())


def neighbours(times: Callable, x1: Tensor, seed: int | None, sample_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s, r) of a law of pairs, checked."""
    drawn = times(x1, **seeded(seed, sample_ids))
    if isinstance(drawn, Tensor) and drawn.dim() > 1 and len(drawn) == 2:
        drawn = drawn.unbind(0)
    pair = isinstance(drawn, (tuple, list)) and len(drawn) == 2
    if not pair or not all(isinstance(t, Tensor) and t.shape == x1.shape[:1] for t in drawn):
        shown = " and ".join(described(t) for t in drawn) if isinstance(drawn, (tuple, list)) else described(drawn)
        raise ValueError(
            f"times gave {shown}; here it is a law of pairs, two tensors ({x1.shape[0]},), e.g. pfm.times.karras_pair"
        )
    s, r = drawn
    if s.device.type == "cpu" and not torch.compiler.is_compiling():  # reading it elsewhere would wait for the device
        wrong = ~((s >= 0.0) & (s <= r) & (r <= 1.0))
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"times gave s = {float(s[k]):g}, r = {float(r[k]):g} in row {k}; s is the noisier of the two, "
                "0 <= s <= r <= 1; turn noise levels into t = 1/(1 + sigma)"
            )
    return s, r


def path_time(path: Interpolant, t: Tensor) -> Tensor:
    """The path's own time for t of the linear path: the same ratio of noise to data."""
    return t if isinstance(path, Linear) else path.model_time(t).clamp(0.0, 1.0)


def linear_velocity(model: FlowMap, x: Lazy, t: Tensor, condition: Mapping[str, Any]) -> Lazy:
    """b = x1 - x0 of a model on any path, at x and t of the linear one."""
    path = model.interpolant
    own = path_time(path, t)
    if not isinstance(path, Linear):
        x = path.scale(own) * x
    point = x.operands[0] if x.coefficients == (1.0,) else evaluate(x)
    c_x, c_p = linear_velocity_coefficients(model.prediction, path, own)
    result = (model.sign * c_p) * lazy(model.output(point, own, own, condition))
    return result if not isinstance(c_x, Tensor) and c_x == 0.0 else c_x * lazy(point) + result


class _Velocity:
    """The teacher's velocity as a step of `pfm.solvers` asks for it, on the linear path.

    A velocity from a prediction of the data is 0/0 at the data end: there the one before it is kept, which makes a
    step of Heun one of Euler.
    """

    singular: frozenset[float] = frozenset()

    def __init__(self, teacher: FlowMap, condition: Mapping[str, Any]):
        self.teacher, self.condition = teacher, condition
        self.last: Lazy | None = None
        self.regular = teacher.prediction in ("velocity", "mean_velocity") and isinstance(teacher.interpolant, Linear)

    def __call__(self, x: Lazy, t: Tensor) -> Lazy:
        if self.regular:
            return linear_velocity(self.teacher, x, t, self.condition)
        found = linear_velocity(self.teacher, x, t.clamp(max=_BELOW_ONE), self.condition)
        if self.last is not None:
            end = (t >= 1.0).to(t.dtype)
            found = (1.0 - end) * found + end * self.last
        self.last = found
        return found


def _step(teacher, solver, path, x, now, s, r, then, condition) -> Lazy:
    """One step of the teacher's ODE from x_s to the time r; both points on `path`."""
    start, scale = lazy(x), 1.0
    if not isinstance(path, Linear):
        start, scale = (1.0 / path.scale(now)) * start, path.scale(then)
    step = solvers.euler.step if solver == "euler" else solvers.heun.step
    end, _ = step(_Velocity(teacher, condition), start, s, r, None)
    return scale * end


def _to_data(
    flow_map: FlowMap, x: Tensor, t: Tensor, condition: Mapping[str, Any], path: Interpolant, r: Tensor | None = None
) -> Lazy:
    """f(x, t) = X_{t,1}(x); x itself in rows whose r is 1."""
    inside = t.clamp(max=_BELOW_ONE)
    jump = flow_map.as_jump(flow_map.output(x, inside, torch.ones_like(t), condition), x, inside, 1.0)
    if r is None:
        return jump
    there = (r >= 1.0).to(t.dtype)
    return (1.0 - there) * jump + there * lazy(x)


def _random_numbers(network: Any, device: torch.device) -> Callable[[], None]:
    """What puts torch's generators back to where they are now: two passes then draw one dropout mask."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        modules = network.modules() if isinstance(network, nn.Module) else ()
        for module in modules:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0.0:
                raise RuntimeError(
                    f"{type(module).__name__}(p={module.p}) needs one mask for network and target, and compiled or "
                    "captured code cannot draw it twice; compile the network alone, or set p = 0"
                )
        return lambda: None
    host = torch.get_rng_state()
    if device.type == "cpu":
        return lambda: torch.set_rng_state(host)
    there: Any = torch.get_device_module(device)
    state = there.get_rng_state(device)

    def replay() -> None:
        torch.set_rng_state(host)
        there.set_rng_state(state, device)

    return replay


def _check_step(teacher: FlowMap | None, solver: str | None, target: FlowMap | None) -> None:
    if target is not None and not isinstance(target, FlowMap):
        raise TypeError(f"target is {type(target).__name__}; wrap the network: pfm.FlowMap(network, call=...)")
    if solver not in (None, "euler", "heun"):
        raise ValueError(f'solver = {solver!r}; the step of a teacher is "heun" or "euler"')
    if solver is not None and teacher is None:
        raise ValueError(f"solver = {solver!r} but no teacher, whose step it would be; pass teacher= or no solver")
