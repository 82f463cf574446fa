"""Lagrangian self-distillation (LSD): the far end of a jump moves with the velocity that is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import Lazy, evaluate, inner, lazy
from ..flow_map import FlowMap
from .batch import Batch, check_inputs, check_share, draw_pairs, flow_matching_error, loss_of
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
    sample_ids: Tensor | None = None,
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
    batch = draw_pairs(flow_map, x1, x0, condition, times, diagonal, seed, sample_ids)
    near, far = batch.near, batch.far
    return loss_of(
        batch,
        weight,
        flow_matching=None if near is None else flow_matching_error(flow_map, near),
        lagrangian=None
        if far is None
        else _error(flow_map, teacher or flow_map, far, differentiate_tangent, as_tensor),
    )


def _error(flow_map: FlowMap, teacher: FlowMap, far: Batch, differentiate_tangent: bool, as_tensor: bool) -> Tensor:
    """|| u + (t-s) d/dt u - sg[ v_t(X_{s,t}) ] ||^2, (B,)."""
    span = far.t - far.s
    u, du = mean_velocity_jvp(
        flow_map,
        far.x,
        far.s,
        far.t,
        (None, None, 1.0),
        far.condition,
        track_tangent=differentiate_tangent,
        as_tensor=as_tensor,
    )
    target = _velocity_there(teacher, lazy(far.x) + span * u.detach(), far.t, far.condition)
    motion = span * du
    return inner(u + motion - target if differentiate_tangent else u - (target - motion).detach())


def _velocity_there(teacher: FlowMap, jump: Lazy, t: Tensor, condition: dict) -> Lazy:
    """v_t(X), without gradient."""
    with frozen_teacher(teacher.network):
        x = evaluate(jump)
        return teacher.as_velocity(teacher.output(x, t, t, condition), x, t)
