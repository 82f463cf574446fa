"""Normal numbers: drawn in the kernel that uses them, the same on every instruction set."""

from __future__ import annotations

import torch

import pyflowmap as pfm
from pyflowmap import _C

from .case import Case, Contestant, Target, case
from .peers import bytes_of, copy_of

A, B = 0.8, 0.6


def _check_instruction_sets(out: torch.Tensor) -> str:
    """Raises unless every instruction set of this machine draws the same bits; returns what was compared."""
    isa = _C.build()
    order = ("base", "v3", "v4")
    available = order[: order.index(isa["best_isa"]) + 1]
    drawn = []
    try:
        for name in available:
            _C.set_isa(name)
            drawn.append(pfm.evaluate(pfm.noise(out, seed=1), out=out).clone())
    finally:
        _C.set_isa(isa["isa"])
    for name, field in zip(available, drawn):
        if not torch.equal(field, drawn[0]):
            raise RuntimeError(f"the instruction sets {available[0]} and {name} draw different normals")
    return f"Same bits on {', '.join(available)}: checked in this run."


def _check_normal(field: torch.Tensor) -> None:
    """Raises unless mean and variance are those of a standard normal field, within six standard deviations."""
    size, field = field.numel(), field.double()
    mean, variance = field.mean().item(), field.var().item()
    if not (abs(mean) < 6.0 / size**0.5 and abs(variance - 1.0) < 6.0 * (2.0 / size) ** 0.5):
        raise RuntimeError(f"{size} normals have mean {mean:.3g} and variance {variance:.6g}")


def _normals(count: int, threads: int | None = None) -> Case:
    out = torch.empty(64, count // 64)
    note = _check_instruction_sets(out)
    _check_normal(out)

    def ours():
        pfm.evaluate(pfm.noise(out, seed=1), out=out)

    def randn():
        torch.randn(out.shape, out=out)

    return Case(
        [Contestant("evaluate(noise, out=)", ours), Contestant("torch.randn(out=)", randn, Target(faster=6.0))],
        {"out": out.shape},
        bytes_of(out),
        per=(count, "element"),
        threads=threads,
        note=note,
    )


@case("noise", "normals_64k", "normals, 65 536")
def normals_64k() -> Case:
    return _normals(1 << 16)


@case("noise", "normals_1m", "normals, 1 M")
def normals_1m() -> Case:
    return _normals(1 << 20)


@case("noise", "normals_16m", "normals, 16 M")
def normals_16m() -> Case:
    return _normals(1 << 24)


@case("noise", "normals_1m_one_thread", "normals, 1 M, one thread")
def normals_1m_one_thread() -> Case:
    return _normals(1 << 20, threads=1)


@case("noise", "renoise_4m", "re-noising a x + b noise, 4 M, noise never stored")
def renoise_4m() -> Case:
    x = torch.randn(64, 1 << 16)
    out, buffer = torch.empty_like(x), torch.empty_like(x)

    def ours():
        pfm.evaluate(A * pfm.lazy(x) + B * pfm.noise(x, seed=1), out=out)

    ours()
    _check_normal((out - A * x) / B)

    def eager():
        torch.randn(buffer.shape, out=buffer)
        torch.mul(x, A, out=out)
        out.add_(buffer, alpha=B)

    def eager_in_place():
        torch.randn(out.shape, out=out)
        torch.mul(out, B, out=out)
        out.add_(x, alpha=A)

    traffic = bytes_of(x, out)
    return Case(
        [
            Contestant("evaluate(out=)", ours),
            copy_of(traffic, (x, out)),
            Contestant("eager out=, randn and 2 ops", eager),
            Contestant("eager out=, randn into the result", eager_in_place),
        ],
        {"x": x.shape},
        traffic,
        per=(x.numel(), "element"),
    )
