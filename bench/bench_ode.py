"""What a driver adds to each network evaluation: the cases of pyflowmap/bench/ode.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("ode"))
def bench_ode(compare, name):
    compare(name)
