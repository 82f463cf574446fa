"""The derivative of a mean velocity along its arguments, as the objectives ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..algebra import Lazy
from ..flow_map import FlowMap
from ..tangents import jvp

__all__ = ["mean_velocity_jvp", "require_mean_velocity"]


def require_mean_velocity(flow_map: FlowMap, name: str) -> None:
    if flow_map.prediction != "mean_velocity":
        raise ValueError(
            f'{name} trains the mean velocity of jumps, but this flow map has prediction="{flow_map.prediction}"; use '
            'FlowMap(network, prediction="mean_velocity", call=...) with a network that takes both times'
        )


def mean_velocity_jvp(
    flow_map: FlowMap,
    x: Tensor,
    s: Tensor,
    t: Tensor,
    tangents: tuple[Any, Any, Any],
    condition: Mapping[str, Any],
    *,
    track_tangent: bool = False,
    as_tensor: bool = False,
) -> tuple[Lazy, Lazy]:
    """u_{s,t}(x) and its derivative in the direction (dx, ds, dt), from one dual evaluation of the network."""
    output, d_output = jvp(
        lambda x, s, t: flow_map.output(x, s, t, condition),
        (x, s, t),
        tangents,
        track_tangent=track_tangent,
        as_tensor=as_tensor,
    )
    # A mean velocity is the output itself, up to the sign of a network whose time runs backward: linear.
    return flow_map.as_mean_velocity(output, x, s, t), flow_map.as_mean_velocity(d_output, x, s, t)
