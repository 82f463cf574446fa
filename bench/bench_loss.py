"""An inner-product loss with its gradient: the cases of pyflowmap/bench/loss.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("loss"))
def bench_loss(compare, name):
    compare(name)
