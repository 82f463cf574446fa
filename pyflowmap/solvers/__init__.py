"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .driver import Solver, integrate, solver
from .euler import euler
from .flow_map import flow_map
from .heun import heun

__all__ = ["Solver", "integrate", "solver", "euler", "flow_map", "heun"]

named = {each.name: each for each in (euler, heun, flow_map)}
"""What `sample(solver="...")` accepts."""
