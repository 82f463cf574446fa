"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .buffers import Port
from .dpm_solver import dpm_solver_pp_1, dpm_solver_pp_2m, dpm_solver_pp_2s, dpm_solver_pp_3m, dpm_solver_pp_sde
from .driver import integrate
from .flow_map import flow_map
from .runge_kutta import euler, heun
from .solver import Solver, solver, time_grid
from .unipc import unipc_1, unipc_2, unipc_3

__all__ = [
    "Port", "Solver", "integrate", "solver", "time_grid", "euler", "flow_map", "heun",
    "dpm_solver_pp_1", "dpm_solver_pp_2m", "dpm_solver_pp_2s", "dpm_solver_pp_3m", "dpm_solver_pp_sde",
    "unipc_1", "unipc_2", "unipc_3",
]  # fmt: skip

_every = (
    *(euler, heun, flow_map),
    *(dpm_solver_pp_1, dpm_solver_pp_2m, dpm_solver_pp_3m, dpm_solver_pp_2s, dpm_solver_pp_sde),
    *(unipc_1, unipc_2, unipc_3),
)
named = {each.name: each for each in _every}
"""What `sample(solver="...")` accepts."""
