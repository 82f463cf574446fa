"""alpha-Flow: from flow matching to MeanFlow by one knob, and no derivative on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import evaluate, inner, lazy
from ..flow_map import FlowMap
from .baked_guidance import baked_guidance
from .batch import Batch, check_inputs, check_share, draw_pairs, flow_matching_error, loss_of
from .derivative import require_mean_velocity
from .loss import Loss, frozen_teacher
from .mean_flow import eulerian_error, guided

__all__ = ["alpha_flow", "alpha_schedule"]

_adaptive = weights.adaptive(p=1.0, c=0.01, norm="sum")
_paper = partial(time_laws.logit_normal_pair, mean=0.4, std=1.0)


def alpha_flow(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = _paper,
    weight: Callable = _adaptive,
    teacher: FlowMap | None = None,
    alpha: float | Callable[[], float] = 0.5,
    equal: float = 0.5,
    guidance: baked_guidance | None = None,
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Step a share alpha of the way along the path's velocity b, and let the network say the rest:

        1/alpha || u_{s,t}(x_s) - sg[ alpha b + (1-alpha) u_{r,t}(x_s + (r-s) b) ] ||^2,    r = s + alpha (t-s)

    alpha = 1 is flow matching of u_{s,t} ("trajectory flow matching"), alpha = 1/2 is like a shortcut model, and as
    alpha -> 0 the gradient becomes MeanFlow's; alpha = 0 is `mean_flow` itself, with its derivative. The squared norm
    is the sum over a sample; time 0 is noise, 1 data, s <= t. Zhang et al. 2025 (AlphaFlow), whose time runs the other
    way.

    When to use: to train what MeanFlow trains, in a curriculum: `alpha_schedule` falls from 1 to 0. One alpha > 0 for
    ever leaves a bias: an Euler step along a sample of the velocity stands for the flow. When it fails: small alpha in
    low precision, a difference of two terms that agree up to O(alpha); the schedule ends at 0.005 for that.

    times     law of (s, t), s <= t; default MeanFlow's
    weight    maps e = || . ||^2 / alpha^2, which becomes MeanFlow's error as alpha -> 0, to a loss, which counts alpha
              times. Hence constant(norm="sum") is the formula above, and the default alpha / sg(|| . ||^2 + 0.01
              alpha^2) per square is the paper's alpha / (|| . ||^2 + c) with a c that keeps its meaning as alpha falls
    teacher   its v_s(x_s) takes the place of b; default: the path's velocity
    alpha     in [0, 1]: a number, or a function of no arguments that returns one, asked at every call; host only
    equal     expected share of rows with t = s, the first of the batch: plain flow matching (paper: 0.25 to 0.5).
              Rounded at random where it is no whole number of rows, to the nearest in compiled code
    guidance  `baked_guidance(omega, kappa, null=...)`: train on a guided velocity; with a teacher, drop=0
    as_tensor for alpha = 0 and networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of all rows; one more of the others without gradient and with dropout off, none at
    alpha = 1. No JVP; at alpha = 0 those of `mean_flow`.
    Errors: TypeError, ValueError for data, shares and alpha out of range, and for a flow map that has no mean velocity.

    >>> exact = FlowMap(lambda x, s, t: (0.0 * x + 3.0))                           # data = noise + 3
    >>> alpha_flow(exact, torch.full((4, 2), 3.0), x0=torch.zeros(4, 2), alpha=0.5).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    check_share(equal, "equal")
    require_mean_velocity(flow_map, "alpha_flow")
    share = _number(alpha() if callable(alpha) else alpha)
    batch = draw_pairs(flow_map, x1, x0, condition, times, equal, seed, sample_ids)
    batch = guided(flow_map, batch, teacher, guidance, seed)
    near, far = batch.near, batch.far
    if far is None:
        error = None
    elif share == 0.0:
        error = eulerian_error(flow_map, far, 1.0, as_tensor)
    else:
        error = _error(flow_map, far, share)
    return loss_of(
        batch,
        weight if share == 0.0 else partial(_counted, weight, batch.equal, share),
        flow_matching=None if near is None else flow_matching_error(flow_map, near),
        alpha_flow=error,
    )


def alpha_schedule(step: int, *, start: int = 0, end: int, gamma: float = 25.0, clamp: float = 5e-3) -> float:
    """alpha at a training step: sigmoid(-gamma (k - 1/2)), k = (step - start)/(end - start), from 1 down to 0.

    Below `clamp` it is 0, where `alpha_flow` takes MeanFlow's derivative, and above 1 - clamp it is 1. AlphaFlow's own:
    gamma = 25 and clamp = 0.005, over the whole run or its middle.

    >>> [round(alpha_schedule(k, end=100), 3) for k in (0, 40, 50, 60, 100)]
    [1.0, 0.924, 0.5, 0.076, 0.0]
    """
    if not end > start:
        raise ValueError(f"start = {start}, end = {end}; the schedule falls between two steps, start < end")
    if not gamma > 0.0 or not 0.0 <= clamp < 0.5:
        raise ValueError(
            f"gamma = {gamma}, clamp = {clamp}; gamma is positive and clamp in [0, 0.5), e.g. 25 and 0.005"
        )
    k = min(max((step - start) / (end - start), 0.0), 1.0)
    alpha = 1.0 / (1.0 + math.exp(gamma * (k - 0.5)))
    return 0.0 if alpha < clamp else 1.0 if alpha > 1.0 - clamp else alpha


def _number(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(
            f"alpha is {type(alpha).__name__}; it is a number on the host, or a function that returns one, e.g. "
            "lambda: alpha_schedule(step, end=100_000)"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha}; it lies in [0, 1], 1 is flow matching and 0 is MeanFlow")
    return float(alpha)


def _error(flow_map: FlowMap, far: Batch, alpha: float) -> Tensor:
    """|| u_{s,t}(x) - sg[ alpha b + (1-alpha) u_{r,t}(x + (r-s) b) ] ||^2 / alpha^2, (B,)."""
    x, b, s, t = far.x, lazy(far.velocity), far.s, far.t
    u = flow_map.as_mean_velocity(flow_map.output(x, s, t, far.condition), x, s, t)
    target = alpha * b
    if alpha < 1.0:
        step = alpha * (t - s)
        with frozen_teacher(flow_map.network):
            there = evaluate(lazy(x) + step * b, dtype=x.dtype)
            rest = flow_map.as_mean_velocity(flow_map.output(there, s + step, t, far.condition), there, s + step, t)
        target = target + (1.0 - alpha) * rest
    return inner(u - target.detach()) / alpha**2


def _counted(weight: Callable, equal: int, alpha: float, error: Tensor, **options: Any) -> Tensor:
    """The loss, alpha times in the rows that learn a jump."""
    loss = weight(error, **options)
    return torch.cat([loss[:equal], alpha * loss[equal:]])
