"""`Solver`: one step and what is known of it; and the grid of times that it walks along."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..algebra import lazy

__all__ = ["Solver", "solver", "time_grid"]


@dataclass(frozen=True)
class Solver:
    """A step and what is known of it. Called as `heun(velocity, x, grid)` it runs under `integrate`.

    step        step(velocity, x, s, t, memory, **options) -> x_next, memory; see `pyflowmap.solvers`
    order       of convergence; None: exact up to the model, or convergent in distribution only
    nfe         network evaluations per step, once its history is full; None: not known
    starting    further evaluations by which the first steps fill the history (multistep solvers)
    takes       "velocity", or "jump": what the step's first argument is
    stochastic  whether it draws noise
    nodes       nodes(s, t, **options): the times inside a step at which it asks the network, beside s and t
    plan        plan(times, **options): the times that it visits for a grid, where not the grid itself; None as usual
    loop        its own loop in place of the driver's, for adaptive solvers
    check       check(**options): raises for options out of range
    options     the step's keyword options; `using` changes them
    """

    step: Callable
    name: str
    order: int | None
    nfe: int | None
    starting: int = 0
    takes: str = "velocity"
    stochastic: bool = False
    nodes: Callable[..., Sequence[float]] | None = None
    plan: Callable[..., list[float]] | None = None
    loop: Callable | None = None
    check: Callable | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.takes not in ("velocity", "jump"):
            raise ValueError(f'takes = {self.takes!r}; a step takes "velocity" or "jump"')

    def using(self, **options: Any) -> Solver:
        """The same solver with other options, e.g. `heun_alpha.using(alpha=0.5)`. Raises for unknown ones."""
        unknown = next((name for name in options if name not in self.options), None)
        if unknown is not None:
            known = f"it has {', '.join(self.options)}" if self.options else "it has none"
            raise TypeError(f"{self.name} has no option {unknown!r}; {known}")
        chosen = {**self.options, **options}
        if self.check is not None:
            self.check(**chosen)
        made = replace(self, options=chosen)
        object.__setattr__(made, "__doc__", self.__doc__)
        return made

    @property
    def configured(self) -> Callable:
        """The step with its options filled in."""
        return partial(self.step, **self.options) if self.options else self.step

    def visits(self, times: list[float]) -> list[float]:
        """The times in the order of the steps."""
        return times if self.plan is None else self.plan(times, **self.options)

    def asks(self, times: list[float]) -> list[float]:
        """Every time at which the network may be asked, each once."""
        inside: list[float] = []
        if self.nodes is not None:
            for s, t in pairwise(times):
                inside.extend(self.nodes(s, t, **self.options))
        return list(dict.fromkeys([*times, *inside]))

    def steps_for(
        self,
        nfe: int,
        times: Callable[[int], list[float]] | None = None,
        singular: frozenset[float] = frozenset(),
        like: Tensor | None = None,
        path: Any = None,
    ) -> int:
        """The number of steps that spend exactly `nfe` network evaluations; raises ValueError where none does.

        `times(steps)` are the linear times of so many steps on the interpolant `path`, equal ones if None; `singular`
        those without a velocity; `like` a tensor like the state, which is not read.
        """
        from . import budget

        if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
            raise ValueError(f"nfe = {nfe!r}; it is a whole number, at least 1")
        if self.loop is not None:
            raise ValueError(f"{self.name} chooses its own steps; bound it by max_nfe instead of nfe")
        if self.nfe is None:
            raise ValueError(
                f"nfe = {nfe}, but how many evaluations {self.name} takes per step is not known; pass steps, or say so "
                "by pfm.solvers.solver(nfe=2)(step)"
            )
        if self.plan is not None and len(self.visits([0.0, 0.5, 1.0])) != 3:
            raise ValueError(f"{self.name} visits more times than its grid has, so nfe = {nfe} is not met; pass steps")
        return budget.steps_for(self, nfe, times or _equal, singular, like, path)

    def __call__(self, field: Callable, x: Tensor, grid: Sequence[float] | Tensor, **options: Any) -> Any:
        """Integrate `field`: velocity(x, t) -> tensor, or jump(x, s, t) -> tensor, along `grid`. See `integrate`.

        Keywords are the solver's own options or those of `integrate`.
        """
        from .driver import integrate

        unknown = next((name for name in options if name not in self.options and name not in _keywords()), None)
        if unknown is not None:
            self.using(**{unknown: None})
        own = {name: options.pop(name) for name in self.options if name in options}
        made = self.using(**own) if own else self
        return integrate(made, partial(_asked, field), x, grid, **options)


def _equal(steps: int) -> list[float]:
    return [k / steps for k in range(steps + 1)]


@lru_cache(maxsize=1)
def _keywords() -> frozenset[str]:
    """What `integrate` takes by keyword."""
    from .driver import integrate

    return frozenset(inspect.signature(integrate).parameters)


def solver(*, order: int | None = None, nfe: int = 1, **known: Any) -> Callable[[Callable], Solver]:
    """Decorator that makes a Solver of a step function; its keyword-only parameters are the solver's options."""

    def wrap(step: Callable) -> Solver:
        keywords = inspect.signature(step).parameters.values()
        options = {each.name: each.default for each in keywords if each.kind is inspect.Parameter.KEYWORD_ONLY}
        made = Solver(step, step.__name__, order, nfe, options=options, **known)
        object.__setattr__(made, "__doc__", step.__doc__)
        return made

    return wrap


def _asked(field: Callable, argument: Tensor, x: Any, *at: Any) -> Any:
    """What the caller's field gives, as a lazy."""
    value = field(argument, *at)
    if not isinstance(value, Tensor):
        raise TypeError(f"the field returned {type(value).__name__}; it is field(x, t) -> tensor of the shape of x")
    return lazy(value)


def time_grid(grid: Sequence[float] | Tensor) -> list[float]:
    """`grid` as Python floats, once. Raises unless it is strictly monotone, finite, of two or more times."""
    times: list[float]
    if type(grid) is list and all([type(t) is float for t in grid]):  # noqa: C419  the commonest, in a microsecond
        times = list(grid)
    else:
        values = grid.detach().double().cpu().tolist() if isinstance(grid, Tensor) else grid
        try:
            times = [float(t) for t in values]
        except TypeError:
            times = []
    if len(times) < 2:
        raise ValueError(f"grid = {grid}; it is one row of at least two times, e.g. [0.0, 0.5, 1.0]")
    bad = next((t for t in times if not math.isfinite(t)), None)
    if bad is not None:
        raise ValueError(f"grid contains {bad}; times are finite, 0 = noise to 1 = data")
    steps = [b - a for a, b in pairwise(times)]
    if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise ValueError(f"grid {_short(times)} is not strictly monotone; each time must lie beyond the one before")
    return times


def _short(times: list[float]) -> str:
    shown = ", ".join(f"{t:.6g}" for t in times[:6])
    return f"[{shown}{', ...' if len(times) > 6 else ''}]"
