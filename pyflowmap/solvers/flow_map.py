"""The flow map itself as a step."""

from .solver import solver


@solver(order=None, nfe=1, takes="jump")
def flow_map(jump, x, s, t, memory):
    """x' = X_{s,t}(x): 1 NFE per step, exact at any step size for an exact flow map. Boffi et al. 2025, eq. 5."""
    return jump(x, s, t), memory
