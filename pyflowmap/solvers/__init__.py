"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .buffers import Port
from .driver import integrate
from .flow_map import consistency, ctm_gamma, flow_map
from .restart import edm_heun_churn, restart
from .runge_kutta import euler, heun
from .solver import Solver, solver, time_grid
from .stochastic import ancestral, euler_maruyama

__all__ = ["Port", "Solver", "integrate", "solver", "time_grid", "euler", "flow_map", "heun"]
__all__ += ["ancestral", "consistency", "ctm_gamma", "edm_heun_churn", "euler_maruyama", "restart"]

_stochastic = (ancestral, euler_maruyama, edm_heun_churn, restart, consistency, ctm_gamma)
named = {each.name: each for each in (euler, heun, flow_map, *_stochastic)}
"""What `sample(solver="...")` accepts."""
