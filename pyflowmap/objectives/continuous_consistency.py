"""sCM: a consistency model in continuous time, on the trigonometric path of TrigFlow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import Lazy, evaluate, inner, lazy, noise
from ..flow_map import FlowMap
from ..interpolants import Linear
from ..predictions import jump_coefficients
from ..tangents import jvp
from .batch import check_inputs, seeded
from .consistency import linear_velocity, path_time
from .loss import Loss, frozen_teacher

__all__ = ["continuous_consistency"]

_mean_square = weights.constant()
_paper = partial(time_laws.logit_normal, mean=1.0, std=1.4)
_BELOW_ONE = 1.0 - 2.0**-24


def continuous_consistency(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., Tensor] = _paper,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    norm: str | None = "l2",
    c: float = 0.1,
    warmup: float | Tensor = 1.0,
    data_std: float = 1.0,
    mask_nonfinite: bool = False,
    as_tensor: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """The limit of consistency training for a gap of 0, f(x, s) = X_{s,1}(x) constant along the flow:

        || F - sg[F] - sg[ g / (|g| + c) ] ||^2,   g = -cos^2 (d F - dx/dtheta) - w (cos sin x + cos sin d dF/dtheta)

    Lu & Song 2024 (sCM), sec. 4 and alg. 1, in their angle tan theta = sigma / d, d = `data_std`, on the path
    x = cos x1 + sin d x0, with f = cos x - sin d F. The derivative is along the flow, multiplied by cos sin *inside*
    the JVP. For a flow map of any path and prediction the same numbers are, with the linear path's time t, velocity b,
    mean velocity u = u_{t,1} and D = t (1-t) d/dt along the flow,

        F - sg[F] = -(u - sg[u]) / k,      g = d/k { [w t + (1-w) t^2 k^2] (u - b) - w D u },      k = cos + d sin

    which has no division by sin theta, and is 0 at t = 0: keep the times of training off it. b is the path's own
    velocity (training) or the teacher's (distillation). At the exact map with the marginal b and w = 1, g = 0.

    times    law of t in times of the linear path, translated to any other; default log sigma ~ N(-1, 1.4^2), the
             paper's for training (1.6 for distillation): `logit_normal` with the sign of the mean turned
    weight   of the sum of squares, e.g. `pfm.weights.learned()` for the paper's adaptive weight; default its mean. The
             paper's prior 1/tan(theta) is `pfm.weights.given(lambda s, t: s / (1 - s))`; it can destabilise
    teacher  a FlowMap on any path whose velocity is b
    norm     |g|: "l2" the root of the sum of squares, as in the paper; "rms" of their mean, as in FastGen, where the
             same c means something else; None: g as it is. Normalised, the conditional velocity is no longer an exact
             stand-in for the marginal one, unless g is spread evenly about its mean
    c        of the normalisation
    warmup   w = min(1, step/H), the paper's H = 10000; at 0 it is flow matching
    data_std standard deviation of the data, where x1 is not scaled to 1
    mask_nonfinite  rows whose g is not finite teach nothing, and are counted in parts["masked"]; else they show

    `raw_error` is the mean square of g *before* normalisation, because the error itself is always |g|/(|g|+c) squared;
    parts: the error, "tangent_norm" (the mean |g|, l2 where norm is None).
    Network evaluations: one dual, whose value alone is recorded for backward; one more of a teacher. Dropout is one
    mask for value and derivative. Use it to distil, or from scratch without a curriculum; it fails for networks whose
    time embedding has a large scale (its derivative explodes), for float16, and with BatchNorm.
    Errors: TypeError, ValueError for data, an unknown norm, numbers out of range.

    >>> exact = FlowMap(lambda x, s, t: 0.0 * x + 3.0)                             # data = noise + 3
    >>> x0 = torch.randn(4, 2)
    >>> continuous_consistency(exact, x0 + 3.0, x0=x0).raw_error.max().item() < 1e-9
    True
    """
    check_inputs(flow_map, x1, x0, weight, teacher, one_path=False)
    _check(norm, c, warmup, data_std)
    drawn = times(x1, **seeded(seed, sample_ids))
    if not isinstance(drawn, Tensor) or drawn.shape != x1.shape[:1]:
        shown = f"shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else f"{len(drawn)} times"
        raise ValueError(f"times gave {shown}; this takes a law of one time, ({len(x1)},), e.g. pfm.times.logit_normal")
    start: Lazy = lazy(x0) if x0 is not None else noise(x1, seed, sample_ids)
    u, Du, tb, t = _motion(flow_map, lazy(x1), start, drawn, teacher, dict(condition or {}), as_tensor)

    k = (t * t + ((1.0 - t) / data_std) ** 2).rsqrt()
    share = warmup + (1.0 - warmup) * t * k * k
    g = ((data_std / k) * (share * (t * u - tb) - warmup * Du)).detach()
    square, size = inner(g), x1[0].numel()
    length = (square / size if norm == "rms" else square).sqrt()
    step = 1.0 / (length + c) if norm is not None else torch.ones_like(length)
    # Divided by an infinite length, g would be left out in silence. A coefficient of 0 reads nothing, in either pass.
    finite = torch.isfinite(square)
    step = torch.where(finite, step, 0.0 if mask_nonfinite else math.nan)
    seen = torch.where(finite, 1.0 / k, 0.0) if mask_nonfinite else 1.0 / k
    error = inner(seen * (u - u.detach()) + step * g)
    loss = weight(error, s=t, t=torch.ones_like(t), size=size)
    parts = {"continuous_consistency": error.detach().mean() / size, "tangent_norm": length.mean()}
    if mask_nonfinite:
        loss, square, length = (torch.where(finite, each, 0.0) for each in (loss, square, length))
        parts |= {"tangent_norm": length.mean(), "masked": (~finite).sum()}
    return Loss(loss, square / size, parts)


def _motion(
    flow_map: FlowMap,
    data: Lazy,
    start: Lazy,
    times: Tensor,
    teacher: FlowMap | None,
    condition: dict[str, Any],
    as_tensor: bool,
) -> tuple[Lazy, Lazy, Lazy, Tensor]:
    """u_{t,1}, D u_{t,1} and t b of the linear path, and its time t: from one dual evaluation on the map's own path.

    On a path with alpha and sigma at its own time m, D = q d/dm, q = alpha sigma / (alpha' sigma - alpha sigma'); its
    tangent q v is what the network is given, v the velocity of the point X.
    """
    path = flow_map.interpolant
    m = path_time(path, times).clamp(max=_BELOW_ONE)
    t = m if isinstance(path, Linear) else path.linear_time(m)
    a, g, da, dg = path.alpha(m), path.sigma(m), path.alpha_derivative(m), path.sigma_derivative(m)
    w = da * g - a * dg
    q, scale = a * g / w, a + g
    bend = t * (da + dg) / w  # 0 on the linear path
    if teacher is None:
        x, qv = evaluate(a * data + g * start, (q * da) * data + (q * dg) * start)
        tb = (1.0 / g) * lazy(qv)
    else:
        x = evaluate(a * data + g * start)
        with frozen_teacher(teacher.network):
            b = linear_velocity(teacher, lazy(x) if isinstance(path, Linear) else (1.0 / scale) * lazy(x), t, condition)
            velocity = (a * g / scale) * b
            if not isinstance(path, Linear):
                velocity = velocity + (q * (da + dg) / scale) * lazy(x)
            qv = evaluate(velocity, dtype=x.dtype)
        tb = (1.0 / g) * lazy(qv)
    if not isinstance(path, Linear):
        tb = tb - bend * lazy(x)

    output, d_output = jvp(
        lambda x, m: flow_map.output(x, m, torch.ones_like(times), condition), (x, m), (qv, q), as_tensor=as_tensor
    )
    if flow_map._is_velocity and isinstance(path, Linear):
        return flow_map.sign * lazy(output), flow_map.sign * lazy(d_output), tb, t
    coefficients = torch.func.jvp(partial(_mean_velocity_to_data, flow_map), (m,), (q,))
    (c_x, c_p), (d_x, d_p) = coefficients[0], coefficients[1]
    u = c_x * lazy(x) + c_p * lazy(output)
    Du = d_x * lazy(x) + c_x * lazy(qv) + d_p * lazy(output) + c_p * lazy(d_output)
    return u, Du, tb, t


def _mean_velocity_to_data(flow_map: FlowMap, m: Tensor) -> tuple[Tensor, Tensor]:
    """(c_x, c_p) of u_{t,1} = (X_{m,1}(X) - x) / (1-t) = c_x X + c_p P on the linear path, from a point X at m."""
    path = flow_map.interpolant
    sigma, scale = path.sigma(m), path.scale(m)
    c_x, c_p = jump_coefficients(flow_map.prediction, path, m, 1.0)
    return (c_x * scale - 1.0) / sigma, flow_map.sign * c_p * scale / sigma


def _check(norm: str | None, c: float, warmup: float | Tensor, data_std: float) -> None:
    if norm not in ("l2", "rms", None):
        raise ValueError(f'norm = {norm!r}; it is "l2", "rms" or None (no normalisation)')
    if not c > 0.0 or not data_std > 0.0:
        raise ValueError(f"c = {c}, data_std = {data_std}; both are positive, e.g. 0.1 and 0.5")
    if not isinstance(warmup, Tensor) and not 0.0 <= warmup <= 1.0:
        raise ValueError(f"warmup = {warmup}; it is a share, min(1, step / 10000)")
