"""What a run tells: history.jsonl, tensorboard where it is installed, a progress bar, sample pictures."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import png
from ..files import whole_file

__all__ = ["Log"]


class Log:
    """Records of steps, to the end of `folder/history.jsonl`, one JSON object a line, flushed.

    It is cut back to `start`, the step of the checkpoint a run resumes from, so that a killed run leaves the file of an
    unbroken one, times aside. A number that is not finite is written as null.
    """

    def __init__(
        self,
        folder: Path | None,
        start: int,
        steps: int,
        seconds: float | None = None,
        *,
        callback: Callable[[dict[str, Any]], None] | None,
        progress: bool,
    ):
        self.folder, self.callback, self.file, self.board, self.bar = folder, callback, None, None, None
        self.steps, self.seconds = steps, seconds
        if folder is not None:
            self.path = folder / "history.jsonl"
            _cut(self.path, start)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        if progress:
            from tqdm.auto import tqdm

            if seconds is None:
                self.bar = tqdm(total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True)
            else:  # by progress, so that the remaining time is right when the wall clock ends the run
                shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
                self.bar = tqdm(total=100.0, desc="training", bar_format=shown, dynamic_ncols=True)

    def record(self, values: dict[str, Any]) -> None:
        if self.file is not None:
            shown = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self.file.write(json.dumps(shown) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(name, value, values["step"])
        if self.callback is not None:
            self.callback(values)

    def advance(self, step: int, elapsed: float, loss: float, error: float) -> None:
        if self.bar is None:
            return
        shown = {"loss": f"{loss:.4g}", "error": f"{error:.4g}"}
        if self.seconds is None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.bar.set_postfix({"step": step, **shown}, refresh=False)
            self.bar.update(min(100.0 * max(step / self.steps, elapsed / self.seconds), 100.0) - self.bar.n)

    def picture(self, images: Tensor, step: int) -> None:
        """A grid as samples/step-….png and on the board; rewritten where the run passes this step again."""
        if self.folder is None:
            return
        pixels = png.picture(images)
        (self.folder / "samples").mkdir(exist_ok=True)
        png.write(pixels, self.folder / "samples" / f"step-{step:09d}.png")
        if self.board is not None:
            self.board.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        for each in (self.file, self.board, self.bar):
            if each is not None:
                each.close()


def _cut(path: Path, start: int) -> None:
    """Keep the records up to step `start`."""
    if not path.exists():
        return
    with (
        whole_file(path) as temporary,
        open(path, encoding="utf-8", errors="replace") as old,
        open(temporary, "w", encoding="utf-8") as new,
    ):
        for line in old:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # the line at which the process was killed
            if not isinstance(step, int) or step > start:
                break
            new.write(line)
