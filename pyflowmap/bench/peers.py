"""What several cases compare with: a copy of the same bytes, and the compiler where it works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Contestant, Skipped, Target

__all__ = ["bytes_of", "compiled", "copy_of"]


def bytes_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def copy_of(traffic: int, pool: Sequence[Tensor], target: Target | None = None) -> Contestant:
    """torch's copy_ of `traffic` bytes, half read and half written, between the dense tensors of the case itself.

    The case's own tensors, so that a case which fits into the cache is compared with a copy that does. With a pool of
    tensors smaller than the traffic the copy goes around it.
    """
    flat = [x.view(-1).view(torch.uint8) for x in pool if x.is_contiguous()]
    left, pairs, place = traffic // 2, [], 0
    while left > 0:
        source, to = flat[place % len(flat)], flat[(place + len(flat) // 2) % len(flat)]
        size = min(left, source.numel(), to.numel())
        pairs.append((to[:size], source[:size]))
        left, place = left - size, place + 1

    def run() -> None:
        for to, source in pairs:
            to.copy_(source)

    return Contestant("copy of the same bytes", run, target, role="limit", note="torch copy_, as much read as written")


def compiled(
    name: str, make: Callable[[Callable[..., Any]], Callable[[], Any]], target: Target | None = None, note: str = ""
) -> tuple[list[Contestant], list[Skipped]]:
    """`make(torch.compile)` gives the contestant's run; it is skipped where the compiler does not work."""
    torch._dynamo.reset()
    try:
        run = make(lambda function: torch.compile(function, fullgraph=True, dynamic=False))
        run()
    except Exception as error:  # of many kinds: no C++ compiler, an unsupported Python, a backend failure
        return [], [Skipped(name, f"torch.compile failed here: {str(error).splitlines()[0][:120]}")]
    return [Contestant(name, run, target, note=note)], []
