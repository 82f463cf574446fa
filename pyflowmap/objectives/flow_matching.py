"""Flow matching: regress the velocity of the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..flow_map import FlowMap
from .batch import check_inputs, draw_path, flow_matching_error, loss_of
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
    sample_ids: Tensor | None = None,
) -> Loss:
    """L = E_t || v_t(x_t) - (alpha' x1 + sigma' x0) ||^2,  x_t = alpha x1 + sigma x0.

    Lipman et al. 2023, eq. 9; the diagonal term of every flow-map objective. One network evaluation. `times(x1)` gives
    t (B,). With a seed, times and noise of a row depend on (seed, sample id) alone, not on the batch it is in.

    >>> import torch
    >>> exact = FlowMap(lambda x, t: (x - 0) / t[:, None], prediction="velocity")   # data x1, noise fixed at 0
    >>> x1 = torch.ones(4, 3)
    >>> flow_matching(exact, x1, x0=torch.zeros(4, 3)).mean().item() < 1e-9
    True
    """
    check_inputs(flow_map, x1, x0, weight)
    batch = draw_path(flow_map, x1, x0, condition, times, seed, sample_ids)
    return loss_of(batch, weight, flow_matching=flow_matching_error(flow_map, batch))
