"""How many steps spend a budget of network evaluations: found by running the step without evaluating anything.

A step is lazy, and what it asks for depends on the times alone. So one is run on a tensor that is never read, and its
questions are counted: an end without a velocity, a first step of another order and a path whose linear times do not
begin at 0 are then counted as the run will spend them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..algebra import lazy
from .buffers import Memory

__all__ = ["evaluations", "steps_for"]

_Times = Callable[[int], list[float]]
_known: dict[Any, int] = {}
_MOST_KNOWN = 4096


def evaluations(solver: Any, times: list[float], singular: frozenset[float], like: Tensor | None = None) -> int:
    """Network evaluations of `solver` along the linear times `times`; `like`: a tensor like the state, not read."""
    from .driver import Noise

    x = torch.zeros(()).expand(1, 1) if like is None else like.detach().new_zeros(()).expand(like.shape)
    visits, count = solver.visits(times), 0
    memories, memory = Memory(x), None

    def velocity(argument, *at):
        nonlocal count
        count += 1
        return lazy(x)

    told: Any = velocity
    told.noise, told.times, told.end, told.singular = Noise(0).source(x), visits, visits[-1], singular
    step = solver.configured
    for s, t in pairwise(visits):
        _, returned = step(velocity, lazy(x), s, t, memory)
        fresh, _ = memories.gather(returned)
        memory = memories.settle([x] * len(fresh))
    return count


def steps_for(
    solver: Any, nfe: int, times: _Times, singular: frozenset[float], like: Tensor | None = None, path: Any = None
) -> int:
    """The number of steps that spend exactly `nfe`; `times(steps)` are the linear times of so many steps on `path`.
    Raises ValueError where none does."""

    def spent(steps: int) -> int:
        try:
            key = (solver.step, solver.plan, tuple(solver.options.items()), path, singular, steps)
            found = _known.get(key)
        except TypeError:  # an option or a path that cannot be a key
            return evaluations(solver, times(steps), singular, like)
        if found is None:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            found = _known[key] = evaluations(solver, times(steps), singular, like)
        return found

    # More steps spend more; hardly any step spends nothing.
    steps = 1 + bisect_left(range(1, nfe + 4), nfe, key=spent)
    if spent(steps) == nfe:
        return steps
    near = {k: spent(k) for k in (steps - 1, steps) if k >= 1}
    offers = " or ".join(map(str, near.values()))
    uneven = any(n != k * solver.nfe for k, n in near.items())
    raise ValueError(
        f"nfe = {nfe} can't be met: {solver.name} takes {solver.nfe} evaluations per step"
        f"{', others at the ends of the path' if uneven else ''}; {offers} can"
    )
