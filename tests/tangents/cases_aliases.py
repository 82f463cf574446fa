"""Names that other cases leave out: second names, and functions that torch's own call below."""

from __future__ import annotations

from typing import Any

import torch
from tangents.case import Case, normal
from torch.nn import functional as F

low = torch._C._nn


def square() -> tuple[Any, ...]:
    return (normal(4, 4),)


def cube() -> tuple[Any, ...]:
    return (normal(2, 4, 4),)


def images() -> tuple[Any, ...]:
    return (normal(1, 2, 4, 4),)


def volumes() -> tuple[Any, ...]:
    return (normal(1, 1, 4, 4, 4),)


def two() -> tuple[Any, ...]:
    return normal(3, 2), normal(3, 2)


SECOND_NAMES = [
    Case("negative", torch.negative, square),
    Case("H", lambda x: x.H, square),
    Case("mH", lambda x: x.mH, cube),
    Case("adjoint", torch.adjoint, cube),
    Case("moveaxis", lambda x: torch.moveaxis(x, 0, 1), cube),
    Case("swapdims", lambda x: x.swapdims(0, 2), cube),
    Case("concat", lambda a, b: torch.concat([a, b], 1), two),
    Case("concatenate", lambda a, b: torch.concatenate([a, b]), two),
    Case("row_stack", lambda a, b: torch.row_stack([a, b]), two),
    Case("column_stack", lambda a, b: torch.column_stack([a, b]), two),
    Case("dstack", lambda a, b: torch.dstack([a, b]), two),
    Case("hsplit", lambda x: x.hsplit(2), square),
    Case("vsplit", lambda x: x.vsplit(2), square),
    Case("dsplit", lambda x: x.dsplit(2), cube),
    Case("unsafe_chunk", lambda x: torch.unsafe_chunk(x, 2), square),
    Case("unsafe_split", lambda x: torch.unsafe_split(x, 2), square),
    Case("narrow_copy", lambda x: torch.narrow_copy(x, 1, 1, 2), square, func_jvp=False),
    Case("atleast_1d", lambda x: torch.atleast_1d(x.sum()), square),
    Case("atleast_1d: two", lambda x, y: torch.atleast_1d(x.sum(), y), lambda: (*square(), *square())),
    Case("atleast_2d", lambda x: torch.atleast_2d(x[0]), square),
    Case("fliplr", torch.fliplr, square),
    Case("flipud", torch.flipud, square),
    Case("diag", torch.diag, square),
    Case("diagflat", torch.diagflat, square),
    Case("linalg_diagonal", torch.linalg.diagonal, cube),
    Case("resolve_conj", torch.resolve_conj, square),
    Case("resolve_neg", torch.resolve_neg, square),
    Case("conj_physical", torch.conj_physical, square),
    Case("mode", lambda x: torch.mode(x, 1)[0], cube),
    Case("cross: torch.cross", lambda a, b: torch.cross(a, b, dim=0), two),
]

POOLS = [
    Case("max_pool1d_with_indices", lambda x: F.max_pool1d(x, 2, return_indices=True)[0], cube),
    Case("max_pool2d: torch.max_pool2d", lambda x: torch.max_pool2d(x, 2), images),
    Case("max_pool3d: torch.max_pool3d", lambda x: torch.max_pool3d(x, 2), volumes),
    Case("max_pool3d_with_indices", lambda x: F.max_pool3d(x, 2, return_indices=True)[0], volumes),
    Case("adaptive_max_pool1d_with_indices", lambda x: F.adaptive_max_pool1d(x, 2, return_indices=True)[0], cube),
    Case("adaptive_max_pool2d_with_indices", lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0], images),
    Case("adaptive_max_pool3d_with_indices", lambda x: F.adaptive_max_pool3d(x, 2, True)[0], volumes),
    Case("lp_pool1d", lambda x: F.lp_pool1d(x.exp(), 2, 2), cube),
    Case("lp_pool3d", lambda x: F.lp_pool3d(x.exp(), 2, 2), volumes),
    Case("max_unpool1d", lambda x: F.max_unpool1d(x, torch.tensor([[[0, 3]]]), 2), lambda: (normal(1, 1, 2),)),
    Case("max_unpool2d", lambda x: F.max_unpool2d(x, torch.tensor([[[[2]]]]), 2), lambda: (normal(1, 1, 1, 1),)),
    Case("max_unpool3d", lambda x: F.max_unpool3d(x, torch.tensor([[[[[5]]]]]), 2), lambda: (normal(1, 1, 1, 1, 1),)),
]

# Not compiled: torch.compile does not ask an argument's class about functions that torch.overrides does not list
RESIZES = [
    Case("upsample", lambda x: F.upsample(x, scale_factor=2), images, compiled=False),
    Case("upsample_nearest", lambda x: F.upsample_nearest(x, scale_factor=2), images, compiled=False),
    Case("upsample_bilinear", lambda x: F.upsample_bilinear(x, scale_factor=2), images, compiled=False),
    Case("upsample_nearest1d", lambda x: low.upsample_nearest1d(x, [6], None), cube, compiled=False),
    Case("upsample_nearest2d", lambda x: low.upsample_nearest2d(x, [6, 8], None), images, compiled=False),
    Case("upsample_nearest3d", lambda x: low.upsample_nearest3d(x, [6, 4, 8], None), volumes, compiled=False),
    Case("upsample_linear1d", lambda x: low.upsample_linear1d(x, [6], False, None), cube, compiled=False),
    Case("upsample_bilinear2d", lambda x: low.upsample_bilinear2d(x, [6, 8], True, None), images, compiled=False),
    Case("upsample_bicubic2d", lambda x: low.upsample_bicubic2d(x, [6, 8], False, None), images, compiled=False),
    Case(
        "upsample_trilinear3d", lambda x: low.upsample_trilinear3d(x, [6, 4, 8], False, None), volumes, compiled=False
    ),
    Case(
        "grid_sampler",
        lambda x, grid: torch.grid_sampler(x, grid.tanh(), 0, 0, False),
        lambda: (normal(1, 2, 4, 4), normal(1, 3, 3, 2)),
        moves=(0,),
        func_jvp=False,
    ),
]

CASES = [
    *SECOND_NAMES,
    *POOLS,
    *RESIZES,
    Case("feature_dropout", lambda x: torch.feature_dropout(x, 0.4, True), images, random=True, func_jvp=False),
]
