"""Contrastive flow matching: pushed away from the velocity of another sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..flow_map import FlowMap
from .batch import check_inputs, draw_path
from .loss import Loss
from .negatives import null_rows, other_rows, other_rows_of, pushed_away, same_rows

__all__ = ["contrastive"]

_mean_square = weights.constant()


def contrastive(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., Tensor] = time_laws.uniform,
    weight: Callable = _mean_square,
    strength: float = 0.05,
    null: Mapping[str, Any] | None = None,
    label: str | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """|| v_t(x_i) - u_i ||^2 - strength_i || v_t(x_i) - u_{n(i)} ||^2,   u = dx_t/dt,  n(i) != i another row.

    Contrastive flow matching (Delta FM), Stoica et al. 2025. Squared norms, the sum over a sample, which `weight` turns
    into a mean.

    strength  lambda, in [0, 1); the paper's 0.05
    null      e.g. {"label": 10}: rows with this condition are not pushed, and the others by lambda B/(rows pushed), so
              that a batch is pushed as much as before (at most (1 + lambda)/2, where almost all rows are null)
    label     a key of the condition: n(i) is a row with another label, and not a null one; a row that finds none is
              treated as a null row. parts["contrasted"] is the share of rows pushed. Default: any other row
    weight    is given the square completed, (1 - lambda) || v - (u_i - lambda u_n)/(1 - lambda) ||^2: the same
              gradient, never negative. The paper's own number, where all rows are pushed, is parts["flow_matching"] -
              lambda parts["negative"], mean squares both; it may be negative. `raw_error` is the plain || v - u ||^2

    The minimum is not the velocity v but (v - lambda m)/(1 - lambda), m = E[u], on the linear path the mean of the data
    (with `label`, of the data with other labels). `pfm.guidance.contrastive_correction(lambda, m)` takes it back when
    sampling; lambda is then lambda/(share of rows pushed), and rows of the null condition, where `null` left them out,
    are not shifted.

    One network evaluation. Use it where conditions are hard to tell apart. A row's loss depends on the other rows of
    its batch: of them n(i) is chosen, by (seed, sample id) alone. On several processes it is a row of the same one.
    Errors: TypeError, ValueError for data, a batch of one row, a strength out of range, conditions that are not there.
    """
    check_inputs(flow_map, x1, x0, weight)
    rows = x1.shape[0]
    if not 0.0 <= strength < 1.0:
        raise ValueError(f"strength = {strength}: the loss has a lower bound in [0, 1) only; the paper has 0.05")
    if rows == 1:
        raise ValueError("a batch of one row has no other row to be contrasted with; use more rows, or flow_matching")
    batch = draw_path(flow_map, x1, x0, condition, times, seed, sample_ids)
    is_null = None if null is None else null_rows(batch.condition, null, x1)
    if label is None:
        index, pushed = other_rows(x1, seed, sample_ids), None if is_null is None else ~is_null
    else:
        allowed = ~same_rows(batch.condition, label, rows)
        if is_null is not None:
            allowed &= ~is_null[:, None] & ~is_null[None]
        index, pushed = other_rows_of(allowed, x1, seed, sample_ids)
    each: float | Tensor = strength
    if pushed is not None:
        share = pushed.to(batch.s.dtype).mean()
        # A batch of null rows but one would push that one with lambda B, past the bound.
        each = torch.where(pushed, (strength / share).clamp(max=0.5 * (1.0 + strength)), 0.0)
    loss = pushed_away(flow_map, batch, [batch.velocity[index]], each, weight)
    if pushed is not None:
        loss.parts["contrasted"] = share
    return loss
