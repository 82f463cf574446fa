"""MeanFlow: the mean velocity of a jump from the Eulerian identity, with no teacher and no curriculum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import inner, lazy
from ..flow_map import FlowMap
from .baked_guidance import baked_guidance
from .batch import Batch, check_inputs, check_share, draw_pairs, flow_matching_error, loss_of
from .derivative import mean_velocity_jvp, require_mean_velocity
from .loss import Loss
from .teaching import taught

__all__ = ["eulerian_error", "guided", "mean_flow"]

_adaptive = weights.adaptive(p=1.0, c=0.01, norm="sum")
_paper = partial(time_laws.logit_normal_pair, mean=0.4, std=1.0)


def mean_flow(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = _paper,
    weight: Callable = _adaptive,
    teacher: FlowMap | None = None,
    equal: float = 0.75,
    tangent_scale: float | Tensor = 1.0,
    guidance: baked_guidance | None = None,
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Regress the mean velocity on the identity u_{s,t} = v_s + (t-s) D_s u_{s,t}, D_s the derivative along the flow:

        || u_{s,t}(x_s) - sg[ b + r (t-s) (d/ds u + (du/dx) b) ] ||^2,      b = dx_s/ds, the path's velocity, r = 1

    The squared norm is the sum over a sample. Geng et al. 2025 (MeanFlow), eq. 11 and alg. 1, whose time runs the other
    way: here 0 is noise, 1 data and s <= t. The path's velocity may stand for the marginal one, because the target is
    linear in it; the loss of the exact flow map is therefore not 0, its expected gradient is.

    When to use: from scratch, or as distillation with a teacher. When it fails: float16 (NaN after long runs; train in
    bfloat16 or float32); derivatives that dwarf the velocity, from time embeddings of high frequency.

    times     law of (s, t), s <= t; default two logit-normal times of the paper, whose mean -0.4 is +0.4 in this
              library's time
    weight    default 1 / sg(e + 0.01), e the sum of squares: the paper's p = 1
    teacher   its v_s(x_s) takes the place of b in regression and tangent: MeanFlow distillation, whose loss is 0 at the
              exact map. A FlowMap of a trained velocity network or of a formula. default: the path's velocity
    equal     expected share of rows with t = s, the first of the batch: plain flow matching, which needs no derivative
              and is evaluated apart. Rounded at random where it is no whole number of rows, to the nearest in compiled
              code
    tangent_scale   r in [0, 1], a number or a 0-d tensor that the training loop changes in place: tangent warm-up,
              r = min(1, step / steps of warm-up). Only r = 1 has the flow map as its solution
    guidance  `baked_guidance(omega, kappa, null=...)`: train on a guided velocity; with a teacher, on the guided
              teacher's, and drop=0
    as_tensor for networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of the equal rows, one dual of the others, whose value alone is recorded for backward; with
    guidance one or two more without gradient. Dropout is one mask for value and derivative.
    Errors: TypeError, ValueError for data and options out of range, and for a flow map that has no mean velocity.

    >>> exact = FlowMap(lambda x, s, t: (0.0 * x + 3.0))                           # data = noise + 3
    >>> mean_flow(exact, torch.full((4, 2), 3.0), x0=torch.zeros(4, 2)).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    check_share(equal, "equal")
    require_mean_velocity(flow_map, "mean_flow")
    _check_scale(tangent_scale)
    batch = draw_pairs(flow_map, x1, x0, condition, times, equal, seed, sample_ids)
    batch = guided(flow_map, batch, teacher, guidance, seed)
    near, far = batch.near, batch.far
    return loss_of(
        batch,
        weight,
        flow_matching=None if near is None else flow_matching_error(flow_map, near),
        mean_flow=None if far is None else eulerian_error(flow_map, far, tangent_scale, as_tensor),
    )


def guided(
    flow_map: FlowMap, batch: Batch, teacher: FlowMap | None, guidance: baked_guidance | None, seed: int | None
) -> Batch:
    """The batch with the velocity that is regressed on: the path's or the teacher's, guided."""
    if guidance is None:
        return taught(batch, teacher)
    if not isinstance(guidance, baked_guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; what is trained into a network is "
            'pfm.objectives.baked_guidance(2.0, null={"label": 10})'
        )
    if teacher is not None and guidance.drop > 0.0:
        raise ValueError(
            f"guidance drops conditions (drop = {guidance.drop}) that the teacher has answered; pass drop=0.0"
        )
    batch = taught(batch, teacher)
    velocity, given = guidance(
        teacher or flow_map, batch.x, batch.s, batch.velocity, batch.condition, seed, batch.sample_ids
    )
    return replace(batch, velocity=velocity, condition=given)


def eulerian_error(flow_map: FlowMap, far: Batch, tangent_scale: float | Tensor, as_tensor: bool) -> Tensor:
    """|| u - sg[ b + r (t-s) (d/ds u + (du/dx) b) ] ||^2, (B,)."""
    b = far.velocity
    u, du = mean_velocity_jvp(flow_map, far.x, far.s, far.t, (b, 1.0, None), far.condition, as_tensor=as_tensor)
    return inner(u - (lazy(b) + (tangent_scale * (far.t - far.s)) * du).detach())


def _check_scale(tangent_scale: float | Tensor) -> None:
    if isinstance(tangent_scale, Tensor):
        if tangent_scale.dim() > 0:
            raise ValueError(
                f"tangent_scale has shape {tuple(tangent_scale.shape)}; it is one number for the batch, a float or a "
                "0-d tensor"
            )
    elif not isinstance(tangent_scale, (int, float)) or not 0.0 <= tangent_scale <= 1.0:
        raise ValueError(f"tangent_scale = {tangent_scale!r}; it is a number in [0, 1], e.g. min(1.0, step / 10000)")
