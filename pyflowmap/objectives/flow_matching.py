"""Flow matching: regress the velocity of the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import inner, lazy
from ..flow_map import FlowMap
from .batch import check_inputs
from .loss import Loss

__all__ = ["flow_matching"]

_mean_square = weights.constant()


def flow_matching(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., Tensor] = time_laws.uniform,
    weight: Callable = _mean_square,
    seed: int | None = None,
) -> Loss:
    """L = E_t || v_t(x_t) - (alpha' x1 + sigma' x0) ||^2,  x_t = alpha x1 + sigma x0.

    Lipman et al. 2023, eq. 9; the diagonal term of every flow-map objective. One network evaluation. `times(x1)` gives
    t (B,); it is called with `seed=` where a seed is given, as is the noise.

    >>> import torch
    >>> exact = FlowMap(lambda x, t: (x - 0) / t[:, None], prediction="velocity")   # data x1, noise fixed at 0
    >>> x1 = torch.ones(4, 3)
    >>> flow_matching(exact, x1, x0=torch.zeros(4, 3)).mean().item() < 1e-9
    True
    """
    check_inputs(flow_map, x1, x0, weight)
    t = times(x1) if seed is None else times(x1, seed=seed)
    if isinstance(t, (tuple, list)):
        raise ValueError(f"times gave {len(t)} times; flow matching takes a law of one, e.g. pfm.times.uniform")
    x, velocity = flow_map.interpolant.draw(x1, t, x0=x0, seed=seed)
    output = flow_map.output(x, t, t, condition or {})
    error = inner(flow_map.as_velocity(output, x, t) - lazy(velocity))
    size = x1[0].numel()
    raw = error.detach() / size
    return Loss(weight(error, s=t, t=t, size=size), raw, {"flow_matching": raw.mean()})
