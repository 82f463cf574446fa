"""Normal numbers: the cases of pyflowmap/bench/noise.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("noise"))
def bench_noise(compare, name):
    compare(name)
