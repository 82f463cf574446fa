"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .adams_bashforth import adams_bashforth_2, adams_bashforth_3
from .buffers import Port
from .deis import deis_2, deis_3
from .driver import integrate
from .flow_map import flow_map
from .runge_kutta import edm_heun, euler, heun, heun_alpha, midpoint, rk4, rk4_38
from .solver import Solver, solver, time_grid

__all__ = ["Port", "Solver", "integrate", "solver", "time_grid", "euler", "flow_map", "heun"]
__all__ += ["adams_bashforth_2", "adams_bashforth_3", "deis_2", "deis_3", "edm_heun", "heun_alpha", "midpoint"]
__all__ += ["rk4", "rk4_38"]

named = {each.name: each for each in (euler, heun, flow_map)}
named |= {each.name: each for each in (midpoint, heun_alpha, rk4, rk4_38, edm_heun)}
named |= {each.name: each for each in (adams_bashforth_2, adams_bashforth_3, deis_2, deis_3)}
"""What `sample(solver="...")` accepts."""
