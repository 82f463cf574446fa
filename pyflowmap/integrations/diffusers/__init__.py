"""Schedulers for the pipelines of diffusers: `FlowMapScheduler` (jumps) and `SolverScheduler` (any solver).

Their time runs from 1000 = noise to 0 = data and their velocity is noise - data; both are turned here, at the edge.
The networks of diffusers become flow maps by a ready call: see `pyflowmap.calls`.
"""

try:
    from diffusers import SchedulerMixin  # a pipeline that is loaded looks for it here, beside our classes
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'pyflowmap.integrations.diffusers needs {missing.name}; pip install "pyflowmap[diffusers]"', name=missing.name
    ) from missing

from .flow_map import FlowMapScheduler
from .solver import SolverScheduler

__all__ = ["FlowMapScheduler", "SchedulerMixin", "SolverScheduler"]

for _each in (FlowMapScheduler, SolverScheduler):
    _each.__module__ = __name__  # a saved pipeline names its scheduler by this path
