"""Microbenchmarks that ship with the library: `pyflowmap bench`. `bench/` runs the same cases under pytest-benchmark.

    >>> from pyflowmap import bench
    >>> bench.names("ode")
    ['euler_driver', 'error_norm', 'dopri5_driver']

`measure(name)` returns plain data with every sample; `table(results)` prints it.
"""

from . import attention, call, combine, jvp, layers, loss, noise, ode, schedulers, solvers, storage  # noqa: F401  each registers its cases
from .case import groups, names
from .machine import describe, file_name
from .table import table
from .timer import Measurement, measure

__all__ = ["Measurement", "describe", "file_name", "groups", "measure", "names", "table"]
