"""Where a run keeps its tensors: allocated at first use, used again, so that the loop itself allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import Lazy, lazy

__all__ = ["Memory", "Packed", "Port"]


class Port(NamedTuple):
    """How the network wants its argument.

    The solver works on the linear path, x = t x1 + (1-t) x0, with the state x. Any other path is that one after
    x = X/(alpha+sigma), t = alpha/(alpha+sigma), where X is the state as the network knows it: X = scale(t) x.
    """

    slots: int = 1  # copies of the batch in one argument: for several conditions in one network call
    dtype: torch.dtype | None = None  # of the argument; None: the state's
    scale: Callable[[float], float] | None = None  # None: 1, the linear path
    singular: frozenset[float] = frozenset()  # times at which the field has no velocity (0/0)


class Packed(NamedTuple):
    """A network's argument: the whole, and the parts that one launch writes."""

    whole: Tensor
    parts: tuple[Tensor, ...]

    @classmethod
    def empty(cls, like: Tensor, port: Port) -> Packed:
        dtype = port.dtype or like.dtype
        if port.slots == 1:
            whole = torch.empty_like(like, dtype=dtype)
            return cls(whole, (whole,))
        shape = (port.slots * like.shape[0], *like.shape[1:])
        order = torch.contiguous_format
        if not like.is_contiguous():
            for dims, format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
                if like.dim() == dims and like.is_contiguous(memory_format=format):
                    order = format
        whole = torch.empty(shape, dtype=dtype, device=like.device, memory_format=order)
        return cls(whole, whole.chunk(port.slots) if like.shape[0] else (whole,) * port.slots)


_LEAF = object()


class Memory:
    """What a step remembers: a tree of lazies and plain values. Its lazies are evaluated with the next state, in the
    same launch; one that is itself remembered already is kept as it is, not copied."""

    def __init__(self, like: Tensor, reuse: bool) -> None:
        self.like, self.reuse = like, reuse
        self.held: dict[int, Tensor] = {}  # by id: what the steps may read now
        self.free: dict[torch.dtype, list[Tensor]] = {}
        self.shape: Any = None

    def gather(self, memory: Any) -> tuple[list[Lazy], list[Tensor | None], list[Any]]:
        """The lazies to evaluate, a buffer for each (None: allocate), and all leaves in order: tensor or None."""
        leaves: list[Lazy] = []
        self.shape = _strip(memory, leaves)
        fresh: list[Lazy] = []
        kept: list[Any] = []
        for each in leaves:
            operand = each.operands[0] if len(each.operands) == 1 and each.coefficients[0] == 1.0 else None
            if operand is not None and id(operand) in self.held:
                kept.append(operand)
            else:
                kept.append(None)
                fresh.append(each)
        return fresh, [self._take(self._dtype(each)) for each in fresh], kept

    def _dtype(self, leaf: Lazy) -> torch.dtype:
        """The state's or wider: what a half-precision network returned is kept as it is, a sum of such in full."""
        bare = len(leaf.operands) == 1 and leaf.coefficients[0] == 1.0
        return leaf.dtype if bare else torch.promote_types(leaf.dtype, self.like.dtype)

    def _take(self, dtype: torch.dtype) -> Tensor | None:
        if not self.reuse:
            return None
        free = self.free.get(dtype)
        return free.pop() if free else torch.empty_like(self.like, dtype=dtype)

    def settle(self, values: Any, kept: list[Any]) -> Any:
        """The tree again, with what was computed; buffers that nobody remembers are free."""
        value = iter(values)
        now = [next(value) if each is None else each for each in kept]
        before, self.held = self.held, {id(each): each for each in now}
        if self.reuse:
            for key, tensor in before.items():
                if key not in self.held:
                    self.free.setdefault(tensor.dtype, []).append(tensor)
        return _restore(self.shape, iter([lazy(each) for each in now]))


def _strip(memory: Any, leaves: list[Lazy]) -> Any:
    """The shape of `memory`, its lazies moved to `leaves`."""
    if type(memory) is Lazy:
        leaves.append(memory)
        return _LEAF
    if type(memory) is tuple or type(memory) is list:
        return tuple([_strip(each, leaves) for each in memory])
    return memory


def _restore(shape: Any, leaves: Any) -> Any:
    if shape is _LEAF:
        return next(leaves)
    if type(shape) is tuple:
        return tuple([_restore(each, leaves) for each in shape])
    return shape
