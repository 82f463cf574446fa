"""Posterior-augmented flow matching (PAFM): the target is a mean over data that might have led to the same x_t."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import evaluate, inner, lazy
from ..flow_map import FlowMap
from .batch import Batch, check_inputs, draw_path, flow_matching_error, loss_of
from .loss import Loss
from .negatives import same_rows

__all__ = ["posterior_augmented"]

_mean_square = weights.constant()


def posterior_augmented(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) standard normal noise, independent of x1; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., Tensor] = time_laws.uniform,
    weight: Callable = _mean_square,
    candidates: Tensor | None = None,  # (K, B, ...) further data for each row
    label: str | None = None,
    temperature: float = 1.0,
    sigma_floor: float = 1e-2,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """|| v_t(x_t) - sum_j w_j u_j ||^2, the squared norm over a sample, over candidates c_j for the data end of x_t:

        w   = softmax_j( -||x_t - alpha c_j||^2 / (2 sigma^2 temperature) )
        u_j = alpha' c_j + (sigma'/sigma)(x_t - alpha c_j)

    on the linear path u_j = (c_j - x_t)/(1 - t). PAFM, posterior-augmented flow matching. The row's own x1 is always a
    candidate; with it alone this is flow matching, whose variance the others lower.

    candidates   K further ones per row; default: the other rows of the batch
    label        a key of the condition: the rows with the same label are each other's candidates. Needed where the
                 condition has a tensor with a row per sample, because candidates are data *of that condition*
    temperature  1 is exact. Above it more candidates count and the velocity is biased towards their mean; published
                 variants that take the mean over a sample in place of the sum have temperature = its elements
    sigma_floor  rows with sigma(t) below it, next to the data, are plain flow matching: sigma^2 would underflow, and
                 the row's own weight is 1 there. No bias, as this depends on t alone

    At temperature 1 the mean over candidates is an unbiased estimate of the marginal velocity if the others are
    independent draws from the data of the same condition, as rows of a shuffled batch are. Nearest neighbours, crops
    and autoencoder re-samples are not, and bias it; so does noise that is coupled to the data
    (`pyflowmap.coupling`). parts["effective_samples"] is the mean of 1/sum w^2 over the batch: 1 says that nothing is
    averaged, as happens in many dimensions: gaps between candidates grow with them.

    One network evaluation, and (B, B, D) multiplications in float64, or one pass over the candidates. A row's loss
    depends on the candidates, so on the batch and, on several processes, on those of its own process; its time and
    noise on (seed, sample id) alone.
    Errors: TypeError, ValueError for data, candidates of another shape, conditions without `label`, options.
    """
    check_inputs(flow_map, x1, x0, weight)
    if not temperature > 0.0 or not sigma_floor > 0.0:
        raise ValueError(
            f"temperature = {temperature}, sigma_floor = {sigma_floor}; both are positive, 1.0 and 1e-2 by default"
        )
    allowed = _allowed(x1, condition or {}, candidates, label)
    batch = draw_path(flow_map, x1, x0, condition, times, seed, sample_ids)

    path, t = flow_map.interpolant, batch.s
    far = path.sigma(t) >= sigma_floor
    inside = torch.where(far, t, 0.0)  # near the data, anywhere that is finite
    alpha, sigma = path.alpha(inside), path.sigma(inside)
    # u_j - u = slope (c_j - x1)
    slope = torch.where(far, path.alpha_derivative(inside) - path.sigma_derivative(inside) * alpha / sigma, 0.0)
    scale = (2.0 * temperature) * sigma.double() ** 2
    target, samples = (
        _from_rows(batch, x1, allowed, alpha, scale, slope)
        if candidates is None
        else _from_given(batch, x1, candidates, alpha, scale, slope)
    )
    loss = loss_of(batch, weight, posterior_augmented=flow_matching_error(flow_map, replace(batch, velocity=target)))
    loss.parts["effective_samples"] = torch.where(far, samples, 1.0).mean()
    return loss


def _allowed(x1: Tensor, condition: Mapping[str, Any], candidates: Tensor | None, label: str | None) -> Tensor | None:
    """(B, B), which rows are candidates of which; None: all."""
    rows = x1.shape[0]
    if candidates is not None:
        if label is not None:
            raise ValueError(
                f"label = {label!r} chooses among the rows of the batch, but candidates are given; give one"
            )
        if candidates.shape[1:] != x1.shape or candidates.shape[0] == 0 or candidates.device != x1.device:
            raise ValueError(
                f"candidates {tuple(candidates.shape)} on {candidates.device} do not go with x1 {tuple(x1.shape)} on "
                f"{x1.device}; they are K tensors of its shape, (K, B, ...)"
            )
        return None
    if rows == 1:
        raise ValueError("a batch of one row has no other candidate; pass candidates=, more rows, or use flow_matching")
    if label is not None:
        return same_rows(condition, label, rows)
    for key, value in condition.items():
        if isinstance(value, Tensor) and value.shape[:1] == (rows,):
            raise ValueError(
                f"condition {key!r} differs from row to row, and candidates must share it; pass label={key!r}, or "
                "candidates= drawn for each row's condition"
            )
    return None


def _from_rows(
    batch: Batch, x1: Tensor, allowed: Tensor | None, alpha: Tensor, scale: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """The target and 1/sum w^2, with the rows of the batch as candidates.

    ||x - alpha c||^2 is expanded, and ||x||^2 left out, which is the same for all candidates. In float32 the rest would
    cancel (1e-7 D / sigma^2, several units of the exponent near the data); in float64 the error is 1e-16 D / sigma^2,
    at most 1e-7 for D = 1e5.
    """
    rows, event = x1.shape[0], x1.shape[1:]
    x, c, a = batch.x.flatten(1).double(), x1.flatten(1).double(), alpha.double()[:, None]
    logit = (2.0 * a * (x @ c.T) - a * a * c.square().sum(1)) / scale[:, None]
    if allowed is not None:
        logit = logit.masked_fill(~allowed, -torch.inf)
    w = torch.softmax(logit, 1)
    samples = 1.0 / w.square().sum(1)
    shift = (w - torch.eye(rows, dtype=w.dtype, device=w.device)) @ c  # sum_j w_j (c_j - c_own)
    shift = shift.to(torch.promote_types(x1.dtype, torch.float32))
    return evaluate(lazy(batch.velocity) + slope * lazy(shift.reshape(rows, *event)), dtype=x1.dtype), samples


def _from_given(
    batch: Batch, x1: Tensor, candidates: Tensor, alpha: Tensor, scale: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with candidates of each row's own. Distances are taken of differences: nothing is expanded."""
    x, ends = lazy(batch.x), [x1, *candidates.unbind(0)]
    squares = torch.stack([inner(x - alpha * lazy(each)) for each in ends], 1).double()
    w = torch.softmax(-squares / scale[:, None], 1)
    target = lazy(batch.velocity)
    for k, each in enumerate(ends[1:], 1):
        target = target + (slope * w[:, k].to(slope.dtype)) * (lazy(each) - lazy(x1))
    return evaluate(target, dtype=x1.dtype), 1.0 / w.square().sum(1)
