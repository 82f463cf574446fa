"""Norms, gates, activations and rotary positions: the cases of pyflowmap/bench/layers.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("layers"))
def bench_layers(compare, name):
    compare(name)
