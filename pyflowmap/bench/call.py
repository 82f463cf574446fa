"""What a call costs before it computes anything: updates of 64 floats."""

from __future__ import annotations

import torch

import pyflowmap as pfm

from .case import Case, Contestant, Target, case

H = 0.1

CHECKS = (
    "exact tensor types, device, dtype, shape, layout (dense rows of one memory order), conj and neg bits; "
    "gradient, forward-mode, functorch, dispatch-mode and tracer state; overlap of outputs with each other and with "
    "inputs; version counters of what was written"
)


def _operands() -> list[torch.Tensor]:
    return [torch.randn(64) for _ in range(3)]


def _case(contestants: list[Contestant], x: torch.Tensor, note: str) -> Case:
    return Case(contestants, {"x": x.shape}, note=note)


@case("call", "call_combine", "one call, x + h v of 64 floats: ops.combine")
def call_combine() -> Case:
    x, v, o = _operands()
    combine = pfm.ops.combine

    def ours():
        return combine((x, v), ((1.0, H),), out=(o,))

    def add():
        return torch.add(x, v, alpha=H, out=o)

    return _case(
        [Contestant("ops.combine(out=)", ours), Contestant("torch.add(out=)", add, Target(slower=0.9))],
        x,
        f"Checks included in ours: {CHECKS}.",
    )


@case("call", "call_evaluate", "one call, x + h v of 64 floats: evaluate(lazy(x) + h * lazy(v))")
def call_evaluate() -> Case:
    x, v, o = _operands()
    evaluate, lazy = pfm.evaluate, pfm.lazy

    def ours():
        return evaluate(lazy(x) + H * lazy(v), out=o)

    def add():
        return torch.add(x, v, alpha=H, out=o)

    return _case(
        [Contestant("evaluate(lazy, out=)", ours), Contestant("torch.add(out=)", add, Target(slower=2.3))],
        x,
        "The algebra is built in Python at each call; also checked: that no operand was overwritten since lazy().",
    )


@case("call", "call_allocating", "one call, x + h v of 64 floats, both sides allocate the result")
def call_allocating() -> Case:
    x, v, _ = _operands()
    combine, evaluate, lazy = pfm.ops.combine, pfm.evaluate, pfm.lazy

    def ours():
        return evaluate(lazy(x) + H * lazy(v))

    def operation():
        return combine((x, v), ((1.0, H),))[0]

    def expression():
        return x + H * v

    def add():
        return torch.add(x, v, alpha=H)

    return _case(
        [
            Contestant("evaluate(lazy)", ours),
            Contestant("ops.combine", operation, note="ours too"),
            Contestant("x + h * v", expression),
            Contestant("torch.add", add),
        ],
        x,
        "",
    )


@case("call", "call_recorded", "one call, x + h v of 64 floats, recorded by autograd (operator road)")
def call_recorded() -> Case:
    x, v, _ = _operands()
    x.requires_grad_()
    combine, evaluate, lazy = pfm.ops.combine, pfm.evaluate, pfm.lazy

    def ours():
        return evaluate(lazy(x) + H * lazy(v))

    def operation():
        return combine((x, v), ((1.0, H),))[0]

    def add():
        return torch.add(x, v, alpha=H)

    return _case(
        [
            Contestant("evaluate(lazy)", ours),
            Contestant("ops.combine", operation, note="ours too"),
            Contestant("torch.add", add),
        ],
        x,
        "The road through autograd.Function and a torch operator, taken only where a gradient is needed.",
    )


@case("call", "call_per_sample", "one call, x + h v with h (B,), 8 x 8 floats")
def call_per_sample() -> Case:
    x, v, o = (torch.randn(8, 8) for _ in range(3))
    h = torch.rand(8)
    column = h[:, None]
    evaluate, lazy, combine = pfm.evaluate, pfm.lazy, pfm.ops.combine

    def ours():
        return evaluate(lazy(x) + h * lazy(v), out=o)

    def operation():
        return combine((x, v), ((1.0, h),), out=(o,))

    def addcmul():
        return torch.addcmul(x, column, v, out=o)

    return _case(
        [
            Contestant("evaluate(lazy, out=)", ours),
            Contestant("ops.combine(out=)", operation, note="ours too"),
            Contestant("torch.addcmul(out=)", addcmul),
        ],
        x,
        "",
    )
