"""ERK guidance: the embedded pair of Heun's method shows the stiff direction, at no further evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..algebra import Lazy
from .guidance import Around, Ask, Guidance, finite
from .space import check_space, products

__all__ = ["erk"]


@dataclass(frozen=True)
class erk(Around):
    """ERK guidance of Heun's method (ICLR 2026, "Error as Signal", ERK-Guid): sharpens along the stiff direction.

    Each step ends in two points of one time: Euler's, where Heun asked for its second slope, and Heun's, where the next
    step asks for its first. With the slopes f_E and f there, and the next step from s to t,

        rho = ||f - f_E||/||x - x_E||,   e = (f - f_E)/||f - f_E||,   z = scale |t - s| rho
        x_t = heun(x_s) + (t - s) z^2 <e, f> e      where rho > threshold

    scale      the paper's w_stiff; 0 is none
    threshold  the paper's w_con, on rho
    of         a guidance whose velocity f is, e.g. cfg(3.0, null=...); None: the network's
    space      "velocity": f = dx/dt, the equation that `solvers.heun` integrates; "noise", the paper's variables:
               f = dy/dS = eps, x/t in the place of x and S = (1-t)/t in the place of time, and threshold in
               those units. There is no data space

    With solver="heun" only: others never ask twice at one time. The first step, and a last one that is Euler's, are as
    they are. One reduction launch per step.

    >>> erk(1.0).remembers
    True
    """

    scale: float
    threshold: float = 0.5
    of: Guidance | None = None
    space: str = "velocity"
    _before: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        finite("scale", self.scale, "1.0", at_least=0.0)
        finite("threshold", self.threshold, "0.5", at_least=0.0)
        check_space("erk", self.space, ("velocity", "noise"))

    @property
    def remembers(self) -> bool:
        return True

    @property
    def singular(self) -> frozenset[float]:
        return self.inner.singular | (frozenset((0.0,)) if self.space == "noise" else frozenset())  # S is infinite

    def check(self, solver: Any, grad: bool | str = False) -> None:
        if solver.name != "heun" or solver.takes != "velocity":
            raise ValueError(
                f"erk compares the two evaluations that Heun makes at one time, and {solver.name} makes no such pair; "
                'it goes with pfm.sample(solver="heun") only'
            )
        super().check(solver, grad)

    def begin(self) -> Guidance:
        return replace(self, of=None if self.of is None else self.of.begin())

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        guided = self.inner(ask, x, s, t)
        if self.scale == 0.0:
            return guided
        if not self._before:  # the first slope of the first step
            self._before[:] = "second", s, None
            return guided
        expected, time, kept = self._before
        if (s is not t and s != t) or (s == time) == (expected == "second"):
            raise ValueError(
                f'erk was asked at t = {s:g} after t = {time:g}, which is not how Heun asks; use solver="heun"'
            )
        if expected == "first":
            self._before[:] = "second", s, self._stiff(guided, x, s, *kept)
            return guided
        self._before[:] = "first", s, (guided, x)
        if kept is None:
            return guided
        difference, size = kept  # heun takes (t - s)/2 of this slope, so twice the correction
        h = s - time if self.space == "velocity" else (s - time) / (s * time)
        return guided + (2.0 * h * h * size) * difference

    def _stiff(self, v: Lazy, x: Lazy, s: float, v_euler: Lazy, x_euler: Lazy) -> tuple[Lazy, torch.Tensor]:
        """f - f_E, and what multiplies it: (scale rho)^2 <e, f>/||f - f_E||, in units of the velocity."""
        noise = self.space == "noise"
        f, apart = (x - s * v, x - x_euler) if noise else (v, x - x_euler)
        difference = f - (x_euler - s * v_euler) if noise else v - v_euler
        gram, _, _ = products(difference, apart, f)
        steep, far = gram[:, 0, 0], gram[:, 1, 1]
        if noise:
            far = far / (s * s)  # of y = x/s
        # ||f - f_E|| cancels: (scale rho)^2 <e, f> e = scale^2 <f - f_E, f>/||x - x_E||^2 (f - f_E)
        stiff = (steep > self.threshold**2 * far) & (far > 0.0)
        size = self.scale**2 * gram[:, 0, 2] / torch.where(stiff, far, 1.0)
        size = torch.where(stiff, size, 0.0)
        return difference, -size / s if noise else size
