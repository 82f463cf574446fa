"""Easy consistency tuning (ECT): a consistency model whose gap shrinks stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..flow_map import FlowMap
from .batch import check_inputs
from .consistency import neighbours, pair_error, pair_loss
from .loss import Loss

__all__ = ["easy_consistency"]

_norm = weights.pseudo_huber(0.0)


def easy_consistency(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = time_laws.easy_pair,
    weight: Callable = _norm,
    teacher: FlowMap | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Match f(x, s) = X_{s,1}(x) at two noise levels sigma > r of one data point and one noise:

        ( sqrt( || f(x_s) - sg[ f(x_r) ] ||^2 + c^2 ) - c ) / (sigma - r),   sigma = (1-s)/s;  r = 0: the target is x1

    Geng et al. 2024 (ECT), alg. 1. The norm is over a sample and *not squared* (c = 0 is the paper's for
    CIFAR-10). At stage 0 most partners are the data itself, which is denoising: so start from a trained diffusion or
    flow-matching network, or from nothing at the cost of a longer stage 0. Raise the stage while training:

        easy_consistency(fm, x1, times=partial(pfm.times.easy_pair, stage=pfm.times.easy_stage(step, every)))

    times    law of (s, r), s <= r, in times of the linear path, translated to any other
    weight   default `pfm.weights.pseudo_huber(c=0)`, divided by the gap of the noise levels
    teacher  None, or a FlowMap whose velocity makes the step from s to r (Heun) in place of the same noise: to distil

    Network evaluations: one with gradient, one without on the same random numbers, so that dropout is one mask for
    both; with a teacher two more. No JVP: the cheapest way to a consistency model. It fails where the gap stays wide
    (blurred data: the mean gradient at the exact map is of the order of the gap) and where it narrows too early
    (nothing anchors the map). For any path and any `prediction`.
    Errors: TypeError, ValueError for data and times with s > r (not looked for on a GPU).

    >>> exact = FlowMap(lambda x, s, t: 0.0 * x + 3.0)                             # data = noise + 3
    >>> x0 = torch.randn(4, 2)
    >>> easy_consistency(exact, x0 + 3.0, x0=x0).raw_error.max().item() < 1e-9
    True
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    s, r = neighbours(times, x1, seed, sample_ids)
    error = pair_error(flow_map, x1, x0, condition, s, r, teacher, None, None, seed, sample_ids)
    return pair_loss("easy_consistency", error, s, r, x1, weight)
