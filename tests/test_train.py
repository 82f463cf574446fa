"""`pyflowmap train`: runs that end, stop, resume to the same bits, and errors in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyflowmap as pfm
from pyflowmap import training
from pyflowmap.cli import main

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(training, "Trainer"), reason="this tree has no Trainer yet")
SMALL = ["--set", "batch=64", "--set", "width=16", "--set", "save_every=5", "--set", "log_every=1"]


def train(*arguments):
    return main(["train", "checkerboard_lsd", *SMALL, *map(str, arguments)])


def process(*arguments, under=("-m", "pyflowmap"), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *under, "train", "checkerboard_lsd", *SMALL, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def records(folder):
    history = folder / "history.jsonl"
    return [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []


def steps_done(folder):
    return records(folder)[-1]["step"] if records(folder) else 0


def wait_for(condition, running, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_run_from_the_first_step_to_a_flow_map(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train("--set", "steps=12", "--folder", folder) == 0
    out = capsys.readouterr().out
    assert "step 12 of 12, done" in out and "the average with decay 0.9999" in out
    assert steps_done(folder) == 12
    x = pfm.sample(pfm.load(folder / "flow_map.safetensors"), (5, 2), steps=2, seed=0)
    assert x.shape == (5, 2) and x.isfinite().all()


def test_more_steps_resume_and_another_configuration_is_refused(tmp_path, capsys):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert train("--set", "steps=7", "--folder", folder) == 0
    assert train("--set", "steps=7", "--folder", folder, "--set", "clip=3", "--resume") == 1
    error = capsys.readouterr().err
    assert "recipe.clip was 10.0 and is 3.0" in error and error.strip().count("\n") <= 1
    assert train("--set", "steps=7", "--folder", folder, "--resume") == 0  # nothing is left to do
    assert train("--set", "steps=7", "--folder", whole) == 0
    first, second = (load_file(f / "flow_map.safetensors") for f in (folder, whole))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_fresh_moves_what_is_there_aside(tmp_path, capsys):
    folder = tmp_path / "run"
    for number in (0, 1, 2):
        assert train("--set", "steps=3", "--set", f"seed={number}", "--folder", folder, "--fresh") == 0
        moved = f"moved {folder} to {folder}.old-{number}" in capsys.readouterr().out
        assert moved == (number > 0)
    for number, place in ((0, "run.old-1"), (1, "run.old-2"), (2, "run")):
        state = next((tmp_path / place / "checkpoints").glob("step-*/state.json")).read_text()
        assert json.loads(state)["configuration"]["recipe.seed"] == number


def test_sigterm_saves_and_exits_with_0_and_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train("--set", "steps=400", "--folder", whole) == 0
    arguments = ("--set", "steps=400", "--folder", broken)

    running = process(*arguments)
    wait_for(lambda: steps_done(broken) >= 20, running)
    running.send_signal(signal.SIGTERM)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 0, error
    stopped = steps_done(broken)
    assert stopped < 380, "the run ended before the signal: give it more steps"
    assert f"step {stopped} of 400, stopped by a signal, and saved" in out
    assert (broken / f"checkpoints/step-{stopped:09d}").is_dir() and not (broken / "flow_map.safetensors").exists()

    running = process(*arguments)
    wait_for(lambda: steps_done(broken) >= stopped + 10, running)
    running.kill()
    running.communicate(timeout=60)

    running = process(*arguments, "--resume")
    out, error = running.communicate(timeout=60)
    assert running.returncode == 0, error
    first, second = (load_file(f / "flow_map.safetensors") for f in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    for folder in (whole, broken):
        assert [record["step"] for record in records(folder)] == list(range(1, 401))


def test_sigterm_before_the_first_step_exits_with_0(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom dataclasses import dataclass\nfrom pyflowmap.recipes import Recipe\n@dataclass\n"
        "class Slow(Recipe):\n    def data(self):\n        print('opening', flush=True)\n        time.sleep(60)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "pyflowmap", "train", str(slow)], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout.readline() == "opening\n"
    running.send_signal(signal.SIGTERM)
    _, error = running.communicate(timeout=30)
    assert running.returncode == 0 and "stopped before the first step" in error


def test_two_processes_under_torchrun_agree_with_one(tmp_path):
    """The rows are the same, so only the order of float32 sums differs."""
    under = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyflowmap")
    two = process("--set", "steps=6", "--folder", tmp_path / "two", under=under)
    out, error = two.communicate(timeout=120)
    assert two.returncode == 0, error
    assert out.count("step 6 of 6, done") == 1  # one process reports
    assert train("--set", "steps=6", "--folder", tmp_path / "one") == 0
    first, second = (load_file(tmp_path / n / "flow_map.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(first[k], second[k], atol=2e-5) for k in first)
    for one, both in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["step"] == both["step"] and one["loss"] == pytest.approx(both["loss"], rel=1e-4)


def test_list_and_help(capsys):
    assert main(["train", "--list"]) == 0
    out = capsys.readouterr().out
    assert "checkerboard_psd_u  250,000  100,000  2-D checkerboard by PSD-U" in out and len(out.splitlines()) == 8
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "name only files that you trust" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name a recipe, checkerboard_lsd"),
        (("checkerboard_lds",), "no recipe 'checkerboard_lds'; the nearest are"),
        (("checkerboard_lsd", "--set", "stesp=3"), "no field 'stesp'; the nearest are steps"),
        (("checkerboard_lsd", "--folder", "{}", "--resume"), "holds no checkpoint"),
        (("image_folder", "--folder", "{}"), "path is empty"),
        (("{}/mine.py", "--folder", "{}"), "mine.py: Mine has no data(); return a set"),
        (("latents", "--set", "path={}/none", "--folder", "{}"), "there is no store"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom pyflowmap.recipes import Recipe\n"
        "@dataclass\nclass Mine(Recipe):\n    x: int = 1\n"
    )
    assert main(["train", *(a.format(tmp_path) for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pyflowmap train: ") and message in error and error.count("\n") == 1


def test_a_corrupt_shard_ends_the_run_with_its_name(tmp_path, capsys, monkeypatch):
    class Noise:
        shape = (2, 4, 4)

        def __len__(self):
            return 16

        def batch(self, indices):
            return torch.randn(len(indices), 2, 4, 4), {}

    monkeypatch.setattr("pyflowmap.nn.dit.SIZES", {"S": (1, 16, 2)})
    store = pfm.data.write_latents(Noise(), lambda x: x, tmp_path / "store", shard=8)
    path = store / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    arguments = ["--set", f"path={store}", "--set", "batch=16", "--set", "steps=3", "--folder", str(tmp_path / "run")]
    assert main(["train", "latents", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "shard-000001.safetensors: rows " in error and "checksums differ" in error
