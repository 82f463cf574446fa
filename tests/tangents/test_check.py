"""`pfm.tangents.check`: it passes what is right, and names what is wrong, where nothing else would say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyflowmap as pfm
from pyflowmap.tangents import check


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def branch(x: Tensor, t: Any) -> Tensor:
    """Numbers are made tensors: a Dual is none, and its number is not looked at."""
    if not torch.is_tensor(t):
        t = torch.full((x.shape[0],), 0.5, dtype=x.dtype)
    return torch.sin(x) * t[:, None]


X, D = random(3, 4), random(3, 4).flip(0)
TIMES = {"value": torch.tensor([0.1, 0.4, 0.9]).double(), "tangent": torch.full((3,), 0.5).double()}


@pytest.mark.parametrize("wrong", ["value", "tangent"])
def test_another_branch_for_duals_is_seen(wrong: str) -> None:
    args = (X, TIMES[wrong]), (D, 1.0)
    pfm.jvp(branch, *args)  # in silence
    with pytest.raises(RuntimeError, match=f"^{wrong}.*as_tensor=True"):
        check(branch, *args)
    y, dy = check(branch, *args, as_tensor=True)
    torch.testing.assert_close(y, X.sin() * TIMES[wrong][:, None])
    torch.testing.assert_close(dy, X.cos() * D * TIMES[wrong][:, None] + X.sin())


@pytest.mark.parametrize("factor", [1.0, 0.97])
def test_a_wrong_rule_is_seen(factor: float) -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * x

    @pfm.tangents.rule(Square)
    def _square(y: Tensor, x: Any) -> Tensor:
        return 2.0 * factor * pfm.tangents.primal(x) * pfm.tangents.tangent(x)

    if factor == 1.0:
        check(Square.apply, (X,), (D,))
    else:
        with pytest.raises(RuntimeError, match=r"^tangent.*output 0"):
            check(Square.apply, (X,), (D,))


def test_what_is_detached_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"tangent.*detach\(\)"):
        check(lambda x: x * x.detach(), (X,), (D,))


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.SiLU(), nn.LayerNorm(32), nn.Dropout(0.3), nn.Linear(32, 32), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(32, 8)).to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_network_in_training_passes(dtype: torch.dtype, as_tensor: bool) -> None:
    net, x, dx = network(dtype), random(16, 8, dtype=dtype), random(16, 8, dtype=dtype).flip(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        y, dy = check(net, (x,), (dx,), as_tensor=as_tensor)
    torch.manual_seed(3)
    expected = pfm.jvp(net, (x,), (dx,))
    assert torch.equal(y, expected[0]) and torch.equal(dy, expected[1])
    y.sum().backward()  # the result is that of jvp
    assert net[0].weight.grad is not None


def test_attention_and_trees_and_keywords() -> None:
    def fn(qkv: dict[str, Tensor], scale: float, label: Tensor, *, shift: Tensor) -> dict[str, Any]:
        y = F.scaled_dot_product_attention(qkv["q"], qkv["k"], qkv["v"], scale=scale)
        return {"y": y + shift, "label": label, "list": [y.sum(-1), (y > 0), None, 3]}

    qkv = {name: random(2, 2, 5, 4) for name in "qkv"}
    primals, tangents = (qkv, 0.3, torch.arange(3)), ({"q": random(2, 2, 5, 4), "k": None, "v": 1.0}, None, None)
    _, dy = check(fn, primals, tangents, kwargs={"shift": torch.ones(4).double()})
    assert dy["list"][1:] == [None, None, None] and dy["label"] is None
    check(fn, primals, (None, None, None), kwargs={"shift": torch.ones(4).double()})


def test_half_precision_cannot_be_judged() -> None:
    net, x = network(torch.bfloat16).eval(), random(16, 8, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"too rough in torch\.bfloat16.*float64 copy"):
        check(net, (x,), (x,))


def test_a_constant_is_no_matter_of_judgement() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lambda x: F.relu(x - 100.0) + 1.0, (X.float(),), (D.float(),))


def test_the_arguments_are_not_written() -> None:
    x = X.clone()
    check(lambda x: x.mul_(2.0) * x, (x,), (D,))
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: (x, x) if torch.is_tensor(x) else x, "returns 1 outputs"),
        (lambda x: x.sum() if torch.is_tensor(x) else x, r"output 0 is \(3, 4\)"),
        (lambda x: torch.arange(3) + int(torch.is_tensor(x)), "output 0 differs"),
        (lambda x: x / x if torch.is_tensor(x) else x / torch.zeros_like(x), "^value"),
    ],
)
def test_other_outputs(fn: Callable, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check(fn, (X,), (D,))
