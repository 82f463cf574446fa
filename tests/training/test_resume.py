"""Killed, stopped, out of room, damaged, changed: what a run comes back to."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

from pyflowmap.training import Trainer, inverse_sqrt

HERE = Path(__file__).parent


def train(folder, steps=20, *, dropout=0.1, poison=None, step=None, **options):
    """Everything that draws random numbers is on."""
    options = {"dropout": {"label": (4, 0.3)}, "save_every": 5, "log_every": 1, "ema": (0.9, 0.99), **options}
    step = step or small.step(dropout=dropout)
    return Trainer(step, small.Stream(poison=poison), steps=steps, folder=folder, progress=False, **options).fit()


def tensors_of(result) -> dict[str, torch.Tensor]:
    out = {f"step/{n}": x for n, x in result.step.state_dict().items()}
    return out | {f"{d}/{n}": x for d, net in result.ema.items() for n, x in net.state_dict().items()}


def assert_same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def history(path) -> list[dict]:
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in Path(path).read_text().splitlines()]


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- bit for bit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "radam", "schedule": inverse_sqrt(after=4)},
        {"optimizer": "muon", "lr": 0.01, "warmup": 7},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"poison": {3: [1], 8: [0, 5], 11: range(8)}},
    ],
    ids=["adamw", "radam", "muon", "own", "bfloat16", "float16", "poison"],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, options):
    unbroken = train(tmp_path / "a", **options)
    train(tmp_path / "b", 10, **options)
    resumed = train(tmp_path / "b", **options)
    assert resumed.stopped == "done" and resumed.steps == 20
    assert_same(unbroken, resumed)
    assert history(unbroken.history) == history(resumed.history)
    assert [record["step"] for record in history(resumed.history)] == list(range(1, 21))


def test_the_scale_of_float16_resumes(tmp_path):
    def go(folder, steps):
        step = small.step(dtype=torch.float32, scale=100.0)
        options = dict(steps=steps, folder=folder, precision="float16", log_every=1, progress=False)
        trainer = Trainer(step, small.Stream(dtype=torch.float32), **options)
        return trainer, trainer.fit()

    (whole, unbroken), _, (half, resumed) = go(tmp_path / "a", 20), go(tmp_path / "b", 10), go(tmp_path / "b", 20)
    assert whole.update.scaler.state_dict() == half.update.scaler.state_dict()
    assert half.update.scaler.get_scale() < 65536.0  # it had to fall
    assert_same(unbroken, resumed)


def test_the_history_is_cut_back_to_the_checkpoint(tmp_path):
    result = train(tmp_path, 10)
    expected = history(result.history)
    with result.history.open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # killed in the middle of a line
    train(tmp_path, 13)
    assert history(result.history)[:10] == expected
    assert [record["step"] for record in history(result.history)] == list(range(1, 14))


def test_half_written_checkpoints_of_killed_runs_are_swept(tmp_path):
    train(tmp_path, 5)
    (tmp_path / "checkpoints/.step-000000007").mkdir()
    (tmp_path / "checkpoints/.step-000000007/tensors.safetensors").write_text("half")
    train(tmp_path, 6)
    assert names(tmp_path) == ["step-000000005", "step-000000006"]


def test_an_objective_that_draws_from_the_global_generators_resumes_too(tmp_path):
    def objective(flow_map, x1, *, condition):
        import random

        import numpy as np

        from pyflowmap.objectives.loss import Loss

        t = torch.rand(len(x1), dtype=x1.dtype) * random.random() * np.random.rand()  # noqa: NPY002
        error = (flow_map.network(torch.randn_like(x1), t, t, condition["label"]) - x1).square().sum(1)
        return Loss(error, error.detach())

    def go(folder, steps):
        return train(folder, steps, step=small.step(objective, dropout=0.1))

    unbroken = go(tmp_path / "a", 20)
    go(tmp_path / "b", 10)
    assert_same(unbroken, go(tmp_path / "b", 20))


def test_the_global_generators_are_left_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    step = small.step(dropout=0.1)
    torch.manual_seed(5)
    train(None, 3, step=step)
    assert torch.equal(torch.rand(3), expected)


def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path):
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name, lives in (("killed", "10"), ("unbroken", "0")):
        command = [sys.executable, str(HERE / "killed.py"), str(tmp_path / name), "60", lives, "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and f"killed {lives}" in done.stdout, done.stdout + done.stderr
    last = "checkpoints/step-000000060/tensors.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "unbroken" / last).read_bytes()
    assert history(tmp_path / "killed/history.jsonl") == history(tmp_path / "unbroken/history.jsonl")
    assert names(tmp_path / "killed") == names(tmp_path / "unbroken")  # no half-written folder stays


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_saves_and_ends(tmp_path, numbers):
    """Also Ctrl-C under torchrun: the terminal's SIGINT, and torchrun's SIGTERM after it."""

    def ask(record):
        if record["step"] == 7:
            for number in numbers:
                os.kill(os.getpid(), number)

    before = signal.getsignal(numbers[0])
    stopped = train(tmp_path / "b", callback=ask)
    assert stopped.stopped == "signal" and 7 <= stopped.steps <= 8
    assert names(tmp_path / "b")[-1] == f"step-{stopped.steps:09d}"
    assert signal.getsignal(numbers[0]) is before
    assert_same(train(tmp_path / "a"), train(tmp_path / "b"))


def test_a_second_signal_does_not_wait():
    def ask(record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            train(None, callback=ask)
    finally:
        signal.signal(signal.SIGINT, before)


def test_keep_and_a_finished_run(tmp_path):
    train(tmp_path, 20, keep=3)
    assert names(tmp_path) == ["step-000000010", "step-000000015", "step-000000020"]
    again = train(tmp_path, 20, keep=3, step=small.step(dropout=0.1, seed=9))
    assert again.steps == 20 and again.stopped == "done"
    assert_same(again, train(None, 20))


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if record["step"] == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))

    try:
        with pytest.raises(OSError, match=r"step 10 could not be written.*step-000000005 is whole; free some space"):
            train(tmp_path, callback=fill, log_every=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-000000005"]
    assert_same(train(tmp_path, log_every=7), train(None))


def test_another_configuration_names_every_difference(tmp_path):
    train(tmp_path, 5, configuration={"width": 64, "data": {"name": "digits"}}, lr=1e-3)
    with pytest.raises(ValueError) as caught:
        train(tmp_path, 10, configuration={"width": 32, "data": {"name": "faces"}, "new": 1}, lr=2e-3, ema=(0.9,))
    message = str(caught.value)
    for part in (
        "recipe.width was 64 and is 32",
        "recipe.data.name was 'digits' and is 'faces'",
        "recipe.new was 'absent' and is 1",
        "trainer.lr was 0.001 and is 0.002",
        "trainer.ema was [0.9, 0.99] and is [0.9]",
    ):
        assert part in message
    assert "\n" not in message and "seed" not in message
    assert train(tmp_path, 10, configuration={"width": 64, "data": {"name": "digits"}}, lr=1e-3).steps == 10


def test_the_end_of_a_cosine_is_part_of_the_configuration(tmp_path):
    train(tmp_path, 5, schedule="cosine")
    with pytest.raises(ValueError, match=r"trainer\.steps was 5 and is 10"):
        train(tmp_path, 10, schedule="cosine")


def test_a_configuration_that_is_no_json():
    with pytest.raises(TypeError, match=r"recipe\.x is set"):
        train(None, 1, configuration={"x": {1}})


def test_another_network_is_named(tmp_path):
    train(tmp_path, 5)
    with pytest.raises(ValueError, match=r"'ema/0.9/embedding.weight' is torch.float64 of shape \(5, 7\).*\(5, 9\)"):
        train(tmp_path, 10, step=small.step(network=small.Network(9)))


def _truncate(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(path):
    file = path / "tensors.safetensors"
    text = bytearray(file.read_bytes())
    text[-3] ^= 1
    file.write_bytes(text)


DAMAGE = {
    "truncated": (_truncate, r"tensors\.safetensors is damaged: \d+ bytes"),
    "one bit": (_flip, r"tensors\.safetensors is damaged: its contents"),
    "no tensors": (lambda p: (p / "tensors.safetensors").unlink(), r"tensors\.safetensors is missing"),
    "bad json": (lambda p: (p / "state.json").write_text('{"format": 1,'), r"state\.json is damaged"),
    "deep json": (lambda p: (p / "state.json").write_text("[" * 100_000), r"state\.json is damaged"),
    "not ours": (lambda p: (p / "state.json").write_text("{}"), r"state\.json is damaged: it lists no files"),
    "no json": (lambda p: (p / "state.json").unlink(), r"state\.json is missing"),
    "escape": (
        lambda p: (p / "state.json").write_text('{"format": 1, "files": {"../../x": {}}}'),
        r"lists the file '\.\./\.\./x'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_last_whole_one(tmp_path, kind):
    train(tmp_path, 10)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoints/step-000000010")
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path, 20)
    assert "the last whole one is" in str(caught.value) and "step-000000005" in str(caught.value)
    shutil.rmtree(tmp_path / "checkpoints/step-000000010")  # the cure
    assert_same(train(tmp_path, 20), train(None, 20))


@pytest.mark.parametrize(
    "change",
    [{"position": None}, {"generators": [{}]}, {"generators": 3}, {"optimizer": {"7/x/y": 1}}, {"on_host": None}],
    ids=str,
)
def test_a_state_that_lies_is_a_clear_error(tmp_path, change):
    train(tmp_path, 5)
    file = tmp_path / "checkpoints/step-000000005/state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match="step-000000005"):
        train(tmp_path, 10)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    def second(record):
        with pytest.raises(RuntimeError, match="another run is writing"):
            train(tmp_path, 3)

    assert train(tmp_path, 3, callback=second).steps == 3
    assert train(tmp_path, 4).steps == 4


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot write"):
        train(tmp_path / "file" / "run")
