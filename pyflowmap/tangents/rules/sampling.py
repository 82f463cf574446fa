"""Resampling of images: linear in the image."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..parts import primal, tangent
from ..registry import linear, rule

linear("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "affine_grid")
linear("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
linear("upsample_bicubic2d", "upsample_trilinear3d", "max_unpool1d", "max_unpool2d", "max_unpool3d")


def _sampled(input, grid, sample):
    if tangent(grid) is not None:
        raise NotImplementedError(
            "grid_sample has no rule for a grid with a tangent; its image may have one. Pass grid.detach()"
        )
    return sample(tangent(input), primal(grid))


@rule(F.grid_sample)
def _grid_sample(y, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    return _sampled(input, grid, lambda dx, g: F.grid_sample(dx, g, mode, padding_mode, bool(align_corners)))


@rule(torch.grid_sampler)
def _grid_sampler(y, input, grid, interpolation_mode, padding_mode, align_corners):
    how = (interpolation_mode, padding_mode, align_corners)
    return _sampled(input, grid, lambda dx, g: torch.grid_sampler(dx, g, *how))
