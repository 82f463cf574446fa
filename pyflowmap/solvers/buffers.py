"""Where a run keeps its tensors: allocated at first use, used again, so that the loop itself allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import Lazy, lazy

__all__ = ["Memory", "Packed", "Port", "Workspace", "flatten", "unflatten"]


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


Free = dict[torch.dtype, list[Tensor]]


class Workspace:
    """The buffers of a run, kept for the next one of the same shape, dtype, device and argument. For one run at a time.

    >>> workspace = Workspace()
    >>> x, y = torch.ones(2, 3), torch.empty(2, 3)
    >>> from pyflowmap.solvers import euler
    >>> euler(lambda x, t: -x, x, [0.0, 0.5, 1.0], out=y, workspace=workspace) is y
    True
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.held: Any = None

    def buffers(self, x: Tensor, port: Port) -> tuple[list[Any], list[Any], list[list[Packed]], Free]:
        """Two states; two arguments that are more than the state; arguments of a step's stages, for even and odd steps;
        what steps remembered, by dtype."""
        key = (x.shape, x.stride(), x.dtype, x.device, port.slots, port.dtype)
        if key != self.key:
            self.key, self.held = key, ([None, None], [None, None], [[], []], {})
        return self.held


class Memory:
    """What a step remembers: a tree of lazies and plain values. Its lazies are evaluated with the next state, in the
    same launch; one that is itself remembered already is kept as it is, not copied."""

    def __init__(self, like: Tensor, free: Free | None = None) -> None:
        self.like, self.free, self.reuse = like, {} if free is None else free, free is not None
        self.held: dict[int, Tensor] = {}  # by id: what the steps may read now
        self.tree: list[Any] = []
        self.now: dict[int, Tensor] = {}
        self.holes: list[tuple[list[Any], int]] = []  # where the evaluated values go
        self.kind: type = tuple
        self.nested = False

    def gather(self, memory: Any) -> tuple[list[Lazy], list[Tensor | None]]:
        """The lazies to evaluate, and a buffer for each (None: allocate). `settle` takes what they became."""
        self.now, self.holes, self.nested, self.kind = {}, [], False, type(memory)
        self.tree = list(memory) if self.kind is tuple or self.kind is list else [memory]
        fresh: list[Lazy] = []
        self._fill(self.tree, fresh)
        return fresh, [self._take(self._dtype(each)) for each in fresh] if self.reuse else [None] * len(fresh)

    def _fill(self, tree: list[Any], fresh: list[Lazy]) -> None:
        for i, each in enumerate(tree):
            kind = type(each)
            if kind is Lazy:
                operands = each.operands
                if len(operands) == 1 and each.coefficients[0] == 1.0 and id(operands[0]) in self.held:
                    self.now[id(operands[0])] = operands[0]
                else:
                    fresh.append(each)
                    self.holes.append((tree, i))
            elif kind is tuple or kind is list:
                self.nested = True
                tree[i] = part = list(each)
                self._fill(part, fresh)

    def _dtype(self, leaf: Lazy) -> torch.dtype:
        """The state's or wider: what a half-precision network returned is kept as it is, a sum of such in full."""
        dtype = leaf.dtype
        if dtype == self.like.dtype or (len(leaf.operands) == 1 and leaf.coefficients[0] == 1.0):
            return dtype
        return torch.promote_types(dtype, self.like.dtype)

    def _take(self, dtype: torch.dtype) -> Tensor:
        free = self.free.get(dtype)
        return free.pop() if free else torch.empty_like(self.like, dtype=dtype)

    def settle(self, values: Any) -> Any:
        """The tree again, with what was computed; buffers that nobody remembers are free."""
        now = self.now
        for (tree, i), value in zip(self.holes, values):
            tree[i] = lazy(value)
            now[id(value)] = value
        before, self.held = self.held, now
        if self.reuse:
            for key, tensor in before.items():
                if key not in now:
                    self.free.setdefault(tensor.dtype, []).append(tensor)
        if self.kind is not tuple and self.kind is not list:
            return self.tree[0]
        return tuple(_tuples(each) for each in self.tree) if self.nested else tuple(self.tree)

    def give_back(self) -> None:
        """The end of a run: nobody remembers anything."""
        for tensor in self.held.values():
            self.free.setdefault(tensor.dtype, []).append(tensor)
        self.held = {}


def _tuples(tree: Any) -> Any:
    return tuple(_tuples(each) for each in tree) if type(tree) is list else tree


class _Leaf:
    """Stands for a lazy in a tree whose tensors are elsewhere."""


def flatten(memory: Any) -> tuple[Any, list[Tensor]]:
    """What `Memory.settle` gave, as the tree and its tensors: what is recomputed takes tensors as arguments."""
    if type(memory) is Lazy:
        return _Leaf, [memory.operands[0]]
    if type(memory) is not tuple:
        return memory, []
    parts = [flatten(each) for each in memory]
    return tuple(tree for tree, _ in parts), [x for _, tensors in parts for x in tensors]


def unflatten(tree: Any, tensors: Any) -> Any:
    """The inverse of `flatten`."""
    rest = iter(tensors)

    def build(part: Any) -> Any:
        if part is _Leaf:
            return lazy(next(rest))
        return tuple(build(each) for each in part) if type(part) is tuple else part

    return build(tree)
