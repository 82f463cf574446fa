"""What `pfm.load` and `save` refuse: each in one line that names the value, and nothing comes back changed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyflowmap as pfm
from pyflowmap import checkpoint
from pyflowmap.interpolants import VariancePreserving
from pyflowmap.nn import MLP, MLPConfig


@pytest.fixture
def path(tmp_path):
    return pfm.FlowMap(MLP(MLPConfig(width=8)), "velocity", VariancePreserving(), "single_time").save(
        tmp_path / "net.safetensors"
    )


def rewrite(path, change=lambda tensors, description: None, text=None):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["pyflowmap"])
    change(tensors, description)
    save_file(tensors, path, metadata={"pyflowmap": json.dumps(description) if text is None else text(description)})


def refused(call, words, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 600, said


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind(path, kind):
    first = next(iter(load_file(path)))

    def change(tensors, _):
        tensors[first] = (300 * tensors[first]).to(kind)

    rewrite(path, change)
    refused(lambda: pfm.load(path), f"dtype {kind}")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_width_are_read(path, kind):
    before = load_file(path)
    rewrite(path, lambda tensors, _: tensors.update({key: value.to(kind) for key, value in tensors.items()}))
    after = pfm.load(path).network.state_dict()
    assert all(torch.equal(after[key], value.to(kind).float()) for key, value in before.items())


HUGE = 10**400
CHANGES = {
    "call empty": ({"call": {}}, "call = {}"),
    "call number": ({"call": 3}, "call = 3"),
    "call list": ({"call": ["single_time"]}, "call = ['single_time']"),
    "call none": ({"call": None}, "call = None"),
    "call unknown": ({"call": "x" * 5000}, "call = 'xxx"),
    "prediction": ({"prediction": ["velocity"]}, "prediction"),
    "beta": (
        {"interpolant": {"name": "VariancePreserving", "options": {"beta_min": 0.1, "beta_max": HUGE}}},
        "'beta_max' = a number of more than 80 digits",
    ),
    "nan": (
        {"interpolant": {"name": "VariancePreserving", "options": {"beta_min": float("nan")}}},
        "'beta_min' = nan",
    ),
    "option": ({"interpolant": {"name": "Linear", "options": {"a": 1}}}, "'a'"),
    "path list": ({"interpolant": {"name": [], "options": {}}}, "interpolant = "),
    "path": ({"interpolant": 3}, "the description"),
    "network name": ({"network": {"name": [], "config": {}}}, "network '[]' is unknown"),
    "network": ({"network": [1]}, "description of the network"),
    "width": ({"network": {"name": "MLP", "config": {"width": HUGE}}}, "width"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_descriptions(path, name):
    change, words = CHANGES[name]
    rewrite(path, lambda _, description: description.update(change))
    refused(lambda: pfm.load(path), words)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "{", '{"a":' * 50_000])
def test_texts_that_are_no_description(path, text):
    rewrite(path, text=lambda _: text)
    refused(lambda: pfm.load(path), "is not JSON")


def test_notes(path, tmp_path):
    rewrite(path, lambda _, description: description.update(notes=[1]))
    refused(lambda: checkpoint.notes(path), "notes are [1]")
    fm = pfm.load(path)
    refused(lambda: fm.save(path, notes=[1]), "notes is list", TypeError)
    before = path.read_bytes()
    refused(lambda: fm.save(path, notes={"a": torch.ones(2)}), "x.tolist()", TypeError)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_names(tmp_path, path):
    refused(lambda: pfm.load("x" * 5000), "File name too long")
    refused(lambda: pfm.load("x" * 5000 + ".safetensors"), "File name too long")
    refused(lambda: pfm.load("sd.pt"), "network.load_state_dict(...)", FileNotFoundError)
    torch.save({}, tmp_path / "sd.pt")
    refused(lambda: pfm.load(tmp_path / "sd.pt"), "network.load_state_dict(...)")
    save_file(load_file(path), tmp_path / "bare.safetensors")
    refused(lambda: pfm.load(tmp_path / "bare.safetensors"), "network.load_state_dict(...)")
    refused(lambda: pfm.load("../pretrained/digits"), "neither a shipped", FileNotFoundError)


def test_a_conversion_that_overflows(path, tmp_path):
    fm = pfm.load(path)
    with torch.no_grad():
        next(iter(fm.network.parameters())).view(-1)[0] = 1e5
    before = path.read_bytes()
    refused(lambda: fm.save(path, dtype=torch.float16), "largest value is 100000")
    assert path.read_bytes() == before
    fm.save(path, dtype=torch.bfloat16)
    assert abs(next(iter(pfm.load(path).network.parameters())).view(-1)[0].item() / 1e5 - 1) < 2**-8


def test_a_bare_register_is_refused():
    with pytest.raises(TypeError, match=r"write @pfm.nn.register\(Config\)"):

        @pfm.nn.register
        class Own(torch.nn.Module):
            pass

    with pytest.raises(TypeError, match="dict is not a dataclass"):
        pfm.nn.register(dict)
