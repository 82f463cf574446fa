"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .adaptive import Adaptive
from .buffers import Port
from .dopri5 import dopri5
from .driver import integrate
from .flow_map import flow_map
from .runge_kutta import euler, heun
from .solver import Solver, solver, time_grid

__all__ = ["Adaptive", "Port", "Solver", "integrate", "solver", "time_grid", "dopri5", "euler", "flow_map", "heun"]

named = {each.name: each for each in (euler, heun, flow_map, dopri5)}
"""What `sample(solver="...")` accepts."""
