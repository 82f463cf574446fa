"""What a driver adds to each network evaluation, and what an adaptive step adds to that: the size of its error."""

from __future__ import annotations

import importlib

import torch

from .case import Case, Contestant, Skipped, case

STEPS = 50


@case("ode", "euler_driver", "Euler under a driver, per network evaluation (64 x 2, field does nothing)")
def euler_driver() -> Case:
    from pyflowmap.flow_map import FlowMap
    from pyflowmap.sampling import sample
    from pyflowmap.solvers import euler

    x, v = torch.randn(64, 2), torch.randn(64, 2)
    state = torch.empty_like(x)
    grid = torch.linspace(0.0, 1.0, STEPS + 1)
    times = grid.tolist()
    model = FlowMap(lambda x, s, t: v)

    def ours():
        return euler(lambda x, t: v, x, times)

    def by_hand():
        s = state.copy_(x)
        for k in range(STEPS):
            torch.add(s, v, alpha=times[k + 1] - times[k], out=s)
        return s

    def whole_sample():
        return sample(model, x, grid=times, solver="euler")

    contestants = [
        Contestant("pfm.solvers.euler", ours),
        Contestant("pfm.sample", whole_sample, note="ours, with FlowMap"),
        Contestant("loop by hand", by_hand, note="torch.add in place, no checks: what cannot be undercut in Python"),
    ]
    skipped = []
    try:
        odeint = importlib.import_module("torchdiffeq").odeint
    except Exception as error:
        skipped.append(Skipped("torchdiffeq euler", f"pip install torchdiffeq ({type(error).__name__}: {error})"))
    else:
        ends, options = torch.tensor([0.0, 1.0]), {"step_size": 1.0 / STEPS}

        def null(t, y):
            return v

        def theirs():
            with torch.no_grad():
                return odeint(null, x, ends, method="euler", options=options)[-1]

        contestants.append(Contestant("torchdiffeq euler", theirs))
    return Case(contestants, {"x": x.shape}, per=(STEPS, "evaluation"), skipped=skipped)


@case("ode", "error_norm", "error of a dopri5 step in tolerances, per sample (64 x 4 x 32 x 32, 6 stages)")
def error_norm() -> Case:
    from pyflowmap.ops.error_norm import error_norm as ours
    from pyflowmap.solvers.dopri5 import TABLEAU

    shape = (64, 4, 32, 32)
    weights = [e for e in TABLEAU.error if e != 0.0]
    k = [torch.randn(shape) for _ in weights]
    x, y = torch.randn(shape), torch.randn(shape)
    stacked, e = torch.stack(k, -1), torch.tensor(weights)

    def in_torch():
        error = k[0] * weights[0]
        for weight, each in zip(weights[1:], k[1:]):
            error.add_(each, alpha=weight)
        return (error / (1e-6 + 1e-5 * torch.maximum(x.abs(), y.abs()))).square_().flatten(1).sum(1)

    def as_product():  # the stages in one tensor, the last dimension theirs, as torchdiffeq keeps them
        return (stacked @ e / (1e-6 + 1e-5 * torch.maximum(x.abs(), y.abs()))).square_().flatten(1).sum(1)

    contestants = [
        Contestant("error_norm", lambda: ours(k, weights, x, y, 1e-5, 1e-6)),
        Contestant("torch", in_torch, note="one operation after the other"),
        Contestant("torch, stages stacked", as_product, note="a matrix product, as in torchdiffeq"),
    ]
    return Case(contestants, {"x": shape}, traffic=(len(k) + 2) * x.numel() * x.element_size(), tolerance=1e-4)


@case("ode", "dopri5_driver", "dopri5 under a driver, per network evaluation (64 x 2, a field of one operation)")
def dopri5_driver() -> Case:
    from pyflowmap.solvers import dopri5

    x, ends = torch.randn(64, 2), [0.0, 1.0]
    chosen = dopri5.using(control="batch", error="shampine")
    count = chosen(lambda x, t: -x, x, ends).nfe
    contestants = [
        Contestant("pfm.solvers.dopri5", lambda: chosen(lambda x, t: -x, x, ends).x, note="one step size for all"),
    ]
    skipped = []
    try:
        odeint = importlib.import_module("torchdiffeq").odeint
    except Exception as error:
        skipped.append(Skipped("torchdiffeq dopri5", f"pip install torchdiffeq ({type(error).__name__}: {error})"))
    else:
        times = torch.tensor(ends)

        def theirs():
            with torch.no_grad():
                return odeint(lambda t, y: -y, x, times, rtol=1e-5, atol=1e-6, method="dopri5")[-1]

        contestants.append(Contestant("torchdiffeq dopri5", theirs))
    return Case(contestants, {"x": x.shape}, per=(count, "evaluation"), skipped=skipped, tolerance=1e-3)
