"""How fast a solver converges, measured in float64 on the velocity of the mixture between the times 0.05 and 0.95."""

import contextlib
import functools
import math

import torch
from oracles import Mixture, slope
from scipy.integrate import solve_ivp

from pyflowmap import solvers

START, END = 0.05, 0.95
GRIDS = ("uniform", "rough")
STEPS = (40, 80, 160)


def times(kind, steps, start=START, end=END):
    """The grid `kind` of so many steps from `start` to `end`.

    uniform   equal steps
    rough     steps in the ratio 1 : 2 : 1 : 2 ..., which stay that uneven however fine the grid is: a multistep solver
              whose coefficients hold for equal steps only loses its order here, and not on a smooth grid. (In longer
              patterns, 1 : 2 : 3 say, the errors of a wrong coefficient can cancel.)
    shift     u/(3 - 2u), smooth, its shortest steps at the noise end
    logit     equal steps of log(t/(1-t))
    """
    if kind == "logit":
        a, b = (math.log(t / (1 - t)) for t in (start, end))
        return [1 / (1 + math.exp(-(a + (b - a) * k / steps))) for k in range(steps + 1)]
    if kind == "rough":
        ends = [0.0]
        for k in range(steps):
            ends.append(ends[-1] + 1.0 + k % 2)
        inside = [each / ends[-1] for each in ends]
    else:
        inside = [k / steps for k in range(steps + 1)]
        if kind == "shift":
            inside = [u / (3 - 2 * u) for u in inside]
        elif kind != "uniform":
            raise ValueError(f"no grid {kind!r}; there are uniform, rough, shift and logit")
    return [start + (end - start) * u for u in inside]


@contextlib.contextmanager
def one_thread():
    """Torch shares even a softmax over three numbers among its threads, ten times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache
@one_thread()
def exact_flow():
    """(x at START, x at END), (1, 41) each; right to about 1e-13."""
    start = torch.linspace(-2, 2, 41, dtype=torch.float64)
    found = solve_ivp(
        lambda t, x: Mixture().velocity(torch.from_numpy(x), t).numpy(),
        (START, END),
        start.numpy(),
        method="DOP853",
        rtol=1e-13,
        atol=1e-14,
    )
    return start[None], torch.from_numpy(found.y[:, -1])[None]


@one_thread()
def endpoint_error(solver, grid, steps, **options):
    """The largest error at END over 41 starts. `solver` is a Solver, or a bare step; `options` go to its call."""
    start, end = exact_flow()
    if not isinstance(solver, solvers.Solver):
        solver = solvers.solver(order=None)(solver)
    if solver.takes != "velocity":
        raise ValueError(f"{solver.name} takes a {solver.takes}; only solvers that take a velocity have an order here")
    return float((solver(Mixture().velocity, start, times(grid, steps), **options) - end).abs().max())


def observed_order(solver, grid="uniform", steps=STEPS, **options):
    """The slope of log(error) against log(step length), least squares over `steps`: p for a solver of order p.

    Choose steps at which the error lies between what is not small yet and 1e-12, where the truth ends.
    """
    return slope([1 / n for n in steps], [endpoint_error(solver, grid, n, **options) for n in steps])
