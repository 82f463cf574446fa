"""What is measured: a case holds contestants that compute the same thing, ours first, each ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Contestant", "Skipped", "Target", "build", "case", "groups", "names"]


@dataclass(frozen=True)
class Target:
    """What we ask of ours beside a peer: `faster` = peer time / our time at least, or `slower` = our / peer at most."""

    faster: float | None = None
    slower: float | None = None

    def __post_init__(self):
        if (self.faster is None) == (self.slower is None):
            raise ValueError(f"a target is either faster or slower, got {self}")

    def met(self, speedup: float) -> bool:
        return speedup >= self.faster if self.faster is not None else 1.0 / speedup <= self.slower  # type: ignore


@dataclass(frozen=True)
class Contestant:
    """One way to compute the case's result. `run` takes nothing and returns the tensors that it computed.

    role   "peer", or "limit" for what no implementation can beat (a copy of the same bytes): its result is not compared
    """

    name: str
    run: Callable[[], Any]
    target: Target | None = None
    role: str = "peer"
    note: str = ""


@dataclass(frozen=True)
class Skipped(Exception):
    """A contestant that cannot run here, and why. It stays in the results, so that nothing is left out in silence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    contestants: Sequence[Contestant]  # ours first
    shapes: Mapping[str, Sequence[int]]
    traffic: int | None = None  # bytes that the contract reads and writes; None where memory is not the limit
    per: tuple[int, str] | None = None  # print times per this many things: (elements, "element")
    skipped: Sequence[Skipped] = ()
    tolerance: float = 1e-5  # of the results, relative to the largest value
    threads: int | None = None
    note: str = ""


_builders: dict[str, tuple[str, str, Callable[[], Case]]] = {}


def case(group: str, name: str, title: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Decorator that registers a function which builds a case; buffers exist only while it is measured."""

    def register(builder: Callable[[], Case]) -> Callable[[], Case]:
        if name in _builders:
            raise ValueError(f"the bench case {name!r} exists twice")
        _builders[name] = (group, title, builder)
        return builder

    return register


def names(group: str | None = None) -> list[str]:
    return [name for name, (own, _, _) in _builders.items() if group in (None, own)]


def groups() -> list[str]:
    return list(dict.fromkeys(group for group, _, _ in _builders.values()))


def build(name: str) -> tuple[str, str, Case]:
    """(group, title, case). Inputs are the same in every run."""
    if name not in _builders:
        raise ValueError(f"there is no bench case {name!r}; there are {', '.join(_builders)}")
    group, title, builder = _builders[name]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return group, title, builder()
    finally:
        torch.set_rng_state(state)


# ---- that the contestants agree -------------------------------------------------------------------------------------


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)
    elif result is not None:
        raise TypeError(f"a contestant returns tensors, got {type(result).__name__}")


def _fresh_results(contestant: Contestant) -> list[Tensor]:
    """What it computes from poisoned buffers, copied: contestants share buffers, so that none has warmer memory."""
    for x in _tensors(contestant.run()):
        if not x.requires_grad:
            x.fill_(float("nan"))  # what it does not write must not look right
    return [x.detach().double().clone() for x in _tensors(contestant.run())]


def check(name: str, made: Case) -> None:
    """Raises unless all contestants compute the same, each starting from poisoned buffers."""
    ours, *peers = made.contestants
    before = _fresh_results(ours)
    for peer in peers:
        if peer.role != "peer":
            continue
        theirs = _fresh_results(peer)
        if len(theirs) != len(before):
            raise RuntimeError(f"bench {name}: {peer.name} computes {len(theirs)} tensors, {ours.name} {len(before)}")
        for i, (a, b) in enumerate(zip(before, theirs)):
            error, scale = (a - b).abs().max().item(), max(a.abs().max().item(), 1e-30)
            if not error <= made.tolerance * scale:
                raise RuntimeError(
                    f"bench {name}: {peer.name} and {ours.name} differ in result {i} by {error:.3g} "
                    f"(largest value {scale:.3g}, tolerance {made.tolerance:g})"
                )
