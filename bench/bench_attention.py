"""Attention with a tangent: the cases of pyflowmap/bench/attention.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("attention"))
def bench_attention(compare, name):
    compare(name)
