"""The one timer of all benches: contestants take turns, and what counts is the ratio within a round.

A machine drifts (clock, neighbours, memory placement) by more than the differences we care about, but slowly: measured
within a few milliseconds of each other, two contestants see the same machine. So a round runs every contestant once, in
an order that changes from round to round; the ratio is taken per round, and its median reported with the spread.
A sample is one call, or for calls shorter than `SAMPLE_SECONDS` the mean over a fixed number of calls.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch

from .case import build, check

__all__ = ["Measurement", "measure", "seconds_per_case"]

SAMPLE_SECONDS = 1e-3  # of a sample, at least: the clock vanishes in it, drift does not enter
WARM_SECONDS = 0.15  # of each contestant before it counts: caches, page faults, the clock's ramp
LEAST_ROUNDS, MOST_ROUNDS = 15, 400


def seconds_per_case(default: float = 5.0) -> float:
    """Measuring time of a case, without building and compiling it: `PYFLOWMAP_BENCH_SECONDS`, or the default."""
    text = os.environ.get("PYFLOWMAP_BENCH_SECONDS", "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = math.nan
    if not seconds > 0.0:
        raise ValueError(f"PYFLOWMAP_BENCH_SECONDS={text!r} is not a number of seconds above 0; try 5")
    return seconds


def _sample(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    turns = repeat(None, calls)
    start = time.perf_counter()
    for _ in turns:
        run()
    return (time.perf_counter() - start) / calls


@contextmanager
def _quiet(threads: int | None):
    """No garbage collection inside a sample, and the asked number of threads."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _spread(ratios: list[float]) -> dict[str, float]:
    """One stolen time slice makes an extreme, so tables show the middle nine tenths; the extremes are kept."""
    ordered = sorted(ratios)
    place = lambda part: ordered[round(part * (len(ordered) - 1))]  # noqa: E731
    return {
        "median": statistics.median(ordered),
        "low": place(0.05),
        "high": place(0.95),
        "min": ordered[0],
        "max": ordered[-1],
    }


class Measurement:
    """One case, checked and warmed up. `round()` takes one sample of each contestant, `result()` says what came out."""

    def __init__(self, name: str, seconds: float | None = None) -> None:
        self.name = name
        self.group, self.title, self.case = build(name)
        self.seconds = seconds_per_case() if seconds is None else seconds
        self.threads = self.case.threads or torch.get_num_threads()
        with self.quiet():
            check(name, self.case)
            self.calls = [self._warm_up(c.run) for c in self.case.contestants]
            self.samples: list[list[float]] = [[] for _ in self.case.contestants]
            self.round()
            once = sum(s[0] * n for s, n in zip(self.samples, self.calls))
        self.rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(self.seconds / once)))
        self.samples = [[] for _ in self.case.contestants]

    def _warm_up(self, run: Callable[[], Any]) -> int:
        """Runs for WARM_SECONDS (less in a short bench) and returns the calls that make a sample."""
        until = time.perf_counter() + min(WARM_SECONDS, self.seconds / 20)
        calls = 1
        while True:
            took = _sample(run, calls)
            if took * calls < SAMPLE_SECONDS / 2 and calls < 1 << 20:
                calls *= 2
            elif time.perf_counter() > until:
                return max(1, round(SAMPLE_SECONDS / took))

    def quiet(self):
        """The context in which rounds are taken."""
        return _quiet(self.case.threads)

    def round(self) -> None:
        """One sample of each contestant."""
        order = list(range(len(self.calls)))
        random.Random(len(self.samples[0])).shuffle(order)
        for i in order:
            self.samples[i].append(_sample(self.case.contestants[i].run, self.calls[i]))

    def run(self) -> dict[str, Any]:
        with self.quiet():
            for _ in range(self.rounds):
                self.round()
        return self.result()

    def result(self) -> dict[str, Any]:
        """Plain data: every sample (seconds per call), and of each peer the ratio to ours per round."""
        rows = []
        for i, contestant in enumerate(self.case.contestants):
            seconds = self.samples[i]
            row: dict[str, Any] = {
                "name": contestant.name,
                "role": "ours" if i == 0 else contestant.role,
                "note": contestant.note,
                "calls_per_sample": self.calls[i],
                "median_s": statistics.median(seconds),
                "samples_s": [float(f"{s:.5g}") for s in seconds],
            }
            if i > 0:
                ratios = [theirs / ours for theirs, ours in zip(seconds, self.samples[0])]
                row["ratio"] = _spread(ratios)
                if contestant.target is not None:
                    target = contestant.target
                    met = target.met(row["ratio"]["median"])
                    row["target"] = {"faster": target.faster, "slower": target.slower, "met": met}
            rows.append(row)
        return {
            "case": self.name,
            "group": self.group,
            "title": self.title,
            "note": self.case.note,
            "shapes": {key: list(shape) for key, shape in self.case.shapes.items()},
            "threads": self.threads,
            "traffic_bytes": self.case.traffic,
            "per": self.case.per,
            "rounds": len(self.samples[0]),
            "contestants": rows,
            "skipped": [{"name": s.name, "reason": s.reason} for s in self.case.skipped],
        }


def measure(name: str, seconds: float | None = None) -> dict[str, Any]:
    """Builds, checks and measures one case."""
    return Measurement(name, seconds).run()
