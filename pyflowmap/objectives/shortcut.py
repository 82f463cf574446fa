"""Shortcut models: flow matching at the smallest step, and every longer step taught by two of half its length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..algebra import Lazy, evaluate, inner, lazy
from ..draws import uniforms
from ..flow_map import FlowMap
from ..guidance import cfg, without
from .batch import Batch, check_inputs, check_share, loss_of, whole
from .derivative import require_mean_velocity
from .loss import Loss, frozen_teacher

__all__ = ["shortcut"]

_mean_square = weights.constant()
_STREAM = 0x73686F72  # apart from the noise (0) of the same sample


def shortcut(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    levels: int = 7,
    bootstrap: float = 0.125,
    clip: float | None = None,
    guidance: cfg | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Steps d = 2^-l of levels l = 0..L on the grid s = k d, the mean velocity u_{s,s+d}:

        l = L   || u_{s,s+d}(x_s) - dx_s/ds ||^2
        l < L   || u_{s,s+d}(x_s) - sg[ (u_{s,m}(x_s) + u_{m,s+d}(X_{s,m}(x_s))) / 2 ] ||^2,    m = s + d/2

    Frans et al. 2025 (Shortcut Models), eq. 5 and alg. 1, in the same time; squared norms, the sum over a sample. What
    that network sees as (t, d) this one sees as the two ends (s, s + d).

    levels    L; the paper's 7 is 128 smallest steps. Half the span of a level-l row is level l + 1
    bootstrap expected share of rows with l < L, the last of the batch, each with a level drawn uniformly; the paper's
              1/8. Rounded at random where it is no whole number of rows, to the nearest in compiled code
    teacher   gives the target; the paper's is the average (EMA) of the network's own weights, decay 0.999. Default: the
              network itself, without gradient and with dropout off
    clip      bounds on the middle state and on the target, [-clip, clip], for bootstrap rows; the paper's code has 4.
              Default: none. With one, data and velocities outside are learned wrong
    guidance  `pfm.guidance.cfg(1.5, null=...)`: the target of level L - 1, the first one, is guided, and longer steps
              learn from it; the paper's for ImageNet. Labels must be dropped at random in training, for the null

    Network evaluations: one of B rows with gradient, two of the bootstrap rows without, four with guidance. No JVP.

    Sample with `steps` a power of two up to 2^L and solver="flow_map": only steps of this grid are learned. The
    diagonal, `flow_map.velocity`, is not; the smallest step stands for it, with an error O(2^-L). `times` is not asked
    for: the grid gives them. Each row's time, level and noise depend on (seed, sample id) alone.
    Errors: TypeError, ValueError for data and options out of range, and a flow map that has no mean velocity.
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    require_mean_velocity(flow_map, "shortcut")
    check_share(bootstrap, "bootstrap")
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= 20:
        raise ValueError(f"levels = {levels!r}; it is a whole number from 1 to 20, and the paper's is 7")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip = {clip}; it is positive, the paper's is 4.0, or None")
    _check_guidance(guidance)
    batch = _draw(flow_map, x1, x0, condition, levels, bootstrap, seed, sample_ids)
    output = flow_map.output(batch.x, batch.s, batch.t, batch.condition)

    errors = {}
    for name, rows, part in (
        ("flow_matching", batch.near, output[: batch.equal]),
        ("shortcut", batch.far, output[batch.equal :]),
    ):
        if rows is not None:
            u = flow_map.as_mean_velocity(part, rows.x, rows.s, rows.t)
            target = rows.velocity if rows.equal else _target(teacher or flow_map, rows, levels, clip, guidance)
            errors[name] = inner(u - lazy(target))
    return loss_of(batch, weight, **errors)


def _draw(
    flow_map: FlowMap,
    x1: Tensor,
    x0: Tensor | None,
    condition: Mapping[str, Any] | None,
    levels: int,
    bootstrap: float,
    seed: int | None,
    sample_ids: Tensor | None,
) -> Batch:
    """Rows of the smallest step, then rows of longer ones. All times are exact: multiples of 2^-levels."""
    rows = x1.shape[0]
    smallest = whole((1.0 - bootstrap) * rows, rows, seed)
    of_level, of_start = uniforms(x1, 2, _STREAM, seed, sample_ids).unbind(1)
    level = torch.floor(of_level * levels)  # 0 .. levels - 1
    level[:smallest] = levels
    count = torch.exp2(level)
    s = (torch.floor(of_start * count) / count).float()
    t = s + (1.0 / count).float()
    x, velocity = flow_map.interpolant.draw(x1, s, x0=x0, seed=seed, sample_ids=sample_ids)
    return Batch(x, velocity, s, t, dict(condition or {}), smallest, sample_ids)


def _target(teacher: FlowMap, far: Batch, levels: int, clip: float | None, guidance: cfg | None) -> Tensor:
    """(u_{s,m}(x) + u_{m,t}(X_{s,m}(x)))/2, without gradient."""
    x, s, t = far.x, far.s, far.t
    middle = 0.5 * (s + t)
    null = None if guidance is None else without(far.condition, guidance.null)
    # rows whose half step is the smallest one: their span is 2^-(levels - 1)
    scale = (
        None if guidance is None else torch.where(t - s < 1.5 * 2.0 ** (1 - levels), guidance.scale, 1.0).to(s.dtype)
    )

    def velocity(x: Tensor, s: Tensor, t: Tensor) -> Lazy:
        u = teacher.as_mean_velocity(teacher.output(x, s, t, far.condition), x, s, t)
        if null is None or scale is None:
            return u
        return scale * u + (1.0 - scale) * teacher.as_mean_velocity(teacher.output(x, s, t, null), x, s, t)

    with frozen_teacher(teacher.network):
        first = velocity(x, s, middle)
        halfway = _clipped(evaluate(lazy(x) + (middle - s) * first, dtype=x.dtype), clip)
        return _clipped(evaluate(0.5 * first + 0.5 * velocity(halfway, middle, t), dtype=x.dtype), clip)


def _clipped(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


def _check_guidance(guidance: Any) -> None:
    if guidance is None:
        return
    if type(guidance) is not cfg:
        raise TypeError(
            f"guidance is {type(guidance).__name__}; here it is pfm.guidance.cfg(1.5, null={{'label': 10}})"
        )
    if guidance.interval is not None:
        raise ValueError(f"guidance has interval = {guidance.interval}, which shortcut does not use; leave it out")
