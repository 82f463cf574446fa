"""Solver updates: four tensors in, two out. Memory is the limit, so the limit is a copy of the same bytes.

gu = u + 3 (c - u)                     guided velocity, kept as history
o  = x + 0.075 gu - 0.025 p            two-step Adams-Bashforth
"""

from __future__ import annotations

import torch

import pyflowmap as pfm

from .case import Case, Contestant, Target, case
from .peers import bytes_of, compiled, copy_of

GUIDANCE, NEW, OLD = 3.0, 0.075, -0.025
SMALL, LARGE = (4, 16, 128, 128), (8, 64, 128, 128)  # 6 tensors of 4 MB and of 32 MB


def _update(x, c, u, p):
    """In the algebra, as one writes it."""
    x, c, u, p = (pfm.lazy(each) for each in (x, c, u, p))
    gu = u + GUIDANCE * (c - u)
    return x + NEW * gu + OLD * p, gu


def _preallocated(shape: tuple[int, ...], direct: bool = False) -> Case:
    """`direct`: the call of the kernel stands first, and the algebra beside it."""
    x, c, u, p, o, g = (torch.randn(shape) for _ in range(6))

    def ours():
        return pfm.evaluate(*_update(x, c, u, p), out=(o, g))

    matrix = ((1.0, NEW * GUIDANCE, NEW * (1.0 - GUIDANCE), OLD), (0.0, GUIDANCE, 1.0 - GUIDANCE, 0.0))

    def operation():
        return pfm.ops.combine((x, c, u, p), matrix, out=(o, g))

    def eager():
        torch.sub(c, u, out=g)
        torch.add(u, g, alpha=GUIDANCE, out=g)
        torch.add(x, g, alpha=NEW, out=o)
        torch.add(o, p, alpha=OLD, out=o)
        return o, g

    def eager_lerp():
        torch.lerp(u, c, GUIDANCE, out=g)
        torch.add(x, g, alpha=NEW, out=o)
        torch.add(o, p, alpha=OLD, out=o)
        return o, g

    def with_compiler(compile):
        def plain(x, c, u, p, o, g):
            gu = u + GUIDANCE * (c - u)
            g.copy_(gu)
            o.copy_(x + NEW * gu + OLD * p)

        function = compile(plain)

        def run():
            function(x, c, u, p, o, g)
            return o, g

        return run

    made, skipped = compiled("torch.compile, outputs given", with_compiler, Target(faster=1.05))
    traffic = bytes_of(x, c, u, p, o, g)
    own = [
        Contestant("evaluate(out=)", ours),
        Contestant("ops.combine(out=)", operation, note="ours too, coefficients multiplied out before"),
    ]
    return Case(
        [
            *(reversed(own) if direct else own),
            copy_of(traffic, (x, c, u, o, g, o), Target(faster=0.95)),
            Contestant("eager out=, 4 ops", eager, Target(faster=1.9), note="12 passes; 2.0 by passes"),
            Contestant("eager out=, lerp, 3 ops", eager_lerp, note="9 passes; 1.5 by passes"),
            *made,
        ],
        {"x, c, u, p, o, gu": shape},
        traffic,
        skipped=skipped,
    )


def _allocating(shape: tuple[int, ...]) -> Case:
    x, c, u, p, o, g = (torch.randn(shape) for _ in range(6))

    def ours():
        return pfm.evaluate(*_update(x, c, u, p))

    def plain(x, c, u, p):
        gu = u + GUIDANCE * (c - u)
        return x + NEW * gu + OLD * p, gu

    def eager():
        return plain(x, c, u, p)

    def with_compiler(compile):
        function = compile(plain)
        return lambda: function(x, c, u, p)

    made, skipped = compiled("torch.compile", with_compiler)
    traffic = bytes_of(x, c, u, p, o, g)
    return Case(
        [
            Contestant("evaluate", ours),
            copy_of(traffic, (x, c, u, o, g, o)),
            Contestant("eager expression", eager),
            *made,
        ],
        {"x, c, u, p, o, gu": shape},
        traffic,
        skipped=skipped,
        note="Mostly page faults of the allocator, on every side; the copy beside it allocates nothing.",
    )


def _euler(shape: tuple[int, ...]) -> Case:
    x, v, o = (torch.randn(shape) for _ in range(3))

    def ours():
        return pfm.evaluate(pfm.lazy(x) + NEW * pfm.lazy(v), out=o)

    def add():
        return torch.add(x, v, alpha=NEW, out=o)

    traffic = bytes_of(x, v, o)
    return Case(
        [Contestant("evaluate(out=)", ours), copy_of(traffic, (x, v, o)), Contestant("torch.add(out=)", add)],
        {"x, v, o": shape},
        traffic,
        note="One pass on both sides: nothing to gain, torch.add is already minimal.",
    )


@case("combine", "update_24mb", "multistep + guidance, 24 MB, outputs preallocated")
def update_24mb() -> Case:
    return _preallocated(SMALL)


@case("combine", "update_24mb_direct", "the same, coefficients multiplied out before")
def update_24mb_direct() -> Case:
    return _preallocated(SMALL, direct=True)


@case("combine", "update_192mb", "multistep + guidance, 192 MB, outputs preallocated")
def update_192mb() -> Case:
    return _preallocated(LARGE)


@case("combine", "update_24mb_allocating", "multistep + guidance, 24 MB, both sides allocate")
def update_24mb_allocating() -> Case:
    return _allocating(SMALL)


@case("combine", "update_192mb_allocating", "multistep + guidance, 192 MB, both sides allocate")
def update_192mb_allocating() -> Case:
    return _allocating(LARGE)


@case("combine", "euler_12mb", "plain Euler, 12 MB, where nothing is gained")
def euler_12mb() -> Case:
    return _euler(SMALL)


@case("combine", "euler_96mb", "plain Euler, 96 MB, where nothing is gained")
def euler_96mb() -> Case:
    return _euler(LARGE)


def _threads(count: int) -> Case:
    x, v, o = (torch.randn(count) for _ in range(3))
    threads = torch.get_num_threads()

    def ours():
        return pfm.ops.combine((x, v), ((1.0, NEW),), out=(o,))

    def one_thread():
        torch.set_num_threads(1)
        try:
            return ours()
        finally:
            torch.set_num_threads(threads)

    def add():
        return torch.add(x, v, alpha=NEW, out=o)

    return Case(
        [
            Contestant("ops.combine(out=)", ours),
            Contestant("ops.combine(out=), one thread", one_thread, note="with 2 us for changing the number"),
            Contestant("torch.add(out=)", add),
        ],
        {"x, v, o": x.shape},
        bytes_of(x, v, o),
        note="The kernel takes a second thread where each gets 65 536 elements, all operands counted.",
    )


@case("combine", "threads_32k", "x + h v of 32 768 floats: too small for two threads")
def threads_32k() -> Case:
    return _threads(1 << 15)


@case("combine", "threads_64k", "x + h v of 65 536 floats: large enough for two threads")
def threads_64k() -> Case:
    return _threads(1 << 16)
