"""Counting instead of timing: how many kernels a function launches, and how many bytes they have to move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Traffic", "traffic"]

_NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
}


class Traffic(NamedTuple):
    """launches    operators that compute or copy: neither views nor allocations
    bytes       what they read and write, each operand and result of each operator once
    by_name     launches by operator
    """

    launches: int
    bytes: int
    by_name: dict[str, int]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if not func.is_view and name not in _NO_WORK:
            self.names[name if namespace == "aten" else f"{namespace}::{name}"] += 1
            seen: dict[Any, int] = {}
            for x in tree_leaves((args, kwargs, out)):
                if isinstance(x, Tensor):
                    # An expanded operand is as large as its storage; one that is read and written counts twice.
                    size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                    seen[(x.data_ptr(), x.storage_offset())] = size
            self.bytes += sum(seen.values())
        return out


def traffic(function: Callable[[], Any]) -> Traffic:
    """What `function()` launches and moves, by torch's operators as they are called. Compiled code is one launch to it.

    >>> x = torch.zeros(1000)
    >>> traffic(lambda: (x + 1.0).view(10, 100)).launches
    1
    """
    with _Counter() as counter:
        function()
    return Traffic(sum(counter.names.values()), counter.bytes, dict(counter.names.most_common()))
