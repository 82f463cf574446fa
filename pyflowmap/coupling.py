"""Minibatch couplings: which noise goes with which data, so that the paths between them cross less.

    exact(x0, x1)              the permutation with the least sum of squared distances (scipy)
    sinkhorn(x0, x1, epsilon)  the entropic plan (POT)
    pair(x0, x1, condition)    the batch, paired by either
    minibatch(objective)       the objective, on batches paired so

Pooladian et al. 2023; Tong et al. 2024 (OT-CFM). The cost is the squared distance ||x0_i - x1_j||^2, the sum over a
sample. Couplings depend on the whole batch of one process, and are computed without gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .algebra import evaluate, noise
from .draws import uniforms
from .objectives.loss import Loss
from .objectives.posterior_augmented import posterior_augmented

__all__ = ["exact", "minibatch", "pair", "sinkhorn"]

_STREAM = 0x636F7570  # apart from the noise (0) of the same sample
_METHODS = ("exact", "sinkhorn")


@torch.no_grad()
def exact(
    x0: Tensor,  # (B, ...)
    x1: Tensor,  # (B, ...)
    *,
    labels: Tensor | None = None,  # (B,)
) -> Tensor:
    """The permutation p (B,), int64, for which sum_j ||x0[p[j]] - x1[j]||^2 is least: x0[p[j]] goes with x1[j].

    With `labels`, those of x1, noise is permuted within the rows of a label only. Needs scipy, which solves it on the
    CPU: O(B^3) at worst, about 10 ms for 256 rows.

    >>> exact(torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [1.0]]))
    tensor([1, 0])
    """
    _check(x0, x1, labels)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("coupling.exact needs scipy, which is not installed; pip install scipy") from None
    closeness = _closeness(x0, x1).T.cpu().numpy()
    if not np.isfinite(closeness).all():
        raise ValueError("x0 and x1 cannot be paired: they hold numbers that are not finite")
    groups = [torch.arange(len(x1))] if labels is None else _groups(labels.cpu())
    permutation = torch.empty(len(x1), dtype=torch.int64)
    for rows in groups:
        _, chosen = linear_sum_assignment(closeness[rows.numpy()][:, rows.numpy()], maximize=True)
        permutation[rows] = rows[torch.from_numpy(chosen)]
    return permutation.to(x1.device)


@torch.no_grad()
def sinkhorn(
    x0: Tensor,  # (B, ...)
    x1: Tensor,  # (B, ...)
    epsilon: float,
    iterations: int = 1000,
    *,
    labels: Tensor | None = None,  # (B,)
    tolerance: float = 1e-3,
) -> Tensor:
    """The plan P (B, B), float64, of x0 along rows and x1 along columns, which makes least

        sum_ij P_ij ||x0_i - x1_j||^2 + epsilon sum_ij P_ij log P_ij,      sum_j P_ij = sum_i P_ij = 1/B

    Cuturi 2013, in the log domain, where no cost underflows. epsilon is in the units of the cost, which grows with the
    elements of a sample: 2 sigma^2 for a Schrodinger bridge of diffusion sigma; towards 0 the plan is the exact one and
    takes more iterations.

    labels     those of x1: no mass between a noise and a data row whose labels differ; noise i has the label of data i
    iterations at most; stops where sum_ij |rows or columns - 1/B| is below `tolerance`, and warns where it never is

    Needs POT (pip install "pyflowmap[train]"); runs on the device of x1.
    """
    _check(x0, x1, labels)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError(f"epsilon = {epsilon}; it is positive, in units of ||x0 - x1||^2; for 0 use coupling.exact")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1 or not tolerance > 0.0:
        raise ValueError(f"iterations = {iterations!r}, tolerance = {tolerance}; both are positive, e.g. 1000 and 1e-3")
    try:
        from ot.bregman import sinkhorn_log
    except ImportError:
        raise ImportError(
            'coupling.sinkhorn needs POT, which is not installed; pip install "pyflowmap[train]"'
        ) from None
    rows = len(x1)
    # |x0_i|^2 and |x1_j|^2 scale rows and columns, which the marginals fix anyway: nothing cancels
    cost = -2.0 * _closeness(x0, x1)
    if labels is not None:
        cost = cost.masked_fill(labels[:, None] != labels[None], math.inf)
    share = torch.full((rows,), 1.0 / rows, dtype=torch.float64, device=x1.device)
    # POT stops at a 2-norm, of which sqrt(B) times is at least the sum
    plan = sinkhorn_log(share, share, cost, epsilon, iterations, 0.5 * tolerance / math.sqrt(rows), warn=False)
    apart = float((plan.sum(0) - share).abs().sum() + (plan.sum(1) - share).abs().sum())
    if not math.isfinite(apart):
        raise ValueError(
            f"sinkhorn with epsilon = {epsilon} gave no finite plan; x0 and x1 hold numbers that are not finite"
        )
    if apart > tolerance:
        warnings.warn(
            f"sinkhorn: after {iterations} iterations the marginals are {apart:.1e} off, above tolerance = "
            f"{tolerance}; give more iterations, or an epsilon above {epsilon:g}",
            stacklevel=3,  # past the decorator
        )
    return plan


@torch.no_grad()
def pair(
    x0: Tensor,  # (B, ...)
    x1: Tensor,  # (B, ...)
    condition: Mapping[str, Any] | None = None,
    *,
    method: str = "exact",
    labels: Tensor | None = None,  # (B,)
    replacement: bool = False,
    epsilon: float | None = None,
    iterations: int = 1000,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(x0, x1, condition), row j of one with row j of the other.

    method       "exact" or "sinkhorn", the latter with `epsilon`
    replacement  False: every row of x1 once, where it was, so labels and sample ids stay as they are; x0 is permuted
                 ("exact"), or drawn for each row of x1 from its column of the plan ("sinkhorn"), where a noise can come
                 twice. True: B pairs drawn from the plan, as torchcfm does: on average 37 % of an exact plan's rows are
                 left out. x1 is reordered, and with it each tensor of the condition that has a row per sample; what
                 was not given here (sample ids, other targets) is not
    labels       those of x1, e.g. condition["label"]: pairs within a label. Across labels, noise would tell something
                 of the label, p(x0 | y) != N(0, 1), and a conditional model samples from noise that does not
    seed         with it, what is drawn depends on (seed, sample id) and the plan

    In pixel space of many dimensions the effect is small: in a batch all distances are about the same.
    """
    _check_method(method, epsilon)
    _check(x0, x1, labels)
    rows, given = len(x1), dict(condition or {})
    if method == "exact":
        p = exact(x0, x1, labels=labels)
        if not replacement:
            return x0[p], x1, given
        j = (uniforms(x1, 1, _STREAM, seed, sample_ids)[:, 0] * rows).long()
        i = p[j]
    else:
        assert epsilon is not None
        plan = sinkhorn(x0, x1, epsilon, iterations, labels=labels)
        u = uniforms(x1, 1, _STREAM, seed, sample_ids)
        if not replacement:
            return x0[_drawn(plan.T, u)], x1, given
        drawn = _drawn(plan.reshape(1, -1), u.T)
        i, j = drawn // rows, drawn % rows
    moved = {
        key: value[j] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows else value
        for key, value in given.items()
    }
    return x0[i], x1[j], moved


