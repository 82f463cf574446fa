"""Diffusers' DPM-Solver++(2M) step: the cases of pyflowmap/bench/schedulers.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("schedulers"))
def bench_schedulers(compare, name):
    compare(name)
