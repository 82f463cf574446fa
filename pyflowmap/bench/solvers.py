"""Whole runs of a solver with a network that does nothing, per step: what is left is the solver's own work.

The network returns one and the same velocity, so that every method gives x + (t_end - t_start) v and all contestants
can be held against each other. The grid is the one of diffusers' schedulers, 20 steps to the data. By hand: torch with
`out=` into buffers given beforehand, coefficients computed beforehand; compiled: one step as a function, coefficients
as a tensor, so that they do not recompile. diffusers allocates its results and cannot do otherwise.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .case import Case, Contestant, Skipped, Target, case
from .peers import bytes_of, compiled, copy_of

STEPS = 20
SMALL, LARGE = (64, 2), (4, 16, 128, 128)


def _load(module: str, name: str) -> tuple[Any, str]:
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # an ImportError, or whatever a half-installed dependency raises
        return None, f"pip install {module.split('.')[0]} ({type(error).__name__}: {str(error).splitlines()[0][:80]})"


def _grid() -> list[float]:
    """Noise levels from 0.999 to 0.02 as times: both ends of the logarithm stay finite for the solvers in lambda."""
    return [1.0 - (0.999 + (0.02 - 0.999) * k / STEPS) for k in range(STEPS + 1)]


# ---- by hand -----------------------------------------------------------------------------------------------------

Row = tuple[float, ...]


def _dpm_2m(grid: list[float]) -> list[Row]:
    """(1 - s, a, c0, c1) of x' = a x + c0 D0 + c1 D_{-1}. Lu et al. 2022 (DPM-Solver++), algorithm 2; first step: 1."""
    lam = [math.log(t / (1.0 - t)) for t in grid]
    rows: list[Row] = []
    for k, (s, t) in enumerate(pairwise(grid)):
        h = lam[k + 1] - lam[k]
        whole = -t * math.expm1(-h)
        share = 0.0 if k == 0 else 0.5 * h / (lam[k] - lam[k - 1])
        rows.append((1.0 - s, (1.0 - t) / (1.0 - s), whole * (1.0 + share), -whole * share))
    return rows


def _by_hand(name: str, x: Tensor, v: Tensor, grid: list[float]) -> Callable[[], Tensor]:
    o, p, q, r = (torch.empty_like(x) for _ in range(4))
    if name == "euler":

        def euler() -> Tensor:
            y, z = x, o
            for s, t in pairwise(grid):
                torch.add(y, v, alpha=t - s, out=z)
                y, z = z, (p if z is o else o)
            return y

        return euler
    if name == "heun":

        def heun() -> Tensor:
            y, z = x, o
            for s, t in pairwise(grid):
                h = t - s
                torch.add(y, v, alpha=h, out=q)  # the argument of the second evaluation
                torch.add(v, v, out=r)
                torch.add(y, r, alpha=0.5 * h, out=z)
                y, z = z, (p if z is o else o)
            return y

        return heun
    rows = _dpm_2m(grid)

    def dpm_2m() -> Tensor:
        y, z, old, new = x, o, q, r
        for to_data, a, c0, c1 in rows:
            torch.add(y, v, alpha=to_data, out=new)
            torch.mul(y, a, out=z)
            z.add_(new, alpha=c0)
            if c1 != 0.0:
                z.add_(old, alpha=c1)
            old, new = new, old
            y, z = z, (p if z is o else o)
        return y

    return dpm_2m


def _compiled(name: str, x: Tensor, v: Tensor, grid: list[float]) -> tuple[list[Contestant], list[Skipped]]:
    buffers = [torch.empty_like(x) for _ in range(4)]
    if name == "euler":
        rows = torch.tensor([(t - s, 0.0, 0.0, 0.0) for s, t in pairwise(grid)])
    elif name == "heun":
        rows = torch.tensor([(t - s, 0.5 * (t - s), 0.0, 0.0) for s, t in pairwise(grid)])
    else:
        rows = torch.tensor(_dpm_2m(grid))

    def euler(y, v, old, c, z, new):
        z.copy_(y + c[0] * v)

    def heun_argument(y, v, c, q):
        q.copy_(y + c[0] * v)

    def heun(y, v, old, c, z, new):
        z.copy_(y + c[1] * (v + v))

    def dpm_2m(y, v, old, c, z, new):
        d = y + c[0] * v
        new.copy_(d)
        z.copy_(c[1] * y + c[2] * d + c[3] * old)

    def make(compile: Callable) -> Callable[[], Tensor]:
        step = compile({"euler": euler, "heun": heun}.get(name, dpm_2m))
        argument = compile(heun_argument) if name == "heun" else None
        coefficients = rows.unbind(0)

        @torch.no_grad()
        def run() -> Tensor:
            y, z, old, new = x, *buffers[:3]
            old.zero_()
            for c in coefficients:
                if argument is not None:
                    argument(y, v, c, buffers[3])
                step(y, v, old, c, z, new)
                old, new = new, old
                y, z = z, (buffers[3] if y is x and name != "heun" else y if y is not x else torch.empty_like(x))
            return y

        return run

    return compiled("by hand, compiled", make, Target(faster=1.0))


