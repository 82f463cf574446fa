"""The programs that draw docs/editing.png and docs/quality.png, in small."""

import importlib.util
import pathlib

import pytest
import torch

import pyflowmap as pfm

ROOT = pathlib.Path(__file__).resolve().parents[2]


def program(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_edited_and_restored(tmp_path):
    pytest.importorskip("matplotlib")
    example = program("examples/edit_digits.py")
    labels = torch.tensor([3, 7])
    model = pfm.load("digits")
    images = pfm.sample(model, (2, 1, 28, 28), 2, condition={"label": labels}, seed=0).clamp(-1, 1)
    shown = example.rows(model, images, labels, steps=4)
    assert all(each.shape == images.shape and each.isfinite().all() for each in shown.values())
    mask, coarse = example.hole(), pfm.editing.Downsample(4)
    torch.testing.assert_close(shown["inpainted"] * mask, images * mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(coarse.forward(shown["super-resolution"]), coarse.forward(images), rtol=0, atol=1e-5)
    error = lambda name: float((shown[name] - images).square().mean().sqrt())  # noqa: E731
    assert error("inpainted") < 0.7 * error("a hole") and error("deblurred") < 0.7 * error("blurred")
    assert error("super-resolution") < error("7 x 7 pixels")
    assert error("FlowEdit: one more") > 0.2  # it is another digit now
    example.draw(tmp_path / "editing.png", shown)
    assert (tmp_path / "editing.png").read_bytes().startswith(b"\x89PNG")


def test_quality_against_evaluations(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mlxtend")
    tool = program("tools/solver_picture.py")
    out = tmp_path / "quality.png"
    small = ["--count", "70", "--reference", "2", "--epochs", "1", "--nfe", "1", "2"]
    tool.main(["--out", str(out), "--solvers", "euler", "heun", "no_such_solver", *small])
    said = capsys.readouterr().out
    assert "no_such_solver: not in this build" in said and "heun: nfe = 1 can't be met" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = [line for line in out.with_suffix(".md").read_text().splitlines() if line.startswith(("| euler", "| heun"))]
    assert [line.split(" | ")[0].strip("| ") for line in rows] == ["euler", "euler", "heun"]
    with pytest.raises(SystemExit, match="at least 70"):
        tool.main(["--count", "10"])
