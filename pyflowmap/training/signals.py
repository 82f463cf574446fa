"""SIGTERM and SIGINT as a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Stop"]


class Stop:
    """Inside the block the first SIGTERM and the first SIGINT set `.asked`; a second of a kind does what it did before.

    Of a kind: after Ctrl-C the terminal sends SIGINT to every process, and torchrun a SIGTERM after it.
    Outside the main thread, where Python takes no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore(number)

    def __exit__(self, *exception: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _restore(self, number: int) -> None:
        handler = self._before.pop(number)
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