@dataclass(frozen=True)
class minibatch:
    """The objective on noise that is paired with the data of its batch: `Step(network, minibatch(flow_matching))`.

    objective    any of `pyflowmap.objectives` that draws x0; it gets x0, x1 and condition from `pair`, and all else
                 that this is called with
    label        a key of the condition: pairs within it
    others       as for `pair`

    Noise is drawn by (seed, sample id) where it is not given. A row's loss depends on its batch. Refuses
    `posterior_augmented`, whose weights are those of independent noise.

    >>> from pyflowmap import FlowMap
    >>> from pyflowmap.objectives import flow_matching
    >>> zero = FlowMap(lambda x, t: 0.0 * x, prediction="velocity")
    >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[9.0], [0.0]])
    >>> minibatch(flow_matching)(zero, x1, x0=x0).mean().item()
    0.0
    """

    objective: Callable[..., Loss]
    method: str = "exact"
    label: str | None = None
    replacement: bool = False
    epsilon: float | None = None
    iterations: int = 1000

    def __post_init__(self):
        if not callable(self.objective):
            raise TypeError(
                f"objective is {type(self.objective).__name__}; pass one such as pfm.objectives.flow_matching"
            )
        inside = self.objective
        while isinstance(inside, partial):
            inside = inside.func
        if inside is posterior_augmented:
            raise ValueError("posterior_augmented weighs candidates as for independent noise; it has no coupling")
        _check_method(self.method, self.epsilon)

    def __call__(
        self,
        flow_map: Any,
        x1: Tensor,
        *,
        x0: Tensor | None = None,
        condition: Mapping[str, Any] | None = None,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
        **options: Any,
    ) -> Loss:
        labels = None
        if self.label is not None:
            if self.label not in (condition or {}):
                raise ValueError(f"label = {self.label!r} but the condition has {sorted(condition or {}) or 'nothing'}")
            labels = (condition or {})[self.label]
        x0 = evaluate(noise(x1, seed=seed, sample_ids=sample_ids)) if x0 is None else x0
        x0, x1, condition = pair(
            x0,
            x1,
            condition,
            method=self.method,
            labels=labels,
            replacement=self.replacement,
            epsilon=self.epsilon,
            iterations=self.iterations,
            seed=seed,
            sample_ids=sample_ids,
        )
        return self.objective(flow_map, x1, x0=x0, condition=condition, seed=seed, sample_ids=sample_ids, **options)


def _closeness(x0: Tensor, x1: Tensor) -> Tensor:
    """<x0_i, x1_j>, (B, B), float64: of ||x0_i - x1_j||^2 the part that depends on both."""
    return x0.flatten(1).double() @ x1.flatten(1).double().T


def _drawn(law: Tensor, u: Tensor) -> Tensor:
    """A column for each u of a row, by the weights in that row; never one of weight 0. (R, K), (R, N) -> (R * N,)."""
    upto = law.cumsum(1)
    return torch.searchsorted(upto, u * upto[:, -1:], right=True).clamp(max=law.shape[1] - 1).flatten()


def _groups(labels: Tensor) -> list[Tensor]:
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


def _check_method(method: str, epsilon: float | None) -> None:
    if method not in _METHODS:
        raise ValueError(f"method = {method!r}; it is {' or '.join(repr(each) for each in _METHODS)}")
    if (method == "sinkhorn") != (epsilon is not None):
        raise ValueError(
            f'method = {method!r} with epsilon = {epsilon}: an epsilon belongs to "sinkhorn", which has no default one'
        )


def _check(x0: Tensor, x1: Tensor, labels: Tensor | None) -> None:
    for name, x in (("x0", x0), ("x1", x1)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            shown = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {shown}; it is a floating-point tensor (B, ...)")
    if x0.shape != x1.shape or x0.device != x1.device or len(x1) == 0:
        raise ValueError(
            f"x0 {tuple(x0.shape)} on {x0.device} cannot be paired with x1 {tuple(x1.shape)} on {x1.device}; give them "
            "one shape of at least one row, on one device"
        )
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != x1.shape[:1]):
        shown = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels is {shown}; it is a label for each row of x1, a tensor ({len(x1)},)")
