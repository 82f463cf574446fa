"""Eulerian self-distillation (ESD): where a jump ends does not change as its start moves along the flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import evaluate, inner, lazy
from ..flow_map import FlowMap
from .batch import Batch, check_inputs, check_share, draw_pairs, flow_matching_error, loss_of
from .derivative import mean_velocity_jvp, require_mean_velocity
from .loss import Loss, frozen_teacher
from .teaching import velocity_of

__all__ = ["eulerian"]

_mean_square = weights.constant()
_STOPS = ("spatial", "teacher", "none")


def eulerian(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = time_laws.uniform_pair,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    diagonal: float = 0.75,
    stop_gradient: str = "spatial",
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Flow matching on the diagonal and d/ds X_{s,t} + (dX_{s,t}/dx) v_s = 0 off it, in one run from scratch.

        diagonal      || u_{t,t}(x_t) - dx_t/dt ||^2
        off-diagonal  || d/ds X_{s,t}(x_s) + sg[ (dX_{s,t}/dx) v_s(x_s) ] ||^2
                      d/ds X = (t-s) d/ds u_{s,t} - u_{s,t},    (dX/dx) v = v + (t-s) (du_{s,t}/dx) v

    Squared norms are sums over a sample; the default weight takes their mean. Time 0 is noise, 1 data, s <= t.
    Boffi, Albergo & Vanden-Eijnden 2025, "ESD".

    When to use: small problems, distillation of a given velocity, comparisons. It fails on images: the network's own
    Jacobian multiplies the error of its velocity, and the paper reports none of its image runs as stable; `lagrangian`
    and `progressive` are the ones to train there. MeanFlow is its relative with less in the gradient.

    times     law of (s, t), s <= t; the diagonal rows use its s
    diagonal  expected share of flow-matching rows, the first of the batch. A share that is no whole number of rows is
              rounded at random, so it holds at any B; compiled code rounds to the nearest
    teacher   gives v_s off the diagonal: a FlowMap, e.g. of a trained velocity network or of a formula; default: the
              network itself, without gradient
    weight    of one's own or from `pyflowmap.weights`, e.g. `learned()`
    stop_gradient   where no gradient passes. "spatial", the paper's: the whole of (dX/dx) v. "teacher": v alone.
              "none": nowhere, so that the network's own velocity is pulled towards the jumps; not with a teacher
    as_tensor for networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of the diagonal rows; of the others one dual that is recorded for backward with its
    tangent, one dual without gradient ("spatial" only) and one plain. Off the diagonal dropout is off, as in the
    paper's code: value and derivatives are those of one function. (Activation checkpointing that runs the network again
    in backward would have dropout on there.)
    Errors: TypeError, ValueError for data, shares and options out of range, and for a flow map that has no mean
    velocity.

    >>> exact = FlowMap(lambda x, s, t: 0.0 * x * t[:, None])                     # data = noise: nothing moves
    >>> x1 = torch.ones(4, 3)
    >>> eulerian(exact, x1, x0=x1, diagonal=0.5).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    check_share(diagonal, "diagonal")
    require_mean_velocity(flow_map, "eulerian")
    if stop_gradient not in _STOPS:
        raise ValueError(f"stop_gradient = {stop_gradient!r}; it is one of {', '.join(_STOPS)}")
    if teacher is not None and stop_gradient == "none":
        raise ValueError('stop_gradient = "none" with a teacher, which has no gradient; pass "teacher" or "spatial"')
    batch = draw_pairs(flow_map, x1, x0, condition, times, diagonal, seed, sample_ids)
    near, far = batch.near, batch.far
    return loss_of(
        batch,
        weight,
        flow_matching=None if near is None else flow_matching_error(flow_map, near),
        eulerian=None if far is None else _error(flow_map, teacher, far, stop_gradient, as_tensor),
    )


def _error(flow_map: FlowMap, teacher: FlowMap | None, far: Batch, stop_gradient: str, as_tensor: bool) -> Tensor:
    """|| (t-s) d/ds u - u + v + (t-s) (du/dx) v ||^2, (B,)."""
    x, s, t, span = far.x, far.s, far.t, far.t - far.s

    def derivative(dx: Tensor | None, ds: float | None, track: bool):
        return mean_velocity_jvp(
            flow_map, x, s, t, (dx, ds, None), far.condition, track_tangent=track, as_tensor=as_tensor
        )

    recorded = torch.is_grad_enabled()
    # Two dual evaluations must see one function: dropout is off here.
    with frozen_teacher(flow_map.network), torch.set_grad_enabled(recorded):
        if stop_gradient == "none":
            v = evaluate(flow_map.as_velocity(flow_map.output(x, s, s, far.condition), x, s), dtype=x.dtype)
        else:
            v = velocity_of(teacher or flow_map, x, s, far.condition)
        if stop_gradient != "spatial":
            u, du = derivative(v, 1.0, True)
            return inner(lazy(v) - u + span * du)
        with torch.no_grad():
            _, along = derivative(v, None, False)
        u, du = derivative(None, 1.0, True)
        return inner(span * du - u + (lazy(v) + span * along).detach())
