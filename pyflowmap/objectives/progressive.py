"""Progressive self-distillation (PSD): two short jumps teach one long jump."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..algebra import evaluate, inner, lazy
from ..flow_map import FlowMap
from .batch import Batch, check_inputs, check_share, draw_pairs, loss_of
from .loss import Loss, frozen_teacher

__all__ = ["progressive"]

_mean_square = weights.constant()


def progressive(
    flow_map: FlowMap,
    x1: Tensor,  # (B, ...) data
    *,
    x0: Tensor | None = None,  # (B, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., tuple[Tensor, Tensor]] = time_laws.uniform_pair,
    weight: Callable = _mean_square,
    teacher: FlowMap | None = None,
    diagonal: float = 0.75,
    split: str = "midpoint",
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """Flow matching on the diagonal and the semigroup X_{s,t} = X_{r,t} o X_{s,r} off it, in one run from scratch.

        diagonal      || u_{t,t}(x_t) - dx_t/dt ||^2
        off-diagonal  || u_{s,t}(x_s) - sg[ (1-g) u_{s,r}(x_s) + g u_{r,t}(X_{s,r}(x_s)) ] ||^2,   r = g s + (1-g) t

    Boffi, Albergo & Vanden-Eijnden 2025, "PSD": split="midpoint" is PSD-M (g = 1/2), "uniform" PSD-U (g ~ U(0,1)).

    times     law of (s, t), s <= t; the diagonal rows use its s
    diagonal  expected share of flow-matching rows, the first of the batch; below about 0.75 the semigroup term can find
              its trivial solution. A share that is no whole number of rows is rounded at random, so it holds at any B;
              compiled code rounds to the nearest
    teacher   default: the network itself, without gradient and with dropout off
    weight    of one's own or from `pyflowmap.weights`, e.g. `learned()`

    Network evaluations: one of B rows with gradient, two of the off-diagonal rows without.
    Errors: TypeError, ValueError for data, shares and splits out of range.
    """
    check_inputs(flow_map, x1, x0, weight, teacher)
    if split not in ("midpoint", "uniform"):
        raise ValueError(f'split = {split!r}; it is "midpoint" (PSD-M) or "uniform" (PSD-U)')
    check_share(diagonal, "diagonal")
    batch = draw_pairs(flow_map, x1, x0, condition, times, diagonal, seed, sample_ids)
    output = flow_map.output(batch.x, batch.s, batch.t, batch.condition)

    errors = {}
    for name, rows, part in (
        ("flow_matching", batch.near, output[: batch.equal]),
        ("progressive", batch.far, output[batch.equal :]),
    ):
        if rows is not None:
            u = flow_map.as_mean_velocity(part, rows.x, rows.s, rows.t)
            target = rows.velocity if rows.equal else _target(teacher or flow_map, rows, split, seed)
            errors[name] = inner(u - lazy(target))
    return loss_of(batch, weight, **errors)


def _target(teacher: FlowMap, far: Batch, split: str, seed: int | None) -> Tensor:
    """(1-g) u_{s,r}(x) + g u_{r,t}(X_{s,r}(x)), without gradient."""
    x, s, t = far.x, far.s, far.t
    with frozen_teacher(teacher.network):
        g: float | Tensor = 0.5
        if split == "uniform":
            g = time_laws.uniform(x, seed=None if seed is None else seed + 1, sample_ids=far.sample_ids)
        r = g * s + (1.0 - g) * t
        first = teacher.output(x, s, r, far.condition)
        middle = evaluate(teacher.as_jump(first, x, s, r))
        second = teacher.output(middle, r, t, far.condition)
        return evaluate(
            (1.0 - g) * teacher.as_mean_velocity(first, x, s, r) + g * teacher.as_mean_velocity(second, middle, r, t)
        )
