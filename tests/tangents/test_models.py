"""Other people's networks as they stand: value, tangent and gradients of each, and what it needs (docs/models.md)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from tangents.by_torch import plain_formulas
from tangents.models import AS_TENSOR, DUAL, MODELS, Compiled, Model, ViT, encoder_layer, table
from torch import Tensor, nn

import pyflowmap as pfm

MODEL = pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name.replace(" ", "_"))
MOVES = pytest.mark.parametrize("both", [False, True], ids=["x", "x_and_time"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def need(model: Model, both: bool) -> str:
    return model.in_both if both else model.in_x


@functools.cache
def network(model: Model) -> nn.Module:
    for package in ("diffusers", "einops"):
        if package in model.name and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    return model.build().double().eval()


def arguments(model: Model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    t = torch.tensor(model.t, dtype=torch.float64)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(model.x), t, draw(model.x), draw(t.shape)


def outputs(model: Model, net: nn.Module, x: Any, t: Any) -> list[Any]:
    """The tensors in what it returns: dataclasses, tuples, None for weights not asked for."""
    leaves = pytree.tree_leaves(model.call(net, x, t), is_leaf=lambda y: isinstance(y, pfm.Dual))
    return [y for y in leaves if y is not None]


def duals(model: Model, net: nn.Module, both: bool, as_tensor: bool, tracked: bool = False) -> tuple[list, list]:
    x, t, dx, dt = arguments(model)
    return pfm.jvp(
        lambda x, t: outputs(model, net, x, t), (x, t), (dx, dt if both else None), as_tensor=as_tensor,
        track_tangent=tracked,
    )  # fmt: skip


def reference(model: Model, net: nn.Module, both: bool) -> tuple[list, list]:
    """Values and tangents by torch: forward-mode AD, or twice reverse mode where a model has no forward mode."""
    x, t, dx, dt = arguments(model)
    function = lambda *args: tuple(outputs(model, net, *(args if both else (*args, t))))  # noqa: E731
    primals, tangents = ((x, t), (dx, dt)) if both else ((x,), (dx,))
    with plain_formulas():
        if model.reference == "func.jvp":
            y, dy = torch.func.jvp(function, primals, tangents)
        else:
            y, dy = torch.autograd.functional.jvp(function, primals, tangents, create_graph=True)
    return list(y), list(dy)


def gradients(net: nn.Module, ys: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in ys)
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    error, size = (a - b).norm(), b.norm()
    assert error <= tolerance * max(size, 1e-3), f"{what}: off by {error:.1e}, size {size:.1e}"


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys(), f"gradients differ in {sorted(found.keys() ^ expected.keys())}"
    largest = max(g.norm() for g in expected.values())
    for name in expected:  # against the largest: what is zero in mathematics is rounding in both
        assert (found[name] - expected[name]).norm() <= tolerance * largest, name


def uncompiled(model: Model) -> nn.Module:
    """For torch.func.jvp, which refuses compiled modules."""
    net = network(model)
    if not model.compiled:
        return net
    copy = Compiled(compiled=False).double().eval()
    copy.load_state_dict(net.state_dict())
    return copy


@MODEL
@MOVES
def test_value_tangent_and_gradients(model, both):
    net = network(model)
    x, t, _, _ = arguments(model)
    y = outputs(model, net, x, t)
    expected = gradients(net, y)
    value, tangent = duals(model, net, both, need(model, both) == AS_TENSOR)

    for a, b in zip(value, y, strict=True):  # the same kernels, but for attention, which is one of ours
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    all_close(gradients(net, value), expected, 1e-12)
    tolerance = 1e-5 if model.single else 1e-10
    for a, b in zip(tangent, reference(model, uncompiled(model), both)[1], strict=True):
        close(a, b, tolerance, "tangent")


@MODEL
@MOVES
def test_gradients_through_the_tangent(model, both):
    net, other = network(model), uncompiled(model)
    expected = gradients(other, reference(model, other, both)[1])
    found = gradients(net, duals(model, net, both, need(model, both) == AS_TENSOR, tracked=True)[1])
    if model.compiled:  # compiled code fills in zeros
        expected = {name: expected.get(name, torch.zeros_like(g)) for name, g in found.items()}
    found = {name: found.get(name, torch.zeros_like(g)) for name, g in expected.items()}
    all_close(found, expected, 1e-5 if model.single else 1e-9)


@MODEL
@MOVES
def test_what_it_needs(model, both):
    """What passes as Dual passes as TensorDual too; what needs TensorDual is refused as Dual, and told the cure."""
    if model.compiled:
        with pytest.raises(torch._dynamo.exc.Unsupported):  # loud, as docs/models.md says
            duals(model, network(model), both, as_tensor=True)
    elif need(model, both) == DUAL:
        values = [duals(model, network(model), both, as_tensor) for as_tensor in (False, True)]
        for a, b in zip(values[0][1], values[1][1], strict=True):
            close(b, a, 1e-12, "tangent")
    else:
        with pytest.raises(TypeError, match="as_tensor=True"):
            duals(model, network(model), both, as_tensor=False)


@pytest.mark.parametrize("build", [ViT, encoder_layer])
def test_in_training_with_one_mask_for_both(build):
    """Dropout and stochastic depth: the draws of the plain model, and the tangent has the mask of its primal."""
    model = next(m for m in MODELS if m.build is build)
    torch.manual_seed(0)
    net = model.build().double().train()
    x, t, dx, dt = arguments(model)

    def value(h: float) -> Tensor:
        torch.manual_seed(1)
        return outputs(model, net, x + h * dx, t + h * dt)[0].detach()

    torch.manual_seed(1)
    y, dy = duals(model, net, True, False)
    torch.testing.assert_close(y[0], value(0.0), rtol=1e-11, atol=1e-11)
    assert not torch.equal(y[0], duals(model, net, True, False)[0][0])  # there are draws
    close(dy[0], (value(1e-6) - value(-1e-6)) / 2e-6, 1e-7, "tangent")


# ---- what does not pass, as docs/models.md says --------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = 2.0 * x
        return x


def reentrant(x: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)


def masked(x: Any) -> Any:
    return nn.functional.scaled_dot_product_attention(x.detach(), x.detach(), x.detach(), attn_mask=x)


def flex(x: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(x, x, x)


LOST = "would lose its tangent"
REFUSED = {
    "item": (lambda x: x * x.sum().item(), LOST),
    "float": (lambda x: x * float(x.sum()), LOST),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), LOST),
    "asarray": (lambda x: np.asarray(x), LOST),
    "branch": (lambda x: x if x.sum() else -x, LOST),
    "script": (lambda x: torch.jit.script(Twice())(x), ""),
    "trace": (lambda x: torch.jit.trace(Twice(), torch.ones(1, 2, 4, 4))(x), ""),
    "reentrant": (reentrant, "CheckpointFunction has no tangent rule"),
    "grad": (torch.func.grad(lambda x: x.square().sum()), ""),
    "flex_attention": (flex, ""),
    "mask": (masked, "attn_mask"),
    "kept": (Keeps(), "keeps a Dual in self.last"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["Dual", "TensorDual"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, as_tensor):
    function, message = REFUSED[name]
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    with pytest.raises((TypeError, RuntimeError, AttributeError), match=message):  # MissingRule is a RuntimeError
        pfm.jvp(function, (x,), (torch.ones_like(x),), as_tensor=as_tensor)


def test_transformations_inside_a_model():
    """To torch.func a Dual is a tree of two tensors, and what it computes of the pair is the pair's."""
    x = torch.randn(3, 4, dtype=torch.float64)
    dx = torch.randn(3, 4, dtype=torch.float64)
    _, tangent = pfm.jvp(torch.func.vmap(lambda row: row.sin() * row.sum()), (x,), (dx,))
    torch.testing.assert_close(tangent, x.cos() * dx * x.sum(1, True) + x.sin() * dx.sum(1, True))
    _, tangent = pfm.jvp(lambda x: torch.func.jvp(torch.sin, (x,), (x * x,))[1], (x,), (dx,))
    torch.testing.assert_close(tangent, (2 * x * x.cos() - x * x * x.sin()) * dx)
    exported = torch.export.export(Twice(), (x,)).module()
    torch.testing.assert_close(pfm.jvp(exported, (x,), (dx,), as_tensor=True)[1], 2 * dx)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU()).double()
    exported = torch.export.export(layers, (x,)).run_decompositions().module()
    wanted = torch.func.jvp(layers, (x,), (dx,))[1]
    torch.testing.assert_close(pfm.jvp(exported, (x,), (dx,), as_tensor=True)[1].detach(), wanted)


def test_the_table_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf8")
    assert page == table(), "docs/models.md is not what tests/tangents/models.py prints; write it anew"
