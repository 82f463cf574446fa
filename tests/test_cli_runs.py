"""Large runs of `pyflowmap sample`: parts, processes, interruptions, and whose a file or a folder is."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pyflowmap.checkpoint import load
from pyflowmap.cli import main
from pyflowmap.cli.shards import Shards
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg
from pyflowmap.nn import UNet, UNetConfig
from pyflowmap.sampling import sample


@pytest.fixture
def small(tmp_path):
    """A small flow map, and one thread: several processes share the machine."""
    path, threads = tmp_path / "net.safetensors", torch.get_num_threads()
    torch.set_num_threads(1)
    FlowMap(UNet(UNetConfig(image=(1, 8, 8), channels=8, blocks=1))).save(path)
    yield path
    torch.set_num_threads(threads)


def command(model, out, **options):
    given = {"steps": 2, "count": 22, "batch": 4, "seed": 3, **options}
    return ["sample", str(model), "--out", str(out), *(f"--{key}={value}" for key, value in given.items())]


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "pyflowmap", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out + error


def test_a_run_of_parts_is_what_sample_gives(small, tmp_path, capsys):
    out = tmp_path / "new" / "all.safetensors"
    assert main(command(small, out)) == 0
    found = load_file(out)
    label = torch.arange(22) % 10
    assert torch.equal(found["labels"], label) and found["samples"].shape == (22, 1, 8, 8)
    model = load(small)
    options = {"condition": {"label": label}, "guidance": cfg(2.0, null={"label": 10}), "seed": 3, "chunk": 4}
    assert torch.equal(found["samples"], sample(model, (22, 1, 8, 8), 2, **options))
    assert os.listdir(out.parent) == [out.name]
    before = out.read_bytes()
    capsys.readouterr()
    assert main(command(small, out)) == 0 and "complete already" in capsys.readouterr().out
    assert main(command(small, out, seed=4)) == 1
    assert "seed = 3, this one has seed = 4" in capsys.readouterr().err
    assert out.read_bytes() == before
    main(command(small, tmp_path / "sevens.safetensors", label=7, count=3))
    assert load_file(tmp_path / "sevens.safetensors")["labels"].tolist() == [7, 7, 7]


def test_two_processes_give_the_bits_of_one(small, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    main(command(small, one))
    both = [start(command(small, two), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [alone(each) for each in both]
    assert two.read_bytes() == one.read_bytes()
    assert "22 samples" in said[0] + said[1] and "process 1 of 2" in said[0] and "sampling" not in said[1]
    assert sorted(os.listdir(tmp_path)) == sorted([one.name, two.name, small.name])


def test_killed_and_restarted_it_goes_on(small, tmp_path, capsys):
    one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    options = {"count": 80, "batch": 2, "steps": 6}
    parts = tmp_path / "out.safetensors.parts"
    process = start(command(small, out, **options))
    until = time.monotonic() + 100
    while len(list(parts.glob("part-*"))) < 3 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert 3 <= len(made) < 40 and not out.exists()
    (parts / ".part-000001-rest.safetensors").write_bytes(b"half")  # what a killed process may leave
    capsys.readouterr()
    kept, finish = {}, Shards.finish

    def spy(self):
        kept.update({path: path.stat().st_mtime_ns for path in made})
        return finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "finish", spy)
        assert main(command(small, out, **options)) == 0
    assert kept == made  # nothing was made twice
    assert f"resumed: {len(made)} of 40 parts" in capsys.readouterr().out
    main(command(small, one, **options))
    assert out.read_bytes() == one.read_bytes() and not parts.exists()


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch):
    """A run of six parts of which the second is missing."""
    out, parts = tmp_path / "out.safetensors", tmp_path / "out.safetensors.parts"
    main(command(small, tmp_path / "one.safetensors"))
    for rank in (0, 2, 3, 4, 5):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "6")
        assert main(command(small, out)) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert len(list(parts.glob("part-*"))) == 5 and not out.exists()
    return out, parts, (tmp_path / "one.safetensors").read_bytes()


def flip(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b"", flip, lambda b: b"no" * 40, lambda b: b"\xff" * 90]
)
def test_a_damaged_part_is_made_again(interrupted, small, capsys, damage):
    out, parts, whole = interrupted
    path = parts / "part-000003.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert main(command(small, out)) == 0
    said = capsys.readouterr().out
    assert "part-000003.safetensors was damaged" in said and "resumed: 4 of 6 parts" in said
    assert out.read_bytes() == whole


def test_a_part_damaged_by_then_is_named_when_merging(interrupted, small, capsys, monkeypatch):
    out, parts, whole = interrupted
    path = parts / "part-000004.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(command(small, out)) == 1
    assert "part-000004.safetensors is damaged" in capsys.readouterr().err and not out.exists()
    monkeypatch.setenv("RANK", "4")
    assert main(command(small, out)) == 0 and out.read_bytes() == whole


def test_another_runs_parts_are_refused(interrupted, small, tmp_path, capsys):
    out, parts, whole = interrupted
    other = tmp_path / "other.safetensors"
    FlowMap(UNet(UNetConfig(image=(1, 8, 8), channels=8, blocks=1))).save(other)
    for arguments, words in (
        (command(small, out, steps=3), "steps = 2, this one has steps = 3"),
        (command(small, out, batch=5), "batch = 4, this one has batch = 5"),
        (command(small, out, guidance=1.0), "guidance = 2.0, this one has guidance = 1.0"),
        (command(other, out), "weights = "),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    manifest = parts / "manifest.json"
    for text in ("{", "[" * 100_000, "[]", "x" * 100_000):
        manifest.write_text(text)
        assert main(command(small, out)) == 1
        assert "damaged" in capsys.readouterr().err
    manifest.unlink()  # without it, the parts themselves know
    part = parts / "part-000000.safetensors"
    held = part.read_bytes()
    main(command(small, tmp_path / "alien", seed=9))
    part.write_bytes((tmp_path / "alien" / part.name).read_bytes())
    assert main(command(small, out)) == 0 and out.read_bytes() == whole and len(held)


def test_a_folder_keeps_its_parts(small, tmp_path, capsys):
    out = tmp_path / "folder"
    assert main(command(small, out)) == 0
    assert sorted(os.listdir(out)) == ["manifest.json", *(f"part-{k:06d}.safetensors" for k in range(6))]
    main(command(small, tmp_path / "one.safetensors"))
    parts = torch.cat([load_file(out / f"part-{k:06d}.safetensors")["samples"] for k in range(6)])
    assert torch.equal(parts, load_file(tmp_path / "one.safetensors")["samples"])
    assert main(command(small, out)) == 0 and "resumed: 6 of 6" in capsys.readouterr().out


def test_finishing_at_the_same_time(interrupted, small, tmp_path):
    """Every process that finds all parts merges, or waits for the one that does; a lock left behind harms nobody."""
    out, parts, whole = interrupted
    (parts / "merge.lock").write_text("12345")
    several = [start(command(small, out)) for _ in range(2)]
    for each in several:
        alone(each)
    assert out.read_bytes() == whole and not parts.exists()


def test_overtaken_by_the_same_command(interrupted, small, monkeypatch):
    from pyflowmap.cli import sample as verb

    out, parts, whole = interrupted
    make = verb._make

    def late(*args, **options):
        monkeypatch.setattr(verb, "_make", make)
        assert main(command(small, out)) == 0 and not parts.exists()  # the other one, from beginning to end
        return make(*args, **options)

    monkeypatch.setattr(verb, "_make", late)
    assert main(command(small, out)) == 0
    assert out.read_bytes() == whole and not parts.exists()


def test_what_large_runs_refuse(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "foreign.safetensors").write_bytes(b"something else")
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (command(small, "/proc/nowhere/x.safetensors"), "cannot write into"),
        (command(small, tmp_path / "file" / "x.safetensors"), "cannot write into"),
        (command(small, tmp_path / "file"), "cannot write into"),
        (command(small, tmp_path / "foreign.safetensors"), "is not a run of pyflowmap sample"),
        (command(small, tmp_path / "x.safetensors", batch=0), "--batch 0"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert (tmp_path / "foreign.safetensors").read_bytes() == b"something else"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(small, tmp_path / "x.png")) == 1 and "made by one process" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert main(command(small, tmp_path / "x.safetensors")) == 1 and "RANK = 2" in capsys.readouterr().err


def test_the_second_process_of_two_resumes(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for said in ("3 parts made", "resumed: 3 of 3 parts"):
        assert main(command(small, out)) == 0, capsys.readouterr().err
        assert said in capsys.readouterr().out


def test_another_call_is_another_model(tmp_path, capsys):
    """The same weights with the span in the place of the end draw other samples."""
    torch.manual_seed(0)
    network, out, other = UNet(UNetConfig(image=(1, 8, 8), channels=8, blocks=1)), tmp_path / "a.safetensors", []
    for call in ("start_and_end", "start_and_span"):
        other.append(FlowMap(network, call=call).save(tmp_path / f"{call}.safetensors"))
    assert main(command(other[0], out)) == 0
    assert main(command(other[1], out)) == 1 and "weights = " in capsys.readouterr().err
    assert main(command(other[0], out)) == 0 and "complete already" in capsys.readouterr().out


def test_a_run_killed_in_the_merge_leaves_nothing_at_last(interrupted, small, monkeypatch):
    """Killed before the rename, then between rename and clean-up: SIGKILL runs no `finally`."""
    from pyflowmap.cli import shards

    out, parts, whole = interrupted
    code = f"import os, sys\nfrom pyflowmap.cli import main, shards\n{{}}\nmain({command(small, out)!r})\n"
    die = "os.kill(os.getpid(), 9)"
    for patch in (f"shards.os.fsync = lambda *_: {die}", f"shards.Shards._remove = lambda *_: {die}"):
        subprocess.run([sys.executable, "-c", code.format(patch)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (parts / "manifest.json").exists()
        left = {each.name for each in out.parent.iterdir()} - {"one.safetensors", small.name}
        assert left <= {out.name, parts.name}  # nothing beside the parts' folder, which is cleared:
    assert out.read_bytes() == whole and list(parts.glob(".out-*"))
    (parts / "mine.txt").write_text("")  # another's
    assert main(command(small, out)) == 0
    assert os.listdir(parts) == ["mine.txt"]
    (parts / "mine.txt").unlink()
    assert main(command(small, out)) == 0 and not parts.exists()
    other = shards.Shards(out, {"count": 22, "batch": 4})
    parts.mkdir()
    other.open()
    assert main(command(small, out)) == 0 and os.listdir(parts) == ["manifest.json"]  # another run's stays
