"""A folder of pictures; its sub-folders are the classes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data_set import check_rows
from .pictures import FORMATS, MAX_PIXELS, check_size, pillow, read

__all__ = ["image_folder"]


class image_folder:
    """Pictures of a folder: x1 (channels, H, W) in [-1, 1]; condition["label"] where there are sub-folders.

        path/cat/any/1.jpg  path/dog/2.png     class 0 is the first sub-folder in sorted order, whatever lies deeper
        path/1.jpg          path/2.png         no sub-folders: no labels

    size        pixels, or (height, width). The largest centred part of that aspect is resized, bicubic
    channels    3, or 1 for grey
    on_damaged  "raise": the first picture that cannot be read ends the run with its name; "skip": the next readable one
                stands in for it, and `damaged` collects the names
    max_pixels  a larger picture counts as damaged; it is never decoded
    threads     that decode; the order of rows does not depend on them

    Files end in .png, .jpg, .jpeg, .webp or .bmp; others and hidden ones are left out. EXIF orientation is applied,
    what is transparent is laid on white. Needs Pillow.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        on_damaged: str = "raise",
        max_pixels: int = MAX_PIXELS,
        threads: int | None = None,
    ):
        pillow()
        if channels not in (1, 3):
            raise ValueError(f"channels = {channels!r}; 3 for colour, 1 for grey")
        if on_damaged not in ("raise", "skip"):
            raise ValueError(f'on_damaged = {on_damaged!r}; it is "raise" or "skip"')
        self.path, self.size, self.channels = Path(path), check_size(size), channels
        self.on_damaged, self.max_pixels = on_damaged, max_pixels
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path)!r}; give the one that holds the pictures")
        self.files, self.label, self.classes = _listing(self.path)
        self.shape, self.labels = (channels, *self.size), len(self.classes)
        self.damaged: set[str] = set()
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows = check_rows(indices, len(self), "image_folder").tolist()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="pyflowmap-pictures")
        read = list(self._pool.map(self._read, rows))
        pixels = np.stack([picture for _, picture in read]).astype(np.float32)
        x1 = torch.from_numpy(pixels / np.float32(127.5) - np.float32(1.0))
        if not self.labels:
            return x1, {}
        return x1, {"label": torch.from_numpy(self.label[[row for row, _ in read]])}

    def _read(self, row: int) -> tuple[int, np.ndarray]:
        """(the row that was read, its picture): where damaged ones are skipped, the next that is whole."""
        for shift in range(len(self)):
            at = (row + shift) % len(self)
            try:
                return at, read(self.files[at], self.size, self.channels, self.max_pixels)
            except ValueError:
                if self.on_damaged == "raise":
                    raise
                self.damaged.add(str(self.files[at]))
        raise ValueError(f"none of the {len(self)} pictures in {self.path} can be read; look at one of them")


def _listing(folder: Path) -> tuple[list[Path], np.ndarray, list[str]]:
    """(files, their labels, the classes' names), sorted by name, so that every machine numbers them alike."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = _pictures([p for p in folder.iterdir() if p.is_file()])
    if not classes:
        if not loose:
            raise ValueError(f"{folder} holds no pictures ({', '.join(FORMATS)}); give the folder that does")
        return loose, np.zeros(len(loose), np.int64), []
    if loose:
        raise ValueError(
            f"{loose[0]} lies beside the class folders {', '.join(classes[:3])}...; move it into one, "
            "or put all pictures into one folder without classes"
        )
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = _pictures([Path(root) / file for root, _, names in os.walk(folder / name) for file in names])
        if not found:
            raise ValueError(f"the class folder {folder / name} holds no pictures ({', '.join(FORMATS)}); remove it")
        files += found
        labels += [number] * len(found)
    return files, np.asarray(labels, np.int64), classes


def _pictures(paths: list[Path]) -> list[Path]:
    return sorted((p for p in paths if p.suffix.lower() in FORMATS and not p.name.startswith(".")), key=Path.as_posix)
