"""Forward derivatives of forward derivatives: torch turns forward mode off while a Function's tangent is computed, and
plain operations there would lose the outer level in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

import pyflowmap as pfm
from pyflowmap import ops

LOW, HIGH = -0.5, 0.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ours(kind: str):
    def function(x: Tensor) -> Tensor:
        y, c = torch.sin(x), x[:, 0] * x[:, 1]
        rows = ((c, 0.5), (2.0, c))
        if kind == "outputs":
            return torch.stack(ops.combine((x, y), rows), 1)
        if kind == "clamp":
            return torch.stack(ops.combine((x, y), rows, clamp=((LOW, HIGH), None)), 1)
        if kind == "gram of clamped":
            return ops.combine((x, y), rows, clamp=((LOW, HIGH), None), store=(False, False), gram=True).gram
        if kind == "nine operands":
            return ops.combine([x * i for i in range(1, 10)], ((c,) * 9,), store=(False,), gram=True).gram
        return getattr(ops.combine((x, y), rows, store=(False, False), **{kind: True}), kind)

    return function


def formula(kind: str):
    def function(x: Tensor) -> Tensor:
        y, c = torch.sin(x), (x[:, 0] * x[:, 1])[:, None]
        if kind == "nine operands":
            return (45.0 * c * x).square().sum(-1)[:, None, None]
        first, second = c * x + 0.5 * y, 2.0 * x + c * y
        if "clamp" in kind:
            first = first.clamp(LOW, HIGH)
        out = torch.stack([first, second], 1)
        if kind in ("outputs", "clamp"):
            return out
        if kind == "sums":
            return out.sum(-1)
        return out @ (torch.stack([x, y], 1) if kind == "cross" else out).mT

    return function


def along(function, d: Tensor):
    return lambda x: jvp(function, (x,), (d,))[1]


X, D, E = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
KINDS = ("outputs", "clamp", "gram", "cross", "sums", "gram of clamped", "nine operands")
DERIVATIVES = {
    "twice": lambda f: along(along(f, D), E)(X),
    "three times": lambda f: along(along(along(f, D), E), D)(X),
    "of a gradient": lambda f: along(along(grad(lambda x: f(x).sin().sum()), D), E)(X),
    "gradient": lambda f: grad(lambda x: along(along(f, D), E)(x).sin().sum())(X),
    "in vmap": lambda f: vmap(along(along(f, D), E))(torch.stack([X, 2.0 * X])),
    "of vmap": lambda f: along(along(vmap(f), torch.stack([D, E])), torch.stack([E, D]))(torch.stack([X, 2.0 * X])),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_of_combine(kind, derivative):
    got, expected = (DERIVATIVES[derivative](f(kind)) for f in (ours, formula))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_hessian_of_a_squared_norm():
    x = torch.ones(1, 2)
    found = jacfwd(jacfwd(lambda x: pfm.inner(pfm.lazy(x)).sum()))(x)
    assert torch.equal(found.reshape(2, 2), 2.0 * torch.eye(2))


def test_of_a_fused_gradient_whose_cotangent_moves():
    """d/ds of the directional derivative of grad(s silu(x)): x has a tangent at one level, s at the other."""
    x, d = random(2, 4), random(2, 4, seed=1)

    def along_x(s: Tensor, function) -> Tensor:
        return along(grad(lambda x: (s * function(x)).sum()), d)(x)

    def silu(x: Tensor) -> Tensor:
        return ops.activation(x, "silu")

    one = torch.ones((), dtype=torch.float64)
    got = jvp(lambda s: along_x(s, silu), (one,), (one,))[1]
    sigmoid = torch.sigmoid(x)
    second = sigmoid * (1 - sigmoid) * (2.0 + x * (1.0 - 2.0 * sigmoid))  # silu''
    torch.testing.assert_close(got, second * d, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["clamp", "gram", "cross"])
def test_compiled(kind):
    torch._dynamo.reset()
    function = torch.compile(lambda x: along(along(ours(kind), D), E)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(function(X), DERIVATIVES["twice"](formula(kind)), rtol=1e-10, atol=1e-10)
