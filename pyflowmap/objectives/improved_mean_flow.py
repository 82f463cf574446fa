"""iMF: MeanFlow as a regression whose target does not hold the network, with guidance as an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import Lazy, evaluate, inner, lazy
from ..flow_map import FlowMap
from ..tangents import jvp
from .batch import Batch, check_inputs, check_share, draw_pairs, loss_of
from .derivative import require_mean_velocity
from .embedded_guidance import embedded_guidance
from .loss import Loss, frozen_teacher
from .teaching import taught

__all__ = ["improved_mean_flow"]

_adaptive = weights.adaptive(p=1.0, c=0.01, norm="sum")
_paper = partial(time_laws.logit_normal_pair, mean=0.4, std=1.0)


def improved_mean_flow(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = _paper,
    weight: Callable = _adaptive,
    teacher: FlowMap | None = None,
    equal: float = 0.5,
    guidance: embedded_guidance | None = None,
    velocity_head: Callable[[Any], Tensor] | None = None,
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Regress what the network says the velocity is on the path's velocity b = dx_s/ds:

        || V - b ||^2,      V = u_{s,t}(x_s) - (t-s) sg[ d/ds u_{s,t} + (du_{s,t}/dx) w ],      w = sg[ v_s(x_s) ]

    w is the network's own velocity, so that V is a function of x_s alone; MeanFlow has b in its place. The squared norm
    is the sum over a sample. Geng et al. 2025 (improved MeanFlow); time 0 is noise, 1 data, s <= t, the paper's runs
    the other way. As in MeanFlow the expected gradient is 0 at the exact flow map; the loss is the variance of b there.

    When to use: as MeanFlow, and where guidance shall not be fixed before training. When it fails: as MeanFlow, in
    float16 and with derivatives that dwarf the velocity; and early on w is as wrong as the network is.

    times     law of (s, t), s <= t; default MeanFlow's
    weight    default 1 / sg(e + 0.01), e the sum of squares; of V and of the head each
    teacher   its v_s(x_s) takes the place of b and w: then the same as `mean_flow` with a teacher. Not with guidance
    equal     expected share of rows with t = s, the first of the batch, where V = u and no derivative is needed.
              Rounded at random where it is no whole number of rows, to the nearest in compiled code
    guidance  `embedded_guidance(null=...)`: b becomes the guided b_g for a scale that the network is told
    velocity_head   takes v_s(x_s) out of what the network returns, e.g. `lambda output: output[1]` for a network that
              returns (u, v), of which the flow map itself sees the first. It is trained by || v - b ||^2 beside V, and
              w is its value at t = s; without a head w = u_{s,s}. In the network's own direction of time, as u
    as_tensor for networks that ask isinstance(x, torch.Tensor); as for `pfm.jvp`

    Network evaluations: one of the equal rows, of the others one dual, whose value alone is recorded for backward, and
    one without gradient and with dropout off for w; with guidance two of all rows in its place. `raw_error` is that of
    V, `parts` name the head's too.
    Errors: TypeError, ValueError for data, shares and options out of range, and for a flow map that has no mean
    velocity.

    >>> exact = FlowMap(lambda x, s, t: (0.0 * x + 3.0))                           # data = noise + 3
    >>> improved_mean_flow(exact, torch.full((4, 2), 3.0), x0=torch.zeros(4, 2)).mean().item()
    0.0
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    check_share(equal, "equal")
    require_mean_velocity(flow_map, "improved_mean_flow")
    _check_options(teacher, guidance, velocity_head)
    network = _Heads(flow_map, velocity_head, as_tensor)
    batch = taught(draw_pairs(flow_map, x1, x0, condition, times, equal, seed, sample_ids), teacher)
    own = batch.velocity if teacher is not None else None
    if guidance is not None:
        batch, own = guidance(batch, network.velocity, seed)
    near, far = batch.near, batch.far

    errors: dict[str, Tensor | None] = {}
    heads = []
    if near is not None:
        errors["flow_matching"], head = network.errors(near, None)
        heads += [] if head is None else [head]
    if far is not None:
        if own is None:
            w = evaluate(network.velocity(far), dtype=far.velocity.dtype)
        else:
            w = own[batch.equal :]
        errors["improved_mean_flow"], head = network.errors(far, w)
        heads += [] if head is None else [head]
    loss = loss_of(batch, weight, **errors)
    if not heads:
        return loss
    beside = loss_of(batch, weight, velocity_head=torch.cat(heads))
    return Loss(loss.per_sample + beside.per_sample, loss.raw_error, {**loss.parts, **beside.parts})


class _Heads:
    """A flow map whose network may say the velocity beside the mean velocity."""

    def __init__(self, flow_map: FlowMap, velocity_head: Callable[[Any], Tensor] | None, as_tensor: bool):
        self.flow_map, self.velocity_head, self.as_tensor = flow_map, velocity_head, as_tensor

    def outputs(self, x: Any, s: Any, t: Any, condition: Mapping[str, Any]) -> tuple[Any, Any]:
        """(u, v) in the network's own direction of time; v is None without a head. One evaluation."""
        if self.velocity_head is None:
            return self.flow_map.output(x, s, t, condition), None
        returned = []

        def network(*args: Any, **kwargs: Any) -> Any:
            returned.append(self.flow_map.network(*args, **kwargs))
            return returned[-1]

        u = replace(self.flow_map, network=network).output(x, s, t, condition)
        v = self.velocity_head(returned[-1])
        if getattr(v, "shape", None) != x.shape:
            shown = f"shape {tuple(v.shape)}" if hasattr(v, "shape") else type(v).__name__
            raise ValueError(
                f"velocity_head gave {shown} for a state of shape {tuple(x.shape)}; it takes the velocity out of what "
                "the network returns, e.g. lambda output: output[1]"
            )
        return u, v

    def velocity(self, batch: Batch) -> Lazy:
        """v_s(x), without gradient and dropout."""
        with frozen_teacher(self.flow_map.network):
            u, v = self.outputs(batch.x, batch.s, batch.s, batch.condition)
            return self.flow_map.as_velocity(u if v is None else v, batch.x, batch.s)

    def errors(self, batch: Batch, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(|| V - b ||^2, || v - b ||^2), (B,) each; w None where t = s and V = u."""
        x, s, t, b = batch.x, batch.s, batch.t, lazy(batch.velocity)
        if w is None:
            output, v = self.outputs(x, s, t, batch.condition)
            error = inner(self.flow_map.as_mean_velocity(output, x, s, t) - b)
        else:
            output, d_output, v = jvp(
                lambda x, s, t: self.outputs(x, s, t, batch.condition),
                (x, s, t),
                (w, 1.0, None),
                has_aux=True,
                as_tensor=self.as_tensor,
            )
            # A mean velocity is the output itself, up to the sign: linear.
            u, du = (self.flow_map.as_mean_velocity(each, x, s, t) for each in (output, d_output))
            error = inner(u - ((t - s) * du).detach() - b)
        return error, None if v is None else inner(self.flow_map.as_velocity(v, x, s) - b)


def _check_options(teacher: Any, guidance: Any, velocity_head: Any) -> None:
    if guidance is not None and not isinstance(guidance, embedded_guidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; what a network is told is "
            'pfm.objectives.embedded_guidance(null={"label": 10})'
        )
    if guidance is not None and teacher is not None:
        raise ValueError("guidance and teacher are both given; embedded_guidance guides by the network's own velocity")
    if velocity_head is not None and not callable(velocity_head):
        raise TypeError(
            f"velocity_head is {type(velocity_head).__name__}; it is a function of what the network returns, e.g. "
            "lambda output: output[1]"
        )
