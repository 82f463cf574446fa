"""Rules on empty and 0-d tensors, and far from zero: torch's own derivative there, or the formula's limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyflowmap as pfm

# ---- a dimension of a number ----

NUMBERS: list[Callable] = [
    lambda x: x.amax(0),
    lambda x: x.amin(-1),
    lambda x: x.amax((0,), keepdim=True),
    lambda x: torch.aminmax(x, dim=0),
    lambda x: torch.linalg.vector_norm(x, 3, dim=0),
    lambda x: torch.linalg.vector_norm(x, math.inf, dim=-1),
    lambda x: x.norm(1.5, dim=0),
    lambda x: x.logsumexp(0),
    lambda x: x.logcumsumexp(0),
    lambda x: x.cumprod(0),
    lambda x: x.prod(0),
]


@pytest.mark.parametrize("function", NUMBERS)
def test_a_dimension_of_a_number(function: Callable) -> None:
    x, dx = torch.tensor(2.0), torch.tensor(3.0)
    value, derivative = pfm.jvp(function, (x,), (dx,))
    for y, dy in zip(
        value if isinstance(value, tuple) else (value,),
        derivative if isinstance(derivative, tuple) else (derivative,),
        strict=True,
    ):
        assert (y, dy) == (x, dx)  # each is the identity


# ---- nothing to reduce ----

EMPTY: list[tuple[Callable, tuple[int, ...]]] = [
    (lambda x: x.prod(1), (3, 0)),
    (lambda x: x.prod(1, keepdim=True), (3, 0)),
    (lambda x: x.prod(), (3, 0)),
    (lambda x: x.cumprod(1), (3, 0)),
    (lambda x: x.cumprod(0), (3, 0)),
    (lambda x: x.logsumexp(0), (3, 0)),
    (lambda x: x.logsumexp(1), (3, 0)),
    (lambda x: x.logcumsumexp(1), (3, 0)),
    (lambda x: F.group_norm(x, 2), (0, 4, 3)),
]


@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
@pytest.mark.parametrize(("function", "shape"), EMPTY)
def test_of_nothing(function: Callable, shape: tuple[int, ...], tracked: bool) -> None:
    x = torch.empty(shape).requires_grad_(tracked)
    y, dy = pfm.jvp(function, (x,), (torch.ones(shape),), track_tangent=tracked)
    expected = function(x)
    assert torch.equal(y, expected) and dy.shape == expected.shape
    assert (dy == 0.0).all()  # there is nothing that could move it
    if dy.requires_grad:
        assert torch.autograd.grad(dy.sum(), x, allow_unused=True, materialize_grads=True)[0].shape == shape


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.var(unbiased=False), (3, 0)),
        (lambda x: x.std(1, unbiased=False), (3, 0)),
        (lambda x: x.var(), (1,)),
        (lambda x: torch.var_mean(x, 0)[0], (1, 2)),
        (lambda x: x.var(0, correction=3), (2, 2)),
    ],
)
def test_moments_of_too_few(function: Callable, shape: tuple[int, ...]) -> None:
    x = torch.arange(1.0, 1.0 + math.prod(shape)).reshape(shape)
    y, dy = pfm.jvp(function, (x,), (torch.ones_like(x),))
    assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(function(x)))
    assert not dy.isfinite().any()


# ---- softmax sums, far from zero ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 300.0, -3000.0])
def test_logsumexp_tangent_does_not_lose_digits_with_its_size(dtype: torch.dtype, size: float) -> None:
    x = (torch.linspace(-2.0, 2.0, 12).reshape(3, 4) + size).to(dtype)
    dx = torch.linspace(1.0, 3.0, 12).reshape(3, 4).to(dtype)
    for dims in (1, (0, 1)):
        weights = torch.softmax(x.double().flatten(), 0).reshape(3, 4) if dims != 1 else torch.softmax(x.double(), 1)
        exact = (weights * dx.double()).sum(dims)
        dy = pfm.jvp(lambda x, dims=dims: torch.logsumexp(x, dims), (x,), (dx,))[1]
        torch.testing.assert_close(dy.double(), exact, rtol=12 * torch.finfo(dtype).eps, atol=0.0)


def test_logsumexp_of_a_hidden_row_has_a_zero_tangent() -> None:
    """As its gradient in torch: every weight is zero."""
    x = torch.tensor([[-math.inf, -math.inf], [-math.inf, 1.0]])
    dy = pfm.jvp(lambda x: torch.logsumexp(x, 1), (x,), (torch.tensor([[1.0, 2.0], [3.0, 4.0]]),))[1]
    assert dy.tolist() == [0.0, 4.0]


def prefixes(x: Tensor, dx: Tensor) -> Tensor:
    """The tangent of logcumsumexp: softmax of every prefix, in float64."""
    x, dx = x.double(), dx.double()
    return torch.stack(
        [(torch.softmax(x[..., : i + 1], -1) * dx[..., : i + 1]).sum(-1) for i in range(x.shape[-1])], -1
    )


@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logcumsumexp_of_a_prefix_far_below_the_maximum(dtype: torch.dtype, tracked: bool) -> None:
    x = torch.tensor([[-104.0, -101.0, 5.0, 3.0, -500.0, 6.0, 0.0], [-1e4, 1e4, 0.0, -1e4, 1e4, 1.0, 2.0]], dtype=dtype)
    dx = torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5, 0.0, 7.0], [2.0, -3.0, 1.0, 0.0, 1.0, 5.0, 4.0]], dtype=dtype)
    for at in (x, x.mT.contiguous()):
        dim = 1 if at is x else 0
        leaf = at.clone().requires_grad_(tracked)
        direction = dx if at is x else dx.mT
        dy = pfm.jvp(lambda x, dim=dim: torch.logcumsumexp(x, dim), (leaf,), (direction,), track_tangent=tracked)[1]
        exact = prefixes(x, dx) if at is x else prefixes(x, dx).mT
        torch.testing.assert_close(
            dy.detach().double(), exact, rtol=16 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
        if tracked and dtype == torch.float32:
            wide = x.double().requires_grad_()
            (expected,) = torch.autograd.grad(prefixes(wide, dx).sum(), wide)
            (found,) = torch.autograd.grad(dy.sum(), leaf)
            torch.testing.assert_close(found.double(), expected if at is x else expected.mT, rtol=1e-5, atol=1e-5)


def test_logcumsumexp_after_minus_infinity() -> None:
    x, dx = torch.tensor([-math.inf, -math.inf, 1.0, -math.inf]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pfm.jvp(lambda x: torch.logcumsumexp(x, 0), (x,), (dx,))[1].tolist() == [0.0, 0.0, 3.0, 3.0]
