"""Dropout: value and tangent lose the same numbers, and the value has the bits of the plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyflowmap as pfm

MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Dropout(0.4), (64, 32)),
    (nn.Dropout(0.4, inplace=True), (64, 32)),
    (nn.Dropout1d(0.4), (16, 8, 4)),
    (nn.Dropout2d(0.4), (16, 8, 4, 2)),
    (nn.Dropout3d(0.4), (16, 8, 3, 2, 2)),
    (nn.AlphaDropout(0.4), (64, 32)),
    (nn.FeatureAlphaDropout(0.4), (16, 8, 4)),
]
each = pytest.mark.parametrize(("module", "shape"), MODULES, ids=[repr(m) for m, _ in MODULES])


def seeded(function: Callable[[Any], Any], seed: int = 1) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        torch.manual_seed(seed)
        return function(x)

    return run


@each
@pytest.mark.parametrize("tracked", [False, True])
def test_one_mask(module: nn.Module, shape: tuple[int, ...], tracked: bool) -> None:
    x, dx = torch.randn(shape, dtype=torch.float64) + 3.0, torch.randn(shape, dtype=torch.float64)
    run = seeded(lambda x: module(1.0 * x))
    y, dy = pfm.jvp(run, (x,), (dx,), track_tangent=tracked)
    assert torch.equal(y, run(x)), "the value has other bits than the plain call"
    torch.testing.assert_close(dy, run(x + dx) - run(x), rtol=1e-12, atol=1e-12)  # affine in x, given the mask
    dropped = (dy == 0).double().mean()
    assert 0.2 < dropped < 0.6


@each
def test_in_evaluation_nothing_is_drawn(module: nn.Module, shape: tuple[int, ...]) -> None:
    x, dx = torch.randn(shape), torch.randn(shape)
    module.eval()
    state = torch.get_rng_state()
    y, dy = pfm.jvp(lambda x: module(1.0 * x), (x,), (dx,))
    module.train()
    assert torch.equal(y, x) and torch.equal(dy, dx)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p: float) -> None:
    x, dx = torch.randn(4, 3), torch.randn(4, 3)
    y, dy = pfm.jvp(lambda x: F.dropout(x, p), (x,), (dx,))
    assert torch.equal(y, (1 - p) * x) and torch.equal(dy, (1 - p) * dx)


def test_gradients_of_both_go_through_the_mask() -> None:
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    dx = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    y, dy = pfm.jvp(seeded(lambda x: F.dropout(x, 0.3)), (x,), (dx,), track_tangent=True)
    mask = y.detach() / x.detach()
    gx, gdx = torch.autograd.grad(y.sum() + 2.0 * dy.sum(), (x, dx))
    torch.testing.assert_close(gx, mask)
    torch.testing.assert_close(gdx, 2.0 * mask)


def test_attention_drops_the_same_weights() -> None:
    torch.manual_seed(0)
    q, k, v, dq, dk, dv = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(6))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    y, dy = pfm.jvp(run, (q, k, v), (dq, dk, dv))
    assert torch.equal(y, run(q, k, v))
    ends = [run(q + h * dq, k + h * dk, v + h * dv) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(dy, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-7)


def drop_path(x: Any, keep: float = 0.6) -> Any:
    """Stochastic depth as networks write it by hand."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * mask.div_(keep)


def drop_path_of_ones(x: Any, keep: float = 0.6) -> Any:
    return x / keep * torch.floor(keep + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device))


def added_noise(x: Any) -> Any:
    return 2.0 * x + torch.empty_like(x).normal_() + torch.randn_like(x) + x.new_zeros(x.shape).uniform_(-1, 1)


@pytest.mark.parametrize("function", [drop_path, drop_path_of_ones, added_noise])
def test_randomness_by_hand(function: Callable[[Any], Any]) -> None:
    x, dx = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    run = seeded(function)
    y, dy = pfm.jvp(run, (x,), (dx,))
    assert torch.equal(y, run(x))
    torch.testing.assert_close(dy, run(x + dx) - run(x), rtol=1e-12, atol=1e-12)
    assert dy.any()


def test_noise_drawn_into_a_dual_has_no_tangent() -> None:
    x, dx = torch.randn(3, 2), torch.randn(3, 2)

    def forget(x: Any) -> Any:
        x = 1.0 * x
        x.normal_()
        return x

    y, dy = pfm.jvp(seeded(forget), (x,), (dx,))
    assert torch.equal(y, seeded(forget)(x)) and not dy.any()


def test_compiled() -> None:
    x, dx = torch.randn(64, 8), torch.randn(64, 8)
    torch._dynamo.reset()
    run = torch.compile(
        lambda x, dx: pfm.jvp(lambda x: F.dropout(x, 0.5), (x,), (dx,)), backend="aot_eager", fullgraph=True
    )
    y, dy = run(x, dx)
    assert 0.3 < (y == 0).float().mean() < 0.7
    torch.testing.assert_close(dy, torch.where(y == 0, 0.0, 2.0 * dx))
