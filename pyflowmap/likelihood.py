"""`log_likelihood`: the density that a flow's ODE gives to data, by the instantaneous change of variables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .algebra import evaluate, inner, lazy, noise
from .arguments import check_ids, check_model, check_seed, condition_of, network_dtype, solver_of, uniform
from .flow_map import FlowMap
from .solvers import Port
from .tangents import jvp
from .view import View

__all__ = ["bits_per_dimension", "log_likelihood"]

STREAM = 1 << 30
"""Of the first probe: far from the streams of sampling, or probes of the same seed would be the signs of the noise that
the samples came from, and the estimate biased."""

REACH = 0.01
"""How far from 0 and 1 a grid may end: nearer it is a way around an end without velocity, farther another question."""


def log_likelihood(
    model: FlowMap,
    x1: Tensor,  # (B, ...) data, floating point
    steps: int | None = None,  # 50
    *,
    solver: str | Callable = "heun",
    probes: int = 1,
    distribution: str = "rademacher",
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,  # (B,) which probes of the seed's endless sequence these rows take
    condition: Mapping[str, Any] | None = None,
    grid: Sequence[float] | Tensor | None = None,  # replaces steps; in the model's own time, rising or falling
    exact: bool = False,
    grad: bool | str = False,
) -> Tensor:
    """log p(x1) in nats, (B,), under the ODE dx/dt = v_t(x) that carries N(0, I) at t = 0 to the data at t = 1:

        log p_1(x1) = log N(x_0; 0, I) - int_0^1 div v_t(x_t) dt,      x_t from data back to noise

    One solver integrates both, as one state of d + 1 numbers. Chen et al. 2018, eq. 8; Grathwohl et al. 2019 (FFJORD),
    eq. 8, for the divergence: mean over probes e of <e, (dv/dx) e>, each one `pfm.jvp`, 2 forward passes.

    solver        one that takes a velocity and draws no noise: a name in `pyflowmap.solvers.named`, a solver, a step.
                  One that controls its error does so for the whole batch
    probes        random directions per sample, drawn once and kept along the way; the estimate of log p is unbiased up
                  to the solver's error, with a variance that falls as 1/probes
    distribution  of the probes: "rademacher" (signs) or "gaussian", which has the larger variance
    seed          of the probes, which depend on (seed, sample id) alone
    exact         the divergence itself, from all d unit vectors: d evaluations of `jvp` per velocity, no probes
    grid          its ends lie within 0.01 of noise and data. What a network without velocity at an end needs: grid
                  [0, ..., 0.999] for one that predicts data; x1 is then taken as the state at that time. Where the
                  grid stops above 0, at t0, the prior is N(0, (1-t0)^2 I), the noise's share of x_t0
    grad          record for backward, or "checkpoint", as in `pfm.sample`. The tangent is recorded too

    The ODE is that of the velocity, also where the model's jumps do not follow it. On a path that is not linear it is
    the linear path's ODE of the same predictions, which has the same density at the data end. Numbers are in the dtype
    of x1. Guidance has no density.

    >>> import pyflowmap as pfm
    >>> shift = pfm.FlowMap(lambda x, s: torch.ones_like(x), prediction="velocity")
    >>> log_likelihood(shift, torch.ones(1, 2), exact=True)  # the noise moved by 1: log N(0; 0, I)
    tensor([-1.8379])
    """
    check_model(model)
    check_seed(seed)
    check_ids(sample_ids, seed, x1)
    if not isinstance(x1, Tensor) or not x1.is_floating_point() or x1.dim() < 2:
        shown = f"dtype {x1.dtype}, shape {tuple(x1.shape)}" if isinstance(x1, Tensor) else type(x1).__name__
        raise TypeError(
            f"x1 is {shown}; pass floating-point data (B, ...), integers as x1.float() plus uniform noise in [0, 1)"
        )
    chosen = solver_of(solver)
    if chosen.takes != "velocity" or (chosen.stochastic and isinstance(solver, (str, solvers.Solver))):
        why = "takes a jump" if chosen.takes != "velocity" else "draws noise"
        raise ValueError(f'solver = "{chosen.name}" {why}; a density needs a deterministic ODE solver, e.g. "heun"')
    if "control" in chosen.options:
        chosen = chosen.using(control="batch")  # one time for all: the network is asked at one
    if exact and (probes != 1 or seed is not None or sample_ids is not None or distribution != "rademacher"):
        raise ValueError("exact=True draws no probes; leave out probes, distribution, seed and sample_ids")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes = {probes!r}; it is a whole number, at least 1")
    if distribution not in ("rademacher", "gaussian"):
        raise ValueError(f'distribution = {distribution!r}; it is "rademacher" or "gaussian"')
    condition = condition_of(condition, x1)
    view = View(model, condition, like=x1)
    if grid is not None and steps is not None:
        raise ValueError(f"steps = {steps} beside a grid, which says how many there are; leave steps out")
    times = _times(view, uniform(50 if steps is None else steps) if grid is None else grid)
    view.prepare(chosen.asks(chosen.visits(times)))
    made = None if exact else _probes(x1, probes, distribution, seed, sample_ids)
    divergence = _Divergence(view, x1, made, network_dtype(model, x1), bool(grad))
    start = torch.cat([x1.flatten(1), x1.new_zeros(x1.shape[0], 1)], 1)
    port = Port(singular=view.port.singular)
    end = solvers.integrate(chosen, divergence, start, times, port=port, grad=grad)
    if isinstance(end, solvers.Adaptive):
        if (missing := end.explain(view.model_time)) is not None:
            warnings.warn(missing, RuntimeWarning, stacklevel=2)
        end = end.x
    with torch.set_grad_enabled(bool(grad) and torch.is_grad_enabled()):
        dims, deviation = end.shape[1] - 1, 1.0 - times[-1]
        squares = inner(end[:, :dims]) / deviation**2
        # Back along the way dt < 0, so the last number is -int div already.
        prior = -0.5 * squares - dims * math.log(deviation * math.sqrt(2.0 * math.pi))
        return prior.to(x1.dtype) + end[:, dims]


def bits_per_dimension(log_likelihood: Tensor, dimensions: int, *, bin: float = 1.0) -> Tensor:
    """-(log p + d log bin) / (d log 2): nats of a density to bits per dimension of the data in bins.

    bin   width of a quantisation bin in the units of x1: 1 for integers, 2/256 for 8-bit pictures scaled to [-1, 1].
          With uniform noise over the bins in x1 this bounds the bits of a lossless code from above. Theis et al. 2016

    >>> bits_per_dimension(torch.zeros(1), 3, bin=2 / 256)
    tensor([7.])
    """
    if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
        raise ValueError(f"dimensions = {dimensions!r}; it is the number of elements of one sample, e.g. 3 * 32 * 32")
    if not (math.isfinite(bin) and bin > 0.0):
        raise ValueError(f"bin = {bin}; it is the width of a quantisation bin, e.g. 2 / 256")
    return -log_likelihood / (dimensions * math.log(2.0)) - math.log2(bin)


def _times(view: View, grid: Sequence[float] | Tensor) -> list[float]:
    """The grid in linear time, from data to noise."""
    own = solvers.time_grid(grid)
    if own[0] < own[-1]:
        own = own[::-1]
    outside = next((t for t in own if not 0.0 <= t <= 1.0), None)
    if outside is not None:
        raise ValueError(f"grid contains {outside:g}; times lie in [0, 1], 0 = noise to 1 = data")
    times = [view.linear_time(r) for r in own]
    if own[0] < 1.0 - REACH:
        raise ValueError(f"grid reaches t = {own[0]:g}, not the data end; a likelihood of data needs one up to 1")
    if own[-1] > REACH:
        raise ValueError(f"grid begins at t = {own[-1]:g}, not the noise end; the prior is known at 0 alone")
    if times[0] in view.port.singular:
        raise ValueError(
            f'prediction="{view.model.prediction}" has no velocity at t = 1, the data end (0/0); pass a grid that ends '
            "just before, e.g. grid=torch.linspace(0, 0.999, 51)"
        )
    return times


def _probes(x1: Tensor, count: int, distribution: str, seed: Any, sample_ids: Tensor | None) -> list[Tensor]:
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    like = x1.detach()
    fields = [evaluate(noise(like, seed=seed, sample_ids=sample_ids, stream=STREAM + k)) for k in range(count)]
    if distribution == "rademacher":
        return [torch.where(each < 0, -1.0, 1.0).to(like) for each in fields]
    return fields


class _Divergence:
    """The velocity of the state (x, l): b_t(x) and div b_t(x), of the linear path."""

    def __init__(self, view: View, x1: Tensor, probes: list[Tensor] | None, dtype: Any, grad: bool) -> None:
        self.view, self.shape, self.probes, self.dtype, self.grad = view, x1.shape, probes, dtype, grad
        self.dims = x1[0].numel() if x1.shape[0] else math.prod(x1.shape[1:])

    def __call__(self, argument: Tensor, at: Any, t: float) -> Any:
        view = self.view
        scale = 1.0 if view.port.scale is None else view.port.scale(t)
        state = argument[:, : self.dims].reshape(self.shape)
        seen = evaluate(lazy(state) * scale, dtype=self.dtype or state.dtype)
        velocity: Any = None
        parts: list[Tensor] = []
        for probe in self._directions(state):
            tangent = probe if scale == 1.0 and seen.dtype == probe.dtype else (probe * scale).to(seen.dtype)
            row = view._row(t, 1)
            output, change = jvp(
                lambda x, row=row: view.model.output(x, row, row, view.conditions[0]),
                (seen,),
                (tangent,),
                track_tangent=self.grad,
            )
            if velocity is None:
                velocity = evaluate(view.velocity(view.model, output, lazy(state), t), dtype=state.dtype)
            # The velocity is linear in x and the output together, so its tangent is the same formula of the tangents.
            parts.append(inner(lazy(probe), view.velocity(view.model, change, lazy(probe), t)))
        total = torch.stack(parts).sum(0) / (1 if self.probes is None else len(parts))
        return lazy(torch.cat([velocity.flatten(1), total.to(state.dtype)[:, None]], 1))

    def _directions(self, state: Tensor):
        if self.probes is not None:
            yield from self.probes
            return
        for i in range(self.dims):
            unit = state.new_zeros(state.shape[0], self.dims)
            unit[:, i] = 1.0
            yield unit.reshape(self.shape)
