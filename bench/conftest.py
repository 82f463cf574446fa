"""Runs the cases that ship in `pyflowmap.bench` under pytest-benchmark.

pytest-benchmark owns the rounds, the summary and the JSON; what it times is a whole round, in which all contestants of
a case take turns. The samples of each, and the ratios per round, are in `extra_info`, where report.py finds them.
"""

import pytest

from pyflowmap import bench


@pytest.fixture
def compare(benchmark):
    """compare(name): measures a case and keeps what came out."""

    def run(name: str) -> dict:
        measurement = bench.Measurement(name)
        benchmark.group = measurement.group
        with measurement.quiet():
            benchmark.pedantic(measurement.round, rounds=measurement.rounds, iterations=1, warmup_rounds=0)
        result = measurement.result()
        benchmark.extra_info["result"] = result
        print("\n" + bench.table([result]))
        return result

    return run


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Our own description of the machine (pytest-benchmark's holds the name of the host)."""
    output_json["pyflowmap_machine"] = bench.describe()
