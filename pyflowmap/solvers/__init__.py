"""Solvers: one step each, and the driver that runs it. A solver of one's own is a function with the same signature:

def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
"""

from .adams_bashforth import adams_bashforth_2, adams_bashforth_3
from .adaptive import Adaptive
from .buffers import Port, Workspace
from .deis import deis_2, deis_3
from .dopri5 import dopri5
from .dpm_solver import dpm_solver_pp_1, dpm_solver_pp_2m, dpm_solver_pp_2s, dpm_solver_pp_3m, dpm_solver_pp_sde
from .driver import integrate
from .flow_map import consistency, ctm_gamma, flow_map
from .restart import edm_heun_churn, restart
from .runge_kutta import edm_heun, euler, heun, heun_alpha, midpoint, rk4, rk4_38
from .solver import Solver, solver, time_grid
from .stochastic import ancestral, euler_maruyama
from .unipc import unipc_1, unipc_2, unipc_3

named = {
    each.name: each
    for each in (
        *(euler, midpoint, heun, heun_alpha, rk4, rk4_38, edm_heun, dopri5),
        *(adams_bashforth_2, adams_bashforth_3, deis_2, deis_3),
        *(dpm_solver_pp_1, dpm_solver_pp_2m, dpm_solver_pp_3m, dpm_solver_pp_2s, dpm_solver_pp_sde),
        *(unipc_1, unipc_2, unipc_3),
        *(ancestral, euler_maruyama, edm_heun_churn, restart),
        *(flow_map, consistency, ctm_gamma),
    )
}
"""What `sample(solver="...")` accepts."""

__all__ = ["Adaptive", "Port", "Solver", "integrate", "solver", "time_grid", "named", "Workspace"]  # and the named ones
__all__ += list(named)
