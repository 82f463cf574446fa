"""Normalisations. x^ = (x - m) / s has a symmetric Jacobian, so torch's backward kernel is the tangent's, in one pass:
dx^ = (dx - mean(dx) - x^ mean(x^ dx)) / s. Mean and deviation are those that the value was computed with.

Where the tangent is tracked and the kernel has no derivative, the formula is written out.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ..parts import primal, recording, tangent
from ..registry import Kind, composite, rule
from .arithmetic import sum_of

aten = torch.ops.aten
_ONLY_INPUT = [True, False, False]

composite("local_response_norm")


def affine(normal, dnormal, weight, bias, shape):
    """The tangent of normal * weight + bias, whose parameters have `shape`; `normal()` is called if it is needed."""
    dweight, dbias = tangent(weight), tangent(bias)
    dy = dnormal if dnormal is None or weight is None else dnormal * primal(weight).reshape(shape)
    if dweight is not None:
        dy = sum_of(dy, normal() * dweight.reshape(shape))
    return dy if dbias is None else sum_of(dy, dbias.reshape(shape))


def _in_autocast_dtype(*tensors):
    """What torch's autocast makes of the arguments of a normalisation: float32 on CUDA, nothing on a CPU."""
    x = tensors[0]
    if x.is_cuda and torch.is_autocast_enabled(x.device.type):
        return [None if each is None else each.float() for each in tensors]
    return tensors


def _as_statistics(mean, x, dx):
    """On a CPU the backward kernels want one dtype; of half precision with float32 weights, statistics are float32."""
    return (x.to(mean.dtype), dx.to(mean.dtype)) if x.is_cpu and mean.dtype != x.dtype else (x, dx)


@rule("layer_norm", kind=Kind.JOINT)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    x, w, b, dx = _in_autocast_dtype(primal(input), primal(weight), primal(bias), tangent(input))
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, w, b, eps)
    with recording(input, weight, bias):
        dnormal = None
        if dx is not None:
            x, dx = _as_statistics(mean, x, dx)
            dnormal = aten.native_layer_norm_backward(dx, x, normalized_shape, mean, rstd, None, None, _ONLY_INPUT)[0]
        if w is None:
            return y, dnormal
        return y, affine(lambda: F.layer_norm(x, normalized_shape, None, None, eps), dnormal, weight, bias, w.shape)


