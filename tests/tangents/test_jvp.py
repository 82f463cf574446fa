"""What pfm.jvp takes and gives, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyflowmap as pfm
from pyflowmap.tangents import Dual, MissingRule, primal, tangent

X, DX = torch.tensor([0.5, -1.5, 2.0]), torch.tensor([1.0, 2.0, -0.5])


# ---- pfm.jvp: bad input ----


def identity(*args: Any) -> Any:
    return args[0]


BAD = {
    "shape": ((X,), (DX[:2],), ValueError, r"\(2,\) float32 on cpu, the primal \(3,\)"),
    "scalar tensor": ((X,), (torch.tensor(1.0),), ValueError, "shape, dtype and device must agree"),
    "dtype": ((X,), (DX.double(),), ValueError, "float64"),
    "device": ((X,), (DX.to("meta"),), ValueError, "meta"),
    "integer tangent": ((X,), (torch.ones(3, dtype=torch.int64),), ValueError, "int64"),
    "integer primal": ((torch.arange(3),), (torch.arange(3),), TypeError, "int64, which has no tangent"),
    "integer primal, float tangent": ((torch.arange(3),), (1.0,), TypeError, "no tangent"),
    "boolean tangent": ((X,), (True,), TypeError, "True"),
    "text": ((X,), ("1.0",), TypeError, "a tensor, a number or None"),
    "count": ((X, X), (DX,), ValueError, "2 primals but 1 tangents"),
    "no tuple": (X, DX, TypeError, "both are tuples"),
    "tree: list": (([X, X],), ([DX],), ValueError, "list of 2"),
    "tree: dict": (({"a": X},), ({"b": DX},), ValueError, r"keys \['a'\]"),
    "tree: tensor for a list": (([X, X],), (DX,), ValueError, "list of 2"),
    "number": ((0.5,), (1.0,), TypeError, "float"),
    "module": ((nn.ReLU(),), (1.0,), TypeError, "ReLU"),
    "array": ((np.ones(3),), (np.ones(3),), TypeError, "ndarray"),
    "a Dual": ((Dual(X, DX),), (DX,), TypeError, "Dual already"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    primals, tangents, error, match = BAD[name]
    with pytest.raises(error, match=match) as raised:
        pfm.jvp(identity, primals, tangents)
    assert "\n" not in str(raised.value)


def test_unknown_fallback() -> None:
    with pytest.raises(ValueError, match="finite_difference"):
        pfm.jvp(identity, (X,), (DX,), fallback="numeric")


def test_has_aux_of_something_else() -> None:
    with pytest.raises(TypeError, match="has_aux"):
        pfm.jvp(identity, (X,), (DX,), has_aux=True)


class Keeper(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = nn.ReLU()
        self.kept: Any = {}
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            self.inner.cache = x * 2
        elif self.how == "list":
            self.kept = [x]
        elif self.how == "dict":
            self.kept["x"] = x
        elif self.how == "detached":
            self.kept["x"] = x.detach()
        return self.inner(x)


class Holder:
    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def run(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize("how", ["attribute", "list", "dict"])
def test_a_module_that_keeps_a_dual(how: str) -> None:
    with pytest.raises(RuntimeError, match=r"keeps a Dual in self\.(cache|kept)"):
        pfm.jvp(Keeper(how), (X,), (DX,))
    module = Keeper(how)
    for fn in (lambda x: module(x), module.forward, functools.partial(module), Holder(module).run):
        with pytest.raises(RuntimeError, match="keeps a Dual"):
            pfm.jvp(fn, (X,), (DX,))


def test_a_module_that_keeps_a_detached_value() -> None:
    pfm.jvp(Keeper("detached"), (X,), (DX,))


def test_a_parameter_or_buffer_made_of_a_dual() -> None:
    module = nn.Module()
    for assign in (lambda x: nn.Parameter(x), lambda x: module.register_parameter("p", x)):
        with pytest.raises((TypeError, RuntimeError, MissingRule)):
            assign(Dual(X, DX))
    module.forward = lambda x: module.register_buffer("b", x) or x
    with pytest.raises((TypeError, RuntimeError), match="Dual"):
        pfm.jvp(module, (X,), (DX,))


def test_a_mask_that_needs_a_tangent() -> None:
    q = torch.randn(1, 2, 3, 4)

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.zeros(3, 3)
    assert pfm.jvp(attend, (q, mask), (q, None))[1].abs().sum() > 0
    with pytest.raises((NotImplementedError, TypeError, ValueError), match="mask"):
        pfm.jvp(attend, (q, mask), (None, mask + 1.0))


def test_derivatives_of_derivatives_are_refused() -> None:
    with pytest.raises(TypeError, match="derivatives of derivatives"):
        pfm.jvp(lambda x: pfm.jvp(torch.sin, (x,), (1.0,))[1], (X,), (DX,))


# ---- autograd.Function ----


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class RuledCube(Cube):
    pass


@pfm.tangents.rule(RuledCube)
def _cube(y: Tensor, x: Any) -> Tensor:
    return 3 * primal(x) ** 2 * tangent(x)


def test_an_autograd_function_without_a_rule() -> None:
    for as_tensor in (False, True):
        with pytest.raises(TypeError, match=r"Cube has no tangent rule.*@pfm\.tangents\.rule\(.*Cube\)"):
            pfm.jvp(Cube.apply, (X,), (DX,), as_tensor=as_tensor)
    assert torch.equal(Cube.apply(X), X**3)  # plain tensors pass


def test_an_autograd_function_with_a_rule() -> None:
    x = X.clone().requires_grad_()
    y, dy = pfm.jvp(lambda x: RuledCube.apply(x) * 2, (x,), (DX,))
    torch.testing.assert_close(dy, 6 * X**2 * DX)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 6 * X**2)


def test_an_autograd_function_by_differences() -> None:
    dy = pfm.jvp(Cube.apply, (X.double(),), (DX.double(),), fallback="finite_difference")[1]
    torch.testing.assert_close(dy, 3 * X.double() ** 2 * DX.double(), rtol=1e-8, atol=1e-8)


# ---- fallback ----


def test_fallback_is_only_for_what_has_no_rule() -> None:
    a = torch.rand(5, dtype=torch.float64) + 0.5
    with pytest.raises(MissingRule, match="igamma"):
        pfm.jvp(lambda x: torch.igamma(torch.full_like(a, 2.0), x).sin(), (a,), (a,))
    y, dy = pfm.jvp(lambda x: torch.igamma(torch.full_like(a, 2.0), x).sin(), (a,), (a,), fallback="finite_difference")
    value = 1 - torch.exp(-a) * (1 + a)  # P(2, x), whose derivative is x exp(-x)
    torch.testing.assert_close(y, value.sin())
    torch.testing.assert_close(dy, value.cos() * a * torch.exp(-a) * a, rtol=1e-8, atol=1e-8)


def test_differences_of_a_complex_result() -> None:
    """A function is differenced whatever it returns: a spectrum, too, and what is computed from it."""
    x, dx = X.double(), DX.double()
    back = lambda x: torch.fft.irfft(torch.fft.rfft(x).square(), n=x.shape[-1])  # noqa: E731
    _, dy = pfm.jvp(back, (x,), (dx,), fallback="finite_difference")
    torch.testing.assert_close(dy, torch.func.jvp(back, (x,), (dx,))[1], rtol=1e-7, atol=1e-7)


# ---- the end of an untracked tangent ----


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_through_an_untracked_tangent(compiled: bool) -> None:
    def value_and_tangent(x: Tensor, dx: Tensor) -> Any:
        return pfm.jvp(lambda x: (x * x).sin(), (x,), (dx,))

    if compiled:
        torch._dynamo.reset()
        value_and_tangent = torch.compile(value_and_tangent, backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_()
    y, dy = value_and_tangent(x, DX)
    (y.square().sum() + dy.detach().sum()).backward()  # meant as a constant
    torch.testing.assert_close(x.grad, 2 * (X * X).sin() * (X * X).cos() * 2 * X)
    y, dy = value_and_tangent(x, DX)
    with pytest.raises(RuntimeError, match="track_tangent=True"):
        (y.sum() + dy.sum()).backward()


def test_untracked_tangent_leaves_nothing_behind() -> None:
    dy = pfm.jvp(torch.sin, (X,), (DX,))[1]
    assert not dy.requires_grad and dy.grad_fn is None
    dx = DX.clone().requires_grad_()
    assert not pfm.jvp(torch.sin, (X,), (dx,))[1].requires_grad


def test_tracked_tangent_passes_gradients_to_its_direction() -> None:
    dx = DX.clone().requires_grad_()
    dy = pfm.jvp(torch.sin, (X,), (dx,), track_tangent=True)[1]
    torch.testing.assert_close(torch.autograd.grad(dy.sum(), dx)[0], X.cos())


# ---- trees in and out ----


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Output:
    sample: Any


def test_trees_of_outputs() -> None:
    def f(x: Tensor) -> Any:
        return {"a": [x * 2, (x > 0)], "b": Pair(x.sin(), None), "c": 3, "d": torch.ones(2)}

    y, dy = pfm.jvp(f, (X,), (DX,))
    assert isinstance(y["b"], Pair) and isinstance(dy["b"], Pair)
    assert torch.equal(dy["a"][0], 2 * DX) and dy["a"][1] is None and y["c"] == 3 and dy["c"] is None
    assert torch.equal(y["a"][1], X > 0) and torch.equal(dy["b"].a, X.cos() * DX)
    assert torch.equal(dy["d"], torch.zeros(2))  # does not depend on x


def test_trees_of_inputs() -> None:
    primals = ([X, X.double()], {"t": torch.tensor(2.0), "label": torch.arange(3)}, Pair(X, 5))
    tangents = ([DX, None], {"t": 1.0, "label": None}, Pair(DX, None))
    y, dy = pfm.jvp(lambda xs, c, p: xs[0] * c["t"] + xs[1] + p.a + c["label"], primals, tangents)
    assert y.dtype == torch.float64
    torch.testing.assert_close(dy, (DX * 2.0 + X + DX).double())


@pytest.mark.parametrize("hide", [lambda x: Output(x), lambda x: {"y": [Output([x])]}, lambda x: {x}])
@pytest.mark.parametrize("has_aux", [False, True])
def test_no_dual_is_handed_out(hide: Callable, has_aux: bool) -> None:
    """An output that no tree walk looks into must not carry a Dual out, where it would act as a tensor."""
    with pytest.raises(TypeError, match="holds a Dual"):
        pfm.jvp((lambda x: (x, hide(x))) if has_aux else hide, (X,), (DX,), has_aux=has_aux)


def test_aux_is_values() -> None:
    _, dy, aux = pfm.jvp(lambda x: (x.sin(), {"h": x * 2, "n": 3}), (X,), (DX,), has_aux=True)
    assert torch.equal(dy, X.cos() * DX)
    assert type(aux["h"]) is Tensor and torch.equal(aux["h"], 2 * X) and aux["n"] == 3


def test_keyword_arguments_have_no_tangents() -> None:
    _, dy = pfm.jvp(lambda x, scale: x * scale, (X,), (DX,), kwargs={"scale": X})
    assert torch.equal(dy, DX * X)
    with pytest.raises(TypeError, match="Dual"):
        pfm.jvp(lambda x, scale: x * scale, (X,), (DX,), kwargs={"scale": Dual(X, DX)})


def test_zero_tangents_are_never_computed_with() -> None:
    seen = []

    def f(x: Any, w: Any) -> Any:
        seen.append(type(w))
        return x * w

    for zero in (None, 0.0, 0):
        pfm.jvp(f, (X, X), (DX, zero))
    assert seen == [Tensor] * 3
    _, dy = pfm.jvp(f, (X, X), (None, None))
    assert torch.equal(dy, torch.zeros(3))


def test_tangents_with_other_strides() -> None:
    x, dx = torch.randn(4, 6), torch.randn(6, 4).t()
    for f in (lambda x: x.view(-1), lambda x: x.view(2, 2, 6).sin(), lambda x: (x[:, :1] + torch.zeros(4, 6)).view(24)):
        torch.testing.assert_close(pfm.jvp(f, (x,), (dx,)), pfm.jvp(f, (x,), (dx.contiguous(),)))


def test_arguments_by_name() -> None:
    _, dy = pfm.jvp(lambda x: torch.cat(tensors=[torch.sin(input=x), torch.mul(x, other=x)]), (X,), (DX,))
    torch.testing.assert_close(dy, torch.cat([X.cos() * DX, 2 * X * DX]))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_jvp_inside_a_jvp_raises(compiled):
    """The inner function would close over a Dual of the outer one, and mix two directions up."""

    def inner(x: Any) -> Any:
        return pfm.jvp(lambda y: x * y, (torch.tensor(3.0),), (1.0,))[1]

    def outer(x: Tensor) -> Any:
        return pfm.jvp(inner, (x,), (1.0,))

    call = torch.compile(outer, fullgraph=True, backend="eager") if compiled else outer
    with pytest.raises(Exception) as raised:
        call(torch.tensor(2.0))
    assert "derivatives of derivatives" in str(raised.value) or (compiled and "verb.py" in str(raised.value))
    assert pfm.jvp(torch.sin, (X,), (DX,))[1].shape == X.shape  # and the next one works
