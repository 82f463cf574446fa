"""What a call costs before it computes anything: the cases of pyflowmap/bench/call.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("call"))
def bench_call(compare, name):
    compare(name)