@rule("group_norm", kind=Kind.JOINT)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    x, w, b, dx = _in_autocast_dtype(primal(input), primal(weight), primal(bias), tangent(input))
    last = x.is_cpu and x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel() if x.shape[0] else 0, num_groups)
    w, b = (None if each is None else each.contiguous() for each in (w, b))  # whose strides the kernel takes no note of
    y, mean, rstd = torch.native_group_norm(x, w, b, *sizes, eps)
    with recording(input, weight, bias):
        dnormal = None
        if dx is not None and torch.is_grad_enabled():
            grouped = (x.shape[0], num_groups, x.shape[1] // num_groups * sizes[2])
            dnormal = _normal_tangent(x.reshape(grouped), dx.reshape(grouped), (2,), eps).reshape(x.shape)
        elif dx is not None:
            x, dx = _as_statistics(mean, x, dx.contiguous(memory_format=layout))
            dnormal = aten.native_group_norm_backward(dx, x, mean, rstd, None, *sizes, _ONLY_INPUT)[0]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return y, affine(lambda: F.group_norm(x, num_groups, None, None, eps), dnormal, weight, bias, shape)


def _normal_tangent(x, dx, axes, eps):
    """The formula at the head of this file, differentiable."""
    centred = x - x.mean(axes, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    normal, dx = centred * rstd, dx - dx.mean(axes, keepdim=True)
    return rstd * (dx - normal * (normal * dx).mean(axes, keepdim=True))


@rule("rms_norm")
def _rms_norm(y, input, normalized_shape, weight=None, eps=None):
    x, dx = primal(input), tangent(input)
    if x.is_complex():
        raise NotImplementedError("rms_norm of complex numbers has no tangent rule; write it with x.abs()")
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype  # as torch computes the mean
    eps = torch.finfo(dtype).eps if eps is None else eps
    axes = [*range(-len(normalized_shape), 0)]
    wide = x.to(dtype)
    length = torch.linalg.vector_norm(wide, dim=axes, keepdim=True)
    rstd = torch.rsqrt(length.square() / math.prod(normalized_shape) + eps)
    dnormal = None
    if dx is not None:
        slope = (wide * dx).mean(axes, keepdim=True) * rstd.square()
        dnormal = torch.addcmul(dx, wide, slope, value=-1.0) * rstd
    return dnormal if weight is None else affine(lambda: wide * rstd, dnormal, weight, None, normalized_shape)


def _instance_norm(y, input, running_mean, running_var, weight, bias, use_input_stats, eps):
    shape = (1, -1, *(1,) * (input.ndim - 2))
    if not use_input_stats:
        return _fixed_norm(y, input, running_mean, running_var, weight, bias, eps)
    axes = [*range(2, input.ndim)]
    dnormal = None if tangent(input) is None else _normal_tangent(primal(input), tangent(input), axes, eps)
    return affine(lambda: F.instance_norm(primal(input), eps=eps), dnormal, weight, bias, shape)


@rule(F.instance_norm)
def _f_instance_norm(
    y, input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    return _instance_norm(y, input, running_mean, running_var, weight, bias, use_input_stats, eps)


@rule(torch.instance_norm)
def _torch_instance_norm(
    y, input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True
):
    return _instance_norm(y, input, running_mean, running_var, weight, bias, use_input_stats, eps)


# The rule is asked after the value is computed, so it must refuse before that: training moves the running statistics.
def _batch_norm(input, running_mean, running_var, weight, bias, training, eps, value):
    if training:
        raise NotImplementedError(
            "batch_norm in training has no tangent: its statistics join the samples and move; call model.eval() first, "
            "or use group_norm or layer_norm"
        )
    y = value()
    with recording(input, weight, bias):
        return y, _fixed_norm(y, input, running_mean, running_var, weight, bias, eps)


def _fixed_norm(y, input, mean, var, weight, bias, eps):
    """(x - m) / sqrt(v + eps), m and v being constants."""
    if tangent(mean) is not None or tangent(var) is not None:
        raise NotImplementedError(
            "running statistics with a tangent have no rule; give tangents to the input of the normalisation"
        )
    shape = (1, -1, *(1,) * (input.ndim - 2))
    rstd = torch.rsqrt(primal(var) + eps).reshape(shape)
    dnormal = None if tangent(input) is None else tangent(input) * rstd
    return affine(lambda: (primal(input) - primal(mean).reshape(shape)) * rstd, dnormal, weight, bias, shape)


@rule(F.batch_norm, kind=Kind.JOINT)
def _f_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    x, mean, var, w, b = (primal(each) for each in (input, running_mean, running_var, weight, bias))
    value = lambda: F.batch_norm(x, mean, var, w, b, False, momentum, eps)  # noqa: E731
    return _batch_norm(input, running_mean, running_var, weight, bias, training, eps, value)


@rule(torch.batch_norm, kind=Kind.JOINT)
def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    x, mean, var, w, b = (primal(each) for each in (input, running_mean, running_var, weight, bias))
    value = lambda: F.batch_norm(x, mean, var, w, b, False, momentum, eps)  # noqa: E731
    return _batch_norm(input, running_mean, running_var, weight, bias, training, eps, value)


@rule("norm_except_dim")
def _norm_except_dim(y, v, pow=2, dim=0):
    if pow != 2:
        raise NotImplementedError(f"norm_except_dim(pow={pow}) has no tangent rule; pow=2 has one")
    return _length_tangent(y, primal(v), tangent(v), dim)


@rule(torch._weight_norm)
def _weight_norm(y, v, g, dim=0):  # v g / |v|
    length = torch.norm_except_dim(primal(v), 2, dim)
    dy = None if tangent(g) is None else primal(v) * (tangent(g) / length)
    if tangent(v) is None:
        return dy
    slope = _length_tangent(length, primal(v), tangent(v), dim) / length
    return sum_of(dy, (tangent(v) - primal(v) * slope) * (primal(g) / length))


def _length_tangent(length, v, dv, dim):
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    return (v * dv).sum(axes, keepdim=True).reshape(length.shape) / length
