"""Convolutions, linear in the image and in the kernel; one convolution per tangent."""

from __future__ import annotations

import torch

from ..parts import primal, tangent
from ..registry import rule
from .arithmetic import sum_of


def _convolution(function, spatial):
    def tangent_of(y, input, weight, bias=None, *args, **kwargs):
        dx, dw, db = tangent(input), tangent(weight), tangent(bias)
        dy = None if dx is None else function(dx, primal(weight), None, *args, **kwargs)
        if dw is not None:
            dy = sum_of(dy, function(primal(input), dw, None, *args, **kwargs))
        if db is not None:
            axes = y.ndim - 2 if spatial is None else spatial
            dy = sum_of(dy, db.reshape(-1, *(1,) * axes))
        return dy

    return tangent_of


for _spatial in (1, 2, 3):
    for _name in ("conv", "conv_transpose"):
        rule(f"{_name}{_spatial}d")(_convolution(getattr(torch, f"{_name}{_spatial}d"), _spatial))
rule("convolution")(_convolution(torch.convolution, None))
