"""DDP and FSDP2 on two processes: one process learns the same; checkpoints go from any number to any number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch

from pyflowmap.training import Trainer

HERE = Path(__file__).parent
SECONDS = 120

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict]]]:
    """What both processes found, by job: one pair runs them all, since starting takes seconds."""
    folder = tmp_path_factory.mktemp("pair")
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank in range(2):
        with logs[rank].open("w", encoding="utf8") as log:
            command = [sys.executable, str(HERE / "pair.py"), str(rank), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[dict]] = {"log": [{"text": log.read_text(encoding="utf8")[-3000:]} for log in logs]}
    for rank in range(2):
        results = folder / f"{rank}.json"
        for line in results.read_text(encoding="utf8").splitlines() if results.exists() else []:
            result = json.loads(line)
            found.setdefault(result["name"], []).append(result)
    return folder, found


def of_both(pair: tuple[Path, dict[str, list[dict]]], name: str) -> list[dict]:
    results = pair[1].get(name, [])
    for result in results:
        assert "raised" not in result, result["raised"]
    assert len(results) == 2, pair[1]["log"]
    return results


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_as_one(pair, kind):
    for result in of_both(pair, f"agree {kind}"):
        assert result["moved"] > 1e-3 and result["gap"] < 1e-9


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_the_librarys_objectives_as_one(pair, kind):
    for result in of_both(pair, f"library {kind}"):
        for name in ("mean_flow", "lagrangian", "progressive"):
            assert result[name]["moved"] > 1e-3 and result[name]["gap"] < 1e-9


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_resume_bit_for_bit(pair, kind):
    for result in of_both(pair, f"resume {kind}"):
        assert result["moved"] > 1e-3 and result["gap"] == 0.0
        shards = sum(name.startswith("shard-") for name in result["files"])
        assert shards == (2 if kind == "fsdp" else 0)
        assert all(name.endswith((".safetensors", ".json")) for name in result["files"])  # nothing pickled


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_continue_what_one_began(pair, kind):
    for result in of_both(pair, f"spread {kind}"):
        assert result["gap"] < 1e-9


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_continues_what_two_began(pair, kind, tmp_path):
    of_both(pair, f"resume {kind}")
    shutil.copytree(pair[0] / f"{kind}-2", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000010")

    def train(folder):
        options = dict(clip=0.5, ema=(0.9,), dropout={"label": (4, 0.3)}, log_every=1, progress=False)
        return Trainer(small.step(), small.Stream(), steps=10, folder=folder, **options).fit()

    again, unbroken = train(tmp_path / "run"), train(None)
    for x, y in zip(again.step.parameters(), unbroken.step.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=0)
    for x, y in zip(again.ema[0.9].parameters(), unbroken.ema[0.9].parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=0)
    steps = [json.loads(line)["step"] for line in again.history.read_text().splitlines()]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize("harm", ["one bit", "missing"])
def test_a_damaged_shard_is_named(pair, tmp_path, harm):
    of_both(pair, "resume fsdp")
    shutil.copytree(pair[0] / "fsdp-2", tmp_path / "run")
    shard = tmp_path / "run/checkpoints/step-000000010/shard-00002-model-00001-of-00001.safetensors"
    text = bytearray(shard.read_bytes())
    text[-1] ^= 1
    shard.unlink() if harm == "missing" else shard.write_bytes(text)
    with pytest.raises(
        ValueError, match=r"shard-00002-.* is (damaged|missing).*the last whole one is .*step-000000005"
    ):
        Trainer(small.step(), small.Stream(), steps=10, folder=tmp_path / "run", progress=False).fit()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_first_process_draws_pictures_from_the_whole_average(pair, kind):
    first, second = sorted(of_both(pair, f"pictures {kind}"), key=lambda result: -result["drawn"])
    assert (first["drawn"], second["drawn"]) == (2, 0) and first["gap"] == 0.0
    assert first["files"] == ["step-000000005.png", "step-000000010.png"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_cannot_write_stops_both(pair, kind):
    for result in of_both(pair, f"failure {kind}"):
        assert "could not be written" in result["message"]


def test_several_processes_without_a_distribution_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone"):
        Trainer(small.step(), small.Stream(), steps=1)


def test_a_stream_of_another_process_is_refused():
    with pytest.raises(ValueError, match="process 1 of 2, this is 0 of 1"):
        Trainer(small.step(), small.Stream(rank=1, world=2), steps=1)


def test_without_torchrun_the_error_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node"):
        Trainer(small.step(), small.Stream(), steps=1, distribution="ddp")


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"optimizer": "muon"}])
def test_what_sharded_parameters_do_not_do_is_refused(options):
    with pytest.raises(ValueError, match="in pieces"):
        Trainer(small.step(), small.Stream(), steps=1, distribution="fsdp", **options)
