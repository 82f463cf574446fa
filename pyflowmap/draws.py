"""Uniform numbers that belong to a sample: what is drawn from them does not depend on the batch the sample is in."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import evaluate, noise

__all__ = ["uniforms"]

_BELOW_ONE = 1.0 - 2.0**-53


def uniforms(x: Tensor, columns: int, stream: int, seed: int | None, sample_ids: Tensor | None) -> Tensor:
    """U(0, 1), below 1, (B, columns) float64 on the device of `x` (B, ...).

    With a seed a row depends on (seed, sample id, stream) alone; sample_ids (B,), int64, default 0..B-1. `stream` tells
    apart what is drawn for one sample. Without a seed torch draws them.
    """
    if seed is None:
        if sample_ids is not None:
            raise ValueError("sample_ids need a seed: what is drawn depends on (seed, sample id); pass seed=")
        return torch.rand(x.shape[0], columns, dtype=torch.float64, device=x.device)
    like = torch.empty(x.shape[0], columns, device=x.device)
    # by the normal distribution's own function, as the laws of times
    return torch.special.ndtr(evaluate(noise(like, seed, sample_ids, stream)).double()).clamp(max=_BELOW_ONE)
