"""Solver updates, four tensors in and two out: the cases of pyflowmap/bench/combine.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("combine"))
def bench_combine(compare, name):
    compare(name)
