"""The stages of a step that may be tried again: their arguments and velocities in buffers of their own.

Each velocity is one tensor before a second combination reads it: a sum of several (guidance, a change of prediction) is
stored by the launch that forms the next argument. So a step is one launch per stage, and no argument is formed of more
than eight tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algebra import Lazy, evaluate, lazy
from .buffers import Packed, Port

__all__ = ["Stages", "tensor_of"]


def is_settled(k: Lazy) -> bool:
    """Whether `k` is a tensor times a number."""
    return len(k.operands) == 1 and type(k.coefficients[0]) is float


def tensor_of(k: Lazy, dtype: torch.dtype) -> Tensor:
    """`k` as a tensor."""
    if is_settled(k) and k.coefficients[0] == 1.0 and k.dtype == dtype:
        return k.operands[0]
    return evaluate(k, dtype=dtype)


class Stages:
    """`ask` for the velocities of a step, one after the other; then `accept` the step, or begin again.

    recorded    for autograd: nothing is written twice
    """

    def __init__(self, field: Callable, x: Tensor, port: Port, stages: int, recorded: bool) -> None:
        self.field, self.like, self.port, self.recorded = field, x, port, recorded
        self.cast = port.dtype is not None and port.dtype != x.dtype
        self.plain = port.slots == 1 and port.scale is None and not self.cast  # the argument is the state
        self.arguments: list[Packed | None] = [None] * stages
        self.velocities: list[Tensor | None] = [None] * stages
        self.next: Tensor | None = None  # the other buffer of the state, where the arguments have their own
        self.last = stages - 1

    def begin(self, t: Any) -> Lazy:
        """The velocity at the start."""
        x = self.like
        if self.plain:
            self.arguments[0] = Packed(x, (x,))
            k = [self._velocity(x, lazy(x), t)]
        else:
            k = []
            self.ask(0, t, lambda: lazy(x), k)
        self.settle(k)
        return k[0]

    def ask(self, place: int, t: Any, point: Callable[[], Lazy], k: list[Lazy], keep: bool = False) -> Tensor | None:
        """Appends the velocity at `point()` to `k`, whose last one is settled on the way; `keep`: the point as well."""
        port, here = self.port, point()
        waiting = None if not k or is_settled(k[-1]) else k[-1]
        factor = None if port.scale is None else port.scale(t)
        argument = here if factor is None else here * factor
        kept: Tensor | None = None
        if self.recorded:
            stored = None if waiting is None else evaluate(waiting, dtype=self.like.dtype)
            whole = evaluate(argument, dtype=port.dtype or self.like.dtype)
            first = whole
            if keep:
                kept = whole if self.plain else evaluate(here, dtype=self.like.dtype)
            if port.slots > 1:
                whole = whole.repeat(port.slots, *(1,) * (whole.dim() - 1))
        else:
            packed = self.arguments[place]
            if packed is None:
                packed = self.arguments[place] = Packed.empty(self.like, port)
            whole, parts = packed
            first = parts[0]
            combinations, outs = [argument] * len(parts), [*parts]
            if keep and self.plain:
                kept = whole
            elif keep:
                kept = self.next = torch.empty_like(self.like) if self.next is None else self.next
                combinations.append(here)
                outs.append(kept)
            stored = None
            if waiting is not None:
                stored = self._buffer(len(k) - 1)
                combinations.append(waiting)
                outs.append(stored)
            if len(outs) == 1:
                evaluate(argument, out=outs[0])
            else:
                evaluate(*combinations, out=tuple(outs))
        if stored is not None:
            k[-1] = lazy(stored)
        # What the network is given may be rounded; the velocity is that of the point itself.
        if kept is not None:
            here = lazy(kept)
        elif self.cast:
            here = point()
        else:
            here = lazy(first) if factor is None else lazy(first) * (1.0 / factor)
        k.append(self._velocity(whole, here, t))
        return kept

    def _velocity(self, argument: Tensor, x: Lazy, t: Any) -> Lazy:
        try:
            return self.field(argument, x, t)
        except (TypeError, ValueError, RuntimeError) as error:
            scalar = "Boolean value of Tensor" in str(error) or "converted to" in str(error)
            if isinstance(t, Tensor) and scalar:
                raise TypeError(
                    "the field, or the guidance, takes its time for a number, but per-sample steps have one time per "
                    'sample; use solvers.dopri5.using(control="batch")'
                ) from error
            raise

    def _buffer(self, place: int) -> Tensor:
        found = self.velocities[place]
        if found is None:
            found = self.velocities[place] = torch.empty_like(self.like)
        return found

    def settle(self, k: list[Lazy]) -> None:
        """Stores the last of `k` where it is not one tensor yet."""
        if is_settled(k[-1]):
            return
        if self.recorded:
            k[-1] = lazy(evaluate(k[-1], dtype=self.like.dtype))
        else:
            k[-1] = lazy(evaluate(k[-1], out=self._buffer(len(k) - 1)))

    def accept(self, x: Tensor, x_next: Tensor, k: Lazy, k_next: Lazy, choice: bool | Tensor) -> tuple[Tensor, Lazy]:
        """The state and its velocity after the step: the new ones, or by sample, `choice` (B,) of 1 and 0."""
        if isinstance(choice, Tensor):
            other = 1.0 - choice
            states, velocities = lazy(x_next) * choice + lazy(x) * other, k_next * choice + k * other
            if self.recorded:
                x_next = evaluate(states, dtype=self.like.dtype)
                k_next = lazy(evaluate(velocities, dtype=self.like.dtype))
            else:
                velocity = self._buffer(self.last)
                evaluate(states, velocities, out=(x_next, velocity))
                k_next = lazy(velocity)
        if not self.recorded:  # what was the last stage is the first of the next step, whose buffers are free
            a, v, last = self.arguments, self.velocities, self.last
            a[0], a[last], v[0], v[last] = a[last], a[0], v[last], v[0]
            if x is self.like:  # the caller's
                self.next = None
                if self.plain:
                    self.arguments[self.last] = None
            else:
                self.next = x
        return x_next, k_next
