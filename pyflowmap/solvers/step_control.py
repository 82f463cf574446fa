"""How long a step may be: Hairer's first step and the controller, on the host in float64, for the batch or per sample.

The lengths are one number per group of samples: the whole batch, or every sample by itself. A sample's numbers are then
functions of that sample alone, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Plan", "StepControl"]

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_SPACING = 16 * np.finfo(np.float64).eps  # a step below so many of time's last places moves nothing


class Plan(NamedTuple):
    """One step to try."""

    h: Any  # signed, float or (B,) float64; 0 for samples that wait
    times: list  # of the stages: floats, or (B,) tensors


def _numbers(x: Tensor) -> np.ndarray:
    """Also under torch.func.grad and jvp, to which the lengths of steps are constants."""
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(x):
        return x.numpy()
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise RuntimeError(
                "torch.vmap of an adaptive solver: the lengths of its steps are numbers read from the states; give it "
                'the batch as one state, or use a fixed grid, e.g. solver="heun"'
            )
        x = functorch.get_unwrapped(x)
    return np.array([each.item() for each in x.unbind()])  # numpy() would be wrapped again


class StepControl:
    def __init__(self, x: Tensor, start: float, end: float, per_sample: bool, order: int) -> None:
        rows = x.shape[0]
        groups = rows if per_sample else 1
        self.per_sample, self.exponent, self.end = per_sample, -1.0 / order, end
        self.sign = 1.0 if end > start else -1.0
        self.device = x.device
        self.time_type = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.columns = x.numel() // max(rows, 1)
        self.start, self.goal = start, end
        self.t: np.ndarray = np.full(groups, start)
        self.h: np.ndarray = np.zeros(groups)  # lengths, without sign
        self.size, self.hits = self.h, np.zeros(groups, dtype=bool)
        self.stuck = np.zeros(groups, dtype=bool)
        self.active = np.ones(groups, dtype=bool)
        self.lost = np.zeros(rows, dtype=bool)  # not finite
        self.accepted = np.zeros(groups, dtype=np.int64)
        self.rejected = np.zeros(groups, dtype=np.int64)

    # ---- the first step ----------------------------------------------------------------------------------------------

    def guess(self, of_x: Tensor, of_velocity: Tensor) -> np.ndarray:
        """h0 = 0.01 |x| / |v|, in tolerances: a first length at which to look at how the velocity turns."""
        self.sizes = self._norms(of_x), self._norms(of_velocity)
        d0, d1 = self.sizes
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = np.where(small, 1e-6, 0.01 * d0 / np.where(small, 1.0, d1))
        return np.minimum(h0, abs(self.end - self.start))

    def begin(self, h0: np.ndarray, of_change: Tensor) -> None:
        """h1 with h1^order max(|v|, |v'|) = 0.01, at most 100 h0."""
        largest = np.maximum(self.sizes[1], self._norms(of_change) / h0)
        flat = largest <= 1e-15
        h1 = np.where(flat, np.maximum(1e-6, 1e-3 * h0), (0.01 / np.where(flat, 1.0, largest)) ** -self.exponent)
        self.h = np.minimum(100.0 * h0, h1)

    def look(self, of_velocity: Tensor) -> None:
        """Notes the samples that begin without a finite velocity."""
        self._norms(of_velocity)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def aim(self, goal: float) -> None:
        """The next time to arrive at."""
        self.goal = goal
        self._look()

    def _look(self) -> None:
        far = self.t != self.goal
        least = _SPACING * np.maximum(np.abs(self.t), abs(self.goal))
        self.stuck |= far & (self.h <= least) & (np.abs(self.goal - self.t) > least)
        self.active = far & ~self.stuck & ~(self.lost if self.per_sample else self.lost.all())

    def propose(self) -> np.ndarray:
        """The signed lengths to try: never beyond the goal, which is hit exactly."""
        rest = np.abs(self.goal - self.t)
        self.hits = self.h >= rest * (1.0 - 1e-10)
        self.size = np.where(self.hits, rest, self.h)
        return self.sign * np.where(self.active, self.size, 0.0)

    def plan(self, h: np.ndarray, nodes: tuple[float, ...]) -> Plan:
        """`h` and the times of the stages, where they are needed: in one transfer."""
        if not self.per_sample:
            t, length = float(self.t[0]), float(h[0])
            end = self.goal if bool(self.hits[0]) and length != 0.0 else t + length
            return Plan(length, [end if c == 1.0 else t + c * length for c in nodes])
        ends = np.where(self.hits & (h != 0.0), self.goal, self.t + h)
        rows = [h, *(ends if c == 1.0 else self.t + c * h for c in nodes)]
        table = torch.from_numpy(np.stack(rows)).to(self.device)
        return Plan(table[0], list(table[1:].to(self.time_type)))

    def judge(self, sums: Tensor) -> bool | Tensor:
        """What becomes of the step: True where all take it, False where none does, else (B,) of 1 and 0."""
        active = self.active
        r = self._norms(sums)
        taken = active & (r <= 1.0)  # False where r is NaN
        missed = active & (r > 1.0)
        with np.errstate(divide="ignore"):
            factor = np.clip(_SAFETY * np.power(r, self.exponent), np.where(r < 1.0, 1.0, _SHRINK), _GROW)
        longer = self.size * factor
        # A step that was cut short to hit a time says little against the length that was proposed.
        longer = np.where(taken & self.hits, np.maximum(longer, self.h), longer)
        self.h = np.where(taken | missed, longer, self.h)
        self.t = np.where(taken, np.where(self.hits, self.goal, self.t + self.sign * self.size), self.t)
        self.accepted += taken
        self.rejected += missed
        self._look()
        if not taken.any():
            return False
        stays = active & ~taken  # samples that wait are where the step leads: its length was 0
        return torch.from_numpy(np.where(stays, 0.0, 1.0)).to(self.device) if stays.any() else True

    def _norms(self, sums: Tensor) -> np.ndarray:
        """Root mean squares per group; samples that are not finite are noted, and left out."""
        values = _numbers(sums.detach().to("cpu", torch.float64))
        with np.errstate(invalid="ignore"):
            self.lost |= ~np.isfinite(values)
        if self.per_sample:
            return np.sqrt(np.where(self.lost, np.nan, values) / self.columns)
        fine = values[~self.lost]
        return np.sqrt(fine.sum(keepdims=True) / (self.columns * max(len(fine), 1)))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def slowest(self) -> float:
        """The time that all samples have reached, but those that stopped for good."""
        going = ~self.lost if self.per_sample and not self.lost.all() else slice(None)
        return float((self.sign * self.t[going]).min() * self.sign)

    def leap(self, to: float) -> tuple[Any, np.ndarray]:
        """The signed length of a step from the goal straight to `to`, 0 for samples that are not there; and the times
        that it reaches."""
        h = np.where(self.t == self.goal, to - self.t, 0.0)
        length = torch.from_numpy(h).to(self.device) if self.per_sample else float(h[0])
        return length, np.where(h != 0.0, to, self.t)

    def finish(self, end: float) -> None:
        """The samples that have arrived took a last step to `end`."""
        self.t, self.end = np.where(self.t == self.goal, end, self.t), end

    def marks(self) -> Tensor | None:
        """(B,) of 1, and NaN for the samples that are not finite; None where all are."""
        if not self.lost.any():
            return None
        return torch.from_numpy(np.where(self.lost, np.nan, 1.0)).to(self.device)

    def outcome(self) -> tuple[Tensor, Any, Any, Any]:
        """converged, accepted, rejected, t; see `Adaptive`."""
        converged = torch.from_numpy((self.t == self.end) & ~self.lost).to(self.device)
        found: list[Any] = [self.accepted, self.rejected, self.t]
        found = [torch.from_numpy(each).to(self.device) if self.per_sample else each[0].item() for each in found]
        return converged, found[0], found[1], found[2]
