"""Lagrangian self-distillation (LSD): the far end of a jump moves with the velocity that is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import Lazy, evaluate, inner, lazy
from ..flow_map import FlowMap
from .batch import check_inputs, check_share, pairs_of, rows_of, whole
from .derivative import mean_velocity_jvp, require_mean_velocity
from .loss import Loss, frozen_teacher

__all__ = ["lagrangian"]

_mean_square = weights.constant()


def lagrangian(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = time_laws.uniform_pair,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    diagonal: float = 0.75,
    differentiate_tangent: bool = True,
    as_tensor: bool = False,
    seed: int | None = None,
) -> Loss:
    """Flow matching on the diagonal and d/dt X_{s,t} = v_t(X_{s,t}) off it, in one run from scratch.

        diagonal      || u_{t,t}(x_t) - dx_t/dt ||^2
        off-diagonal  || d/dt X_{s,t}(x_s) - sg[ v_t(X_{s,t}(x_s)) ] ||^2,    d/dt X = u_{s,t} + (t-s) d/dt u_{s,t}

    Boffi, Albergo & Vanden-Eijnden 2025, "LSD". The derivative in t is one dual evaluation of the network, with a
    tangent in t alone.

    times     law of (s, t), s <= t; the diagonal rows use its s
    diagonal  expected share of flow-matching rows, the first of the batch. A share that is no whole number of rows is
              rounded at random, so it holds at any B; compiled code rounds to the nearest
    teacher   gives v_t; default: the network itself, without gradient and with dropout off
    weight    of one's own or from `pyflowmap.weights`, e.g. `learned()`
    differentiate_tangent   False: the gradient does not pass through d/dt u, as if one regressed u_{s,t} on
              sg[ v_t(X_{s,t}) - (t-s) d/dt u_{s,t} ]. The same loss and the same solution with another gradient;
              backward costs as much as that of a plain evaluation, in time and in memory
    as_tensor for networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of the diagonal rows, one dual of the others, one of those without gradient. Dropout is one
    mask for value and derivative.
    Errors: TypeError, ValueError for data and shares out of range, and for a flow map that has no mean velocity.

    >>> exact = FlowMap(lambda x, s, t: 0.0 * x * t[:, None])                     # data = noise: nothing moves
    >>> x1 = torch.ones(4, 3)
    >>> lagrangian(exact, x1, x0=x1, diagonal=0.5).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    check_share(diagonal, "diagonal")
    require_mean_velocity(flow_map, "lagrangian")
    condition = dict(condition or {})
    rows, size = x1.shape[0], x1[0].numel()
    n = whole(diagonal * rows, rows, seed)

    s, t = pairs_of(times, x1, seed)
    t = torch.cat([s[:n], t[n:]])
    x, velocity = flow_map.interpolant.draw(x1, s, x0=x0, seed=seed)

    errors = []
    if n > 0:
        output = flow_map.output(x[:n], s[:n], t[:n], rows_of(condition, rows, 0, n))
        errors.append(inner(flow_map.as_mean_velocity(output, x[:n], s[:n], t[:n]) - lazy(velocity[:n])))
    if n < rows:
        far, start, end, given = x[n:], s[n:], t[n:], rows_of(condition, rows, n, rows)
        span = end - start
        u, du = mean_velocity_jvp(
            flow_map,
            far,
            start,
            end,
            (None, None, 1.0),
            given,
            track_tangent=differentiate_tangent,
            as_tensor=as_tensor,
        )
        target = _velocity_there(teacher or flow_map, lazy(far) + span * u.detach(), end, given)
        motion = span * du
        errors.append(inner(u + motion - target if differentiate_tangent else u - (target - motion).detach()))
    error = torch.cat(errors)

    raw = error.detach() / size
    parts = {"flow_matching": raw[:n].mean()} if n > 0 else {}
    if n < rows:
        parts["lagrangian"] = raw[n:].mean()
    return Loss(weight(error, s=s, t=t, size=size), raw, parts)


def _velocity_there(teacher: FlowMap, jump: Lazy, t: Tensor, condition: dict) -> Lazy:
    """v_t(X), without gradient."""
    with frozen_teacher(teacher.network):
        x = evaluate(jump)
        return teacher.as_velocity(teacher.output(x, t, t, condition), x, t)