# ---- others ------------------------------------------------------------------------------------------------------

_SCHEDULERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}, None),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}, None),
    "dpm_solver_pp_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "prediction_type": "flow_prediction"},
        4.0,
    ),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2, "prediction_type": "flow_prediction"}, 8.0),
}


def _diffusers(name: str, x: Tensor, v: Tensor) -> tuple[list[Contestant], list[Skipped], list[float] | None]:
    """A run of diffusers' scheduler, and its grid as times."""
    kind, config, faster = _SCHEDULERS[name]
    Scheduler, reason = _load("diffusers", kind)
    if Scheduler is None:
        return [], [Skipped(kind, reason)], None
    if config:
        config = {**config, "use_flow_sigmas": True}
    scheduler = Scheduler(**config)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    velocity = -v  # theirs runs from data to noise

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS)
        y = x
        for time in scheduler.timesteps:
            y = scheduler.step(velocity, time, y, return_dict=False)[0]
        return y

    target = None if faster is None else Target(faster=faster)
    grid = [1.0 - each for each in dict.fromkeys(sigmas.tolist())]
    return [Contestant(f"diffusers {kind}", run, target, note="allocates")], [], grid


def _odeint(name: str, x: Tensor, v: Tensor, grid: list[float]) -> tuple[list[Contestant], list[Skipped]]:
    method = {"euler": "euler", "heun": "heun2"}.get(name)
    if method is None:
        return [], []
    contestants, skipped = [], []
    times = torch.tensor(grid)
    odeint, reason = _load("torchdiffeq", "odeint")
    if odeint is None:
        skipped.append(Skipped("torchdiffeq", reason))
    else:

        @torch.no_grad()
        def run() -> Tensor:
            return odeint(lambda t, y: v, x, times, method=method)[-1]

        contestants.append(Contestant(f"torchdiffeq {method}", run, note="allocates"))
    ODESolver, reason = _load("flow_matching.solver", "ODESolver")
    if ODESolver is None:
        skipped.append(Skipped("flow_matching ODESolver", reason))
    else:
        theirs = ODESolver(velocity_model=lambda x, t: v)

        def sample() -> Tensor:
            return theirs.sample(x_init=x, step_size=None, method=method, time_grid=times)

        contestants.append(Contestant(f"flow_matching ODESolver {method}", sample, note="torchdiffeq under it"))
    return contestants, skipped


def _passes(name: str) -> int:
    """Tensors read and written per step, velocities of the network included."""
    return {"euler": 3, "heun": 3 + 4, "dpm_solver_pp_2m": 5, "unipc_2": 7}[name]


def _case(name: str, shape: tuple[int, ...]) -> Case:
    from pyflowmap import solvers

    x, v = torch.randn(shape), torch.randn(shape)
    theirs, skipped, grid = _diffusers(name, x, v)
    times = grid or _grid()
    solver = solvers.named[name]
    if "start" in solver.options:
        solver = solver.using(start="low")  # as many network evaluations as diffusers

    out, workspace = torch.empty_like(x), solvers.Workspace()

    def ours() -> Tensor:
        return solver(lambda x, t: v, x, times, out=out, workspace=workspace)

    contestants = [Contestant(f"pfm.solvers.{name}", ours), *theirs]
    if name != "unipc_2" and times[-1] == 1.0 and name == "dpm_solver_pp_2m":
        times_by_hand = [*times[:-1], 1.0 - 1e-9]
    else:
        times_by_hand = times
    if name != "unipc_2":
        hand = _by_hand(name, x, v, times_by_hand)
        target = None if name == "euler" else Target(faster=1.0)
        note = "one torch.add per step, no checks: what cannot be undercut in Python" if name == "euler" else "out="
        contestants.append(Contestant("by hand", hand, target, note=note))
        made, missing = _compiled(name, x, v, times_by_hand)
        contestants += made
        skipped += missing
    made, missing = _odeint(name, x, v, times)
    contestants += made
    skipped += missing
    traffic = None
    if shape == LARGE:
        traffic = STEPS * _passes(name) * bytes_of(x)
        pool = [torch.empty(shape) for _ in range(6)]
        contestants.append(copy_of(traffic, pool, Target(faster=0.9)))
    return Case(contestants, {"x": shape}, traffic, per=(STEPS, "step"), skipped=skipped, tolerance=1e-4)


def _register(name: str, label: str, shape: tuple[int, ...], size: str) -> None:
    case("solvers", f"{name}_{label}", f"{name}, {STEPS} steps, {size}")(lambda: _case(name, shape))


for _name in _SCHEDULERS:
    _register(_name, "small", SMALL, "64 x 2")
    _register(_name, "large", LARGE, "4 x 16 x 128 x 128")
