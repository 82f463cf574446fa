"""Bfloat16, chunks, Gram matrices, masks: the cases of pyflowmap/bench/storage.py."""

import pytest

from pyflowmap import bench


@pytest.mark.parametrize("name", bench.names("storage"))
def bench_storage(compare, name):
    compare(name)
