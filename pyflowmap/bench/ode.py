"""What a driver adds to each network evaluation: Euler with a field that does nothing, on 64 x 2 numbers."""

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
