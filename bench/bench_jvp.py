"""JVPs beside a plain forward: the cases of pyflowmap/bench/jvp.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("jvp"))
def bench_jvp(compare, name):
    compare(name)
