"""Velocities that a sample does *not* have, and the loss that pushes away from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import inner, lazy
from ..draws import uniforms
from ..flow_map import FlowMap
from .batch import Batch
from .loss import Loss

__all__ = ["null_rows", "other_rows", "other_rows_of", "permuted_channels", "pushed_away", "same_rows"]

_STREAM = 0x6E656761  # apart from the noise (0) and the times of the same sample


def permuted_channels(
    velocity: Tensor, count: int, channel_dim: int, seed: int | None, sample_ids: Tensor | None
) -> list[Tensor]:
    """`count` copies, the channels of each sample in a random order, the identity included."""
    rows, channels = velocity.shape[0], velocity.shape[channel_dim]
    orders = uniforms(velocity, count * channels, _STREAM, seed, sample_ids).reshape(rows, count, channels).argsort(-1)
    shape = [rows, *[1] * (velocity.dim() - 1)]
    shape[channel_dim] = channels
    return [torch.take_along_dim(velocity, orders[:, k].reshape(shape), channel_dim) for k in range(count)]


def other_rows(x1: Tensor, seed: int | None, sample_ids: Tensor | None) -> Tensor:
    """n(i) != i, uniform over the other rows, (B,)."""
    rows = x1.shape[0]
    ahead = (uniforms(x1, 1, _STREAM, seed, sample_ids)[:, 0] * (rows - 1)).long()
    return (torch.arange(rows, device=x1.device) + 1 + ahead) % rows


def other_rows_of(allowed: Tensor, x1: Tensor, seed: int | None, sample_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """n(i) uniform over the j with allowed[i, j], and whether there is one: (B,), (B,). Without one, n(i) = 0."""
    count = allowed.sum(1)
    chosen = (uniforms(x1, 1, _STREAM, seed, sample_ids)[:, 0] * count).long()
    # the first j with more than `chosen` allowed ones up to it
    return (allowed.cumsum(1) > chosen[:, None]).int().argmax(1), count > 0


def same_rows(condition: Mapping[str, Any], key: str, rows: int) -> Tensor:
    """(B, B): whether samples i and j have the same condition[key]."""
    if key not in condition:
        raise ValueError(f"label = {key!r} but the condition has {sorted(condition) or 'nothing'}; name one of these")
    value = condition[key]
    if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"condition {key!r} ({shown}) is not a label for each of {rows} samples; pass a tensor ({rows},)"
        )
    value = value.reshape(rows, -1)
    return (value[:, None] == value[None]).all(-1)


def null_rows(condition: Mapping[str, Any], null: Mapping[str, Any], x1: Tensor) -> Tensor:
    """(B,): whether a sample's condition is the null one, in every key that `null` names."""
    result = torch.ones(x1.shape[0], dtype=torch.bool, device=x1.device)
    for key, none in null.items():
        value = condition.get(key)
        if not isinstance(value, Tensor) or value.shape[:1] != x1.shape[:1] or none is None:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"null names {key!r} = {none!r}, but condition {key!r} ({shown}) cannot be compared with it row by "
                f"row; pass a tensor ({x1.shape[0]}, ...) and the number or tensor that means none"
            )
        result &= (value == none).reshape(x1.shape[0], -1).all(1)
    return result


def pushed_away(
    flow_map: FlowMap, batch: Batch, negatives: Sequence[Tensor], strength: float | Tensor, weight: Callable
) -> Loss:
    """|| v - u ||^2 - sum_j strength || v - n_j ||^2, with the square completed; strength a float or (B,).

    As a function of v it is (1 - k) || v - (u - strength sum_j n_j)/(1 - k) ||^2 + const, k = strength * their number.
    Without the constant it is never negative, so that every weight can take it; the gradient is the same.
    """
    output = flow_map.output(batch.x, batch.s, batch.t, batch.condition)
    v = flow_map.as_velocity(output, batch.x, batch.s)
    u = lazy(batch.velocity)
    rest = 1.0 - len(negatives) * strength
    target = (1.0 / rest) * u
    for negative in negatives:
        target = target - (strength / rest) * lazy(negative)
    error = rest * inner(v - target)

    plain = inner((v - u).detach()) / batch.size
    apart = [inner((v - lazy(negative)).detach()).mean() / batch.size for negative in negatives]
    parts = {"flow_matching": plain.mean(), "negative": torch.stack(apart).mean()}
    return Loss(weight(error, s=batch.s, t=batch.t, size=batch.size), plain, parts)
