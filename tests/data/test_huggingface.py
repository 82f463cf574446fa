"""Rows of a Dataset: with a stand-in where the package is missing, with the package itself where it is there."""

import io
import sys

import numpy as np
import pytest
import torch

from pyflowmap.data import huggingface

Image = pytest.importorskip("PIL.Image")


def rows(count=6):
    pictures = [Image.fromarray(np.full((10, 12), 20 * k, np.uint8)) for k in range(count)]
    return [{"image": each, "label": k % 3} for k, each in enumerate(pictures)]


def test_pictures_and_labels():
    data = huggingface(rows(), size=8, channels=1)
    assert (len(data), data.shape, data.labels) == (6, (1, 8, 8), 3)
    x1, condition = data.batch(np.array([4, 1]))
    assert torch.allclose(x1, (torch.tensor([80, 20]) / 127.5 - 1)[:, None, None, None].expand_as(x1))
    assert condition["label"].tolist() == [1, 1]
    assert huggingface(rows(), size=8, label=None).batch(np.array([0]))[1] == {}


def test_arrays_are_taken_as_they_are():
    arrays = [{"z": [[k, 2.0], [3.0, 4.0]], "label": 0} for k in range(3)]
    data = huggingface(arrays, column="z")
    assert data.shape == (2, 2) and data.batch(np.array([2]))[0].tolist() == [[[2.0, 2.0], [3.0, 4.0]]]
    arrays[1]["z"] = [1.0]
    with pytest.raises(ValueError, match=r"row 1: column 'z' has shape \(1,\)"):
        data.batch(np.array([0, 1]))


class Broken(list):
    def __getitem__(self, number):
        if number == 4:
            raise RuntimeError("Arrow says no")
        return super().__getitem__(number)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: huggingface(rows()), "pass size="),
        (lambda: huggingface(rows(), size=8, column="img"), "no column 'img'; it has image, label"),
        (lambda: huggingface([], size=8), "empty"),
        (lambda: huggingface(Broken(rows()), size=8, label=None).batch(np.array([3, 4])), "row 4 .*Arrow says no"),
        (lambda: huggingface([{"image": "text", "label": 0}]), "row 0: column 'image' is"),
    ],
)
def test_bad_rows(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="no rows to look up"):
        huggingface(iter(rows()), size=8)


def test_a_label_out_of_range():
    class Classes:
        num_classes = 2

    class Typed(list):
        pass

    typed = Typed(rows())
    typed.features = {"label": Classes()}
    with pytest.raises(ValueError, match="row 2 has label = 2, not one of 0 to 1"):
        huggingface(typed, size=8).batch(np.arange(3))


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        huggingface("some/name")

    asked = []

    class Package:
        def load_dataset(self, name, split):
            asked.append((name, split))
            return rows()

        def load_from_disk(self, path):
            return {"train": rows(2), "test": rows(3)}

    monkeypatch.setitem(sys.modules, "datasets", Package())
    with pytest.raises(FileNotFoundError, match="download=True"):
        huggingface("some/name", size=8)
    assert asked == []
    assert len(huggingface("some/name", size=8, download=True)) == 6 and asked == [("some/name", "train")]
    assert len(huggingface(tmp_path, split="test", size=8)) == 3
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        huggingface(tmp_path, split="dev", size=8)


def test_with_the_package_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})

    def png(picture):
        content = io.BytesIO()
        picture.save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    pictures = [*(png(row["image"]) for row in rows()), {"bytes": b"junk", "path": None}]
    table = pyarrow.table({"image": pictures, "label": [0, 1, 2, 0, 1, 2, 0]}, schema=features.arrow_schema)
    source = datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features), fingerprint="1"
    )
    source.save_to_disk(str(tmp_path / "saved"))
    for given in (source, tmp_path / "saved"):
        data = huggingface(given, size=8, channels=1)
        assert (len(data), data.labels) == (7, 4)
        x1, condition = data.batch(np.array([4, 1]))
        assert torch.allclose(x1, (torch.tensor([80, 20]) / 127.5 - 1)[:, None, None, None].expand_as(x1))
        assert condition["label"].tolist() == [1, 1]
        with pytest.raises(ValueError, match="row 6 of the data set cannot be read"):
            data.batch(np.array([6]))
