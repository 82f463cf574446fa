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

__all__ = ["mean_flow"]

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
    equal: float = 0.75,
    guidance: baked_guidance | None = None,
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Regress the mean velocity on the identity u_{s,t} = v_s + (t-s) D_s u_{s,t}, D_s the derivative along the flow:

        || u_{s,t}(x_s) - sg[ b + (t-s) (d/ds u + (du/dx) b) ] ||^2,      b = dx_s/ds, the path's velocity

    Geng et al. 2025 (MeanFlow), eq. 11 and alg. 1, whose time runs the other way. The path's velocity may stand for the
    marginal one, because the target is linear in it; the loss of the exact flow map is therefore not 0, its expected
    gradient is.

    times     law of (s, t), s <= t; default two logit-normal times of the paper, whose mean -0.4 is +0.4 in this
              library's time
    weight    default 1 / sg(e + 0.01), e the sum of squares: the paper's p = 1
    equal     expected share of rows with t = s, the first of the batch: plain flow matching, which needs no derivative
              and is evaluated apart. Rounded at random where it is no whole number of rows, to the nearest in compiled
              code
    guidance  `baked_guidance(omega, kappa, null=...)`: train on a guided velocity
    as_tensor for networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of the equal rows, one dual of the others, whose value alone is recorded for backward; with
    guidance one or two more without gradient. Dropout is one mask for value and derivative.
    Errors: TypeError, ValueError for data and shares out of range, and for a flow map that has no mean velocity.

    >>> exact = FlowMap(lambda x, s, t: (0.0 * x + 3.0))                           # data = noise + 3
    >>> mean_flow(exact, torch.full((4, 2), 3.0), x0=torch.zeros(4, 2)).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight)
    check_share(equal, "equal")
    require_mean_velocity(flow_map, "mean_flow")
    if guidance is not None and not isinstance(guidance, baked_guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; what is trained into a network is "
            'pfm.objectives.baked_guidance(2.0, null={"label": 10})'
        )
    batch = draw_pairs(flow_map, x1, x0, condition, times, equal, seed, sample_ids)
    if guidance is not None:
        velocity, given = guidance(flow_map, batch.x, batch.s, batch.velocity, batch.condition, seed, sample_ids)
        batch = replace(batch, velocity=velocity, condition=given)
    near, far = batch.near, batch.far
    return loss_of(
        batch,
        weight,
        flow_matching=None if near is None else flow_matching_error(flow_map, near),
        mean_flow=None if far is None else _error(flow_map, far, as_tensor),
    )


def _error(flow_map: FlowMap, far: Batch, as_tensor: bool) -> Tensor:
    """|| u - sg[ b + (t-s) (d/ds u + (du/dx) b) ] ||^2, (B,)."""
    b = far.velocity
    u, du = mean_velocity_jvp(flow_map, far.x, far.s, far.t, (b, 1.0, None), far.condition, as_tensor=as_tensor)
    return inner(u - (lazy(b) + (far.t - far.s) * du).detach())
