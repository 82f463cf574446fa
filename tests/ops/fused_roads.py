"""The roads that lead to a fused function, each against its formula in plain torch differentiated by torch.

    @pytest.mark.parametrize("road", ROADS)
    def test_roads(road):
        ROADS[road](Case(function, formula, operands, tangents))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyflowmap as pfm


@dataclass
class Case:
    function: Callable[..., Tensor]  # of the operands: the public one
    formula: Callable[..., Tensor]  # the same in plain torch
    operands: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    rtol: float | None = None  # None: of the dtype, by torch.testing
    atol: float | None = None

    def close(self, found: Any, expected: Any) -> None:
        torch.testing.assert_close(found, expected, rtol=self.rtol, atol=self.atol)


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def _loss(function: Callable, road: str, operands: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """A number that depends on the value, and on the tangent where that is recorded; not linearly, so that a gradient of
    the wrong operand shows."""
    if road == "value":
        return function(*operands).square().sum()
    if road == "func":
        y, dy = torch.func.jvp(function, operands, tangents)
    else:
        y, dy = pfm.jvp(function, operands, tangents, track_tangent=road == "tracked")
    return y.square().sum() + (dy if road != "untracked" else dy.detach()).pow(3).sum()


def gradients(function: Callable, road: str, case: Case) -> tuple[Tensor, ...]:
    """Of all operands and, where the tangent is recorded, of all tangents."""
    operands, tangents = _leaves(case.operands), _leaves(case.tangents)
    wanted = operands + (tangents if road in ("tracked", "func") else ())
    return torch.autograd.grad(_loss(function, road, operands, tangents), wanted)


# The same numbers in plain torch: what is not recorded does not count.
_PLAIN = {"value": "value", "untracked": "value", "tracked": "func", "func": "func"}


def _forward(case: Case) -> None:
    case.close(case.function(*case.operands), case.formula(*case.operands))
    expected = torch.func.jvp(case.formula, case.operands, case.tangents)
    case.close(pfm.jvp(case.function, case.operands, case.tangents), expected)
    case.close(torch.func.jvp(case.function, case.operands, case.tangents), expected)


def _jvp_of_some(case: Case) -> None:
    """A tangent that is not there is zero."""
    for i, moved in enumerate(case.tangents):
        only = [None] * len(case.tangents)
        only[i] = moved  # type: ignore[call-overload]
        filled = tuple(torch.zeros_like(x) if dx is None else dx for x, dx in zip(case.operands, only, strict=True))
        expected = torch.func.jvp(case.formula, case.operands, filled)
        case.close(pfm.jvp(case.function, case.operands, tuple(only)), expected)


def _backward(road: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        case.close(gradients(case.function, road, case), gradients(case.formula, _PLAIN[road], case))

    return run


def _second_gradients(case: Case) -> None:
    """Of the value, and of the pair."""

    def second(function: Callable, road: str) -> tuple[Tensor, ...]:
        operands, tangents = _leaves(case.operands), _leaves(case.tangents)
        leaves = operands + (tangents if road != "value" else ())
        first = torch.autograd.grad(_loss(function, road, operands, tangents), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    case.close(second(case.function, "value"), second(case.formula, "value"))
    case.close(second(case.function, "tracked"), second(case.formula, "func"))


def _transforms(case: Case) -> None:
    x, *rest = case.operands
    batch = torch.stack([x, 2 * x, x - 1])
    dims = (0, *(None for _ in rest))
    vmapped = [torch.func.vmap(f, dims)(batch, *rest) for f in (case.function, case.formula)]
    case.close(*vmapped)

    def total(function: Callable) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, *rest).square().sum()

    ours, plain = total(case.function), total(case.formula)
    case.close(torch.func.vmap(torch.func.grad(ours))(batch), torch.func.vmap(torch.func.grad(plain))(batch))
    case.close(torch.func.jacfwd(ours)(x), torch.func.jacfwd(plain)(x))
    dx = case.tangents[0]
    over = [torch.func.jvp(torch.func.grad(f), (x,), (dx,))[1] for f in (ours, plain)]  # forward over reverse
    case.close(*over)
    twice = [torch.func.vjp(torch.func.grad(f), x)[1](dx)[0] for f in (ours, plain)]
    case.close(*twice)


def _compiled(road: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        operands, tangents = _leaves(case.operands), _leaves(case.tangents)
        torch._dynamo.reset()
        n = len(operands)
        step = torch.compile(
            lambda *all: _loss(case.function, road, all[:n], all[n:]), backend="aot_eager", fullgraph=True
        )
        wanted = operands + (tangents if road in ("tracked", "func") else ())
        found = torch.autograd.grad(step(*operands, *tangents), wanted)
        case.close(found, gradients(case.formula, _PLAIN[road], case))

    return run


ROADS: dict[str, Callable[[Case], None]] = {
    "forward": _forward,
    "some tangents": _jvp_of_some,
    "gradient": _backward("value"),
    "gradient beside a tangent": _backward("untracked"),
    "gradient through both": _backward("tracked"),
    "gradient through torch.func.jvp": _backward("func"),
    "second gradients": _second_gradients,
    "transforms": _transforms,
    "compiled": _compiled("value"),
    "compiled beside a tangent": _compiled("untracked"),
    "compiled through both": _compiled("tracked"),
    "compiled through torch.func.jvp": _compiled("func"),
}
