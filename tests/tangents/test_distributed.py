"""DDP and FSDP2 on two processes: every parameter has a gradient in every step, and one process learns the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SECONDS = 150

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)

# The worker's list, spelt out: importing it here would start torch.distributed in the test process.
BOTH = ["to a target", "through the tangent"]
ONE_CALL = [f"{loss}, one call" for loss in BOTH]
OURS = ["lagrangian", "mean_flow"]
WAYS = {
    "ddp": BOTH + OURS,
    "ddp find_unused_parameters": BOTH + OURS,
    "ddp static_graph": BOTH + OURS,
    "ddp of the network": ONE_CALL,
    "ddp of the network, find_unused_parameters": ONE_CALL,
    "ddp of the network, static_graph": ONE_CALL,
    "fsdp2": BOTH + OURS,
    "fsdp2 bf16": BOTH,
    "fsdp2 checkpoint": BOTH + OURS,
    "fsdp2 compile": ONE_CALL,
    "fsdp2 checkpoint compile": ONE_CALL[1:],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both processes found, by configuration: one pair runs them all, since starting takes seconds."""
    folder = tmp_path_factory.mktemp("pair")
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank in range(2):
        command = [sys.executable, str(HERE / "distributed_worker.py"), str(rank), str(folder / "store")]
        with logs[rank].open("w", encoding="utf8") as log:
            processes.append(
                subprocess.Popen([*command, f"{folder}/{rank}.json"], env=environment, stdout=log, stderr=log)
            )
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):  # one has died: the other waits for it in vain
                end = min(end, time.monotonic() + 5.0)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[dict[str, Any]]] = {"log": [{"text": log.read_text(encoding="utf8")[-3000:]} for log in logs]}
    for results in folder.glob("*.json"):
        for line in results.read_text(encoding="utf8").splitlines():
            result = json.loads(line)
            found.setdefault(result["name"], []).append(result)
    return found


def of_both(pair: dict[str, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    results = pair.get(name, [])
    for result in results:
        assert "raised" not in result, result["raised"]
    logs = "\n".join(log["text"] for log in pair["log"])
    assert len(results) == 2, f"the processes did not get to {name!r} within {SECONDS} s:\n{logs}"
    return results


@pytest.mark.parametrize(("way", "loss"), [(way, loss) for way, losses in WAYS.items() for loss in losses])
def test_every_parameter_learns_as_in_one_process(pair, way, loss):
    for result in of_both(pair, f"{way}: {loss}"):
        assert result["missing"] == []
        assert result["moved"] > 1e-4  # the comparison means something
        assert (result["graphs"] > 0) == ("compile" in way)
        if "bf16" in way:
            # Ten steps of products in bfloat16, eps = 2^-8, against float64, relative to the way travelled: some eps.
            # A parameter without gradients would be off by 1.
            assert result["relative"] < 0.05
        else:
            assert result["error"] < 1e-9


@pytest.mark.parametrize("name", ["as_tensor under ddp", "as_tensor under fsdp2"])
def test_tensor_duals_are_refused(pair, name):
    for result in of_both(pair, name):
        for message in result["messages"]:  # for the module itself, and within a function
            assert message is not None and "as_tensor=True does not work under DDP or FSDP" in message
