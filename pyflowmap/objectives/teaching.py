"""What a teacher gives: its velocity at the points of the path, without gradient and without dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..algebra import evaluate
from ..flow_map import FlowMap
from .batch import Batch
from .loss import frozen_teacher

__all__ = ["taught", "velocity_of"]


def velocity_of(teacher: FlowMap, x: Tensor, s: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """v_s(x), (B, ...), a constant."""
    with frozen_teacher(teacher.network):
        return evaluate(teacher.as_velocity(teacher.output(x, s, s, condition), x, s), dtype=x.dtype)


def taught(batch: Batch, teacher: FlowMap | None) -> Batch:
    """The batch with the teacher's velocity in place of the path's, which is a noisy sample of it."""
    if teacher is None:
        return batch
    return replace(batch, velocity=velocity_of(teacher, batch.x, batch.s, batch.condition))
