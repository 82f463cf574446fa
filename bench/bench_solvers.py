"""Whole runs of solvers with a network that does nothing: the cases of pyflowmap/bench/solvers.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("solvers"))
def bench_solvers(compare, name):
    compare(name)
