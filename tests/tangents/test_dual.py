"""What a Dual is, and what it refuses to be."""

from __future__ import annotations

import copy
import dataclasses
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from pyflowmap.tangents import Dual, MissingRule, TensorDual, primal, tangent

X, DX = torch.tensor([0.5, -1.5, 2.0]), torch.tensor([1.0, 2.0, -0.5])


@pytest.fixture(params=[Dual, TensorDual])
def x(request: pytest.FixtureRequest) -> Any:
    return request.param(X.clone(), DX.clone())


# ---- a pair that looks like its primal ----


def test_properties(x: Any) -> None:
    assert (x.shape, x.dtype, x.device, x.ndim, x.layout) == (X.shape, X.dtype, X.device, 1, torch.strided)
    assert (x.size(), x.size(0), x.size(-1), x.numel(), x.dim(), len(x), x.stride()) == ((3,), 3, 3, 3, 1, 3, (1,))
    assert x.is_floating_point() and torch.is_floating_point(x) and not torch.is_complex(x)
    assert x.is_contiguous() and not x.is_cuda and not x.requires_grad
    assert torch.numel(x) == x.nelement() == 3
    assert x.element_size() == 4 and x.nbytes == 12
    assert "primal" in repr(x) and "tangent" in repr(x)


def test_the_two_kinds() -> None:
    assert not isinstance(Dual(X, DX), Tensor) and not torch.is_tensor(Dual(X, DX))
    assert isinstance(TensorDual(X, DX), Tensor) and torch.is_tensor(TensorDual(X, DX))


def test_primal_and_tangent_of_anything(x: Any) -> None:
    assert primal(x) is x.primal and tangent(x) is x.tangent
    assert primal(X) is X and tangent(X) is None and primal(3) == 3 and tangent("text") is None


def test_comparisons_act_on_the_primal(x: Any) -> None:
    for compare in (operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne):
        result = compare(x, 0.5)
        assert type(result) is Tensor and torch.equal(result, compare(X, 0.5))
    assert bool((x > 0).any()) and torch.equal(x.argmax(), X.argmax()) and torch.equal(x, X)
    assert 0.5 in x


Y = torch.tensor([0.41, -1.53, 2.17], dtype=torch.float64)
Z = torch.tensor([1.3, 0.6, -2.6], dtype=torch.float64)
OPERATORS = {
    "x + 2": lambda x: x + 2, "2 + x": lambda x: 2 + x, "x - 2": lambda x: x - 2, "2 - x": lambda x: 2 - x,
    "x * 3": lambda x: x * 3, "3 * x": lambda x: 3 * x, "x / 3": lambda x: x / 3, "3 / x": lambda x: 3 / x,
    "x ** 3": lambda x: x**3, "abs(x) ** x": lambda x: abs(x) ** x, "2 ** x": lambda x: 2**x, "-x": lambda x: -x,
    "+x": lambda x: +x, "x % 0.7": lambda x: x % 0.7, "3 % x": lambda x: (3 % x) + x, "x // 1": lambda x: x // 1 + x,
    "9 // x": lambda x: 9 // x + x, "X + x": lambda x: Z + x, "X - x": lambda x: Z - x,
    "X * x": lambda x: Z * x, "X / x": lambda x: Z / x, "X ** x": lambda x: Z.abs() ** x,
    "x @ x": lambda x: x @ x, "X @ x": lambda x: Z @ x, "x @ M": lambda x: x @ torch.ones(3, 2).double(),
    "X % x": lambda x: Z % x.abs(), "float64(2) * x": lambda x: np.float64(2) * x,
}  # fmt: skip


@pytest.mark.parametrize("kind", [Dual, TensorDual])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(kind: Any, name: str) -> None:
    f, x, dx, h = OPERATORS[name], Y, DX.double(), 1e-6
    y = f(kind(x, dx))
    assert torch.equal(y.primal, torch.as_tensor(f(x)))
    torch.testing.assert_close(y.tangent, (f(x + h * dx) - f(x - h * dx)) / (2 * h), rtol=1e-8, atol=1e-8)


def test_iteration_and_unpacking(x: Any) -> None:
    a, b, c = x
    assert [float(v.tangent) for v in (a, b, c)] == DX.tolist()
    assert [float(v.primal) for v in x] == X.tolist()


@pytest.mark.parametrize(
    "convert",
    [bool, float, int, complex, operator.index, np.asarray, range, np.float64, lambda x: [0, 1, 2][x],
     lambda x: x.item(), lambda x: x.tolist(), lambda x: x.numpy(), lambda x: 1 if x else 0, lambda x: x.data_ptr()],
)  # fmt: skip
def test_what_would_lose_the_tangent_raises(x: Any, convert: Callable) -> None:
    with pytest.raises((TypeError, AttributeError, MissingRule)):
        convert(x[0])


def test_messages_name_the_cure() -> None:
    x = Dual(X, DX)
    with pytest.raises(TypeError, match=r"detach\(\)"):
        float(x[0])
    with pytest.raises(AttributeError, match=r"x\.item of a Dual would lose its tangent; use x\.detach\(\)"):
        x.item()
    with pytest.raises(AttributeError, match="no attribute 'tangnet'"):
        x.tangnet  # noqa: B018
    with pytest.raises(MissingRule, match=r"(?s)igamma.*\(1\).*\(2\).*\(3\).*finite_difference"):
        torch.igamma(x, x)


def test_detach_drops_the_tangent(x: Any) -> None:
    assert type(x.detach()) is Tensor and torch.equal(x.detach(), X)


def test_tree_and_dataclass(x: Any) -> None:
    if type(x) is Dual:
        leaves, spec = pytree.tree_flatten({"a": [x, 1]})
        assert leaves[0] is x.primal and leaves[1] is x.tangent
        back = pytree.tree_unflatten(leaves, spec)["a"][0]
        assert type(back) is Dual and back.primal is x.primal and back.tangent is x.tangent
        other = dataclasses.replace(x, tangent=None)
        assert other.primal is x.primal and other.tangent is None
        assert [f.name for f in dataclasses.fields(x)] == ["primal", "tangent", "tracked", "fallback"]
    assert x in {x} and hash(x) == hash(x)


def test_flags_travel() -> None:
    x = Dual(X, DX, tracked=True, fallback="finite_difference")
    y = (x.sin() * 2).chunk(3)[0]
    assert (y.tracked, y.fallback) == (True, "finite_difference")
    leaves, spec = pytree.tree_flatten(x)
    assert pytree.tree_unflatten(leaves, spec).tracked


def test_copies_of_a_dual(x: Any) -> None:
    for make in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        try:
            other = make(x)
        except (TypeError, RuntimeError, AttributeError, NotImplementedError):
            continue
        assert type(other) is type(x) and torch.equal(other.primal, x.primal) and torch.equal(other.tangent, x.tangent)
