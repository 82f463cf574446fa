"""Pooling. An average is linear; a maximum hands on the tangent of the number that it took."""

from __future__ import annotations

from torch.nn import functional as F

from ..parts import primal, recording, tangent
from ..registry import Kind, composite, linear, rule

linear("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
composite("lp_pool1d", "lp_pool2d", "lp_pool3d")


def _taken(input, pooled, spatial, with_indices):
    y, indices = pooled
    dx, dy = tangent(input), None
    if dx is not None:
        with recording(input):
            dy = dx.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view(y.shape)
    return ((y, indices), (dy, None)) if with_indices else (y, dy)


def _max_pool(spatial, pool, always):
    def pair(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        pooled = pool(primal(input), kernel_size, stride, padding, dilation, ceil_mode)
        return _taken(input, pooled, spatial, always or return_indices)

    return pair


def _adaptive_max_pool(spatial, pool, always):
    def pair(input, output_size, return_indices=False):
        return _taken(input, pool(primal(input), output_size), spatial, always or return_indices)

    return pair


for _n in (1, 2, 3):
    for _make, _name in ((_max_pool, f"max_pool{_n}d"), (_adaptive_max_pool, f"adaptive_max_pool{_n}d")):
        _pool = getattr(F, f"{_name}_with_indices")
        rule(_name, kind=Kind.JOINT)(_make(_n, _pool, False))
        rule(f"{_name}_with_indices", kind=Kind.JOINT)(_make(_n, _pool, True))
