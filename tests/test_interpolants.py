"""Interpolants: derivatives against autograd, the drawn point against its definition, bad times."""

import math

import pytest
import torch

from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving

PATHS = [Linear(), Trigonometric(), VariancePreserving()]
names = [type(path).__name__ for path in PATHS]


@pytest.mark.parametrize("path", PATHS, ids=names)
def test_derivatives_are_exact(path):
    t = torch.linspace(0.01, 0.97, 31, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.alpha_derivative), (path.sigma, path.sigma_derivative)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=names)
def test_floats_and_tensors_agree(path):
    for t in (0.0, 0.1, 0.5, 0.93):
        tensor = torch.tensor(t, dtype=torch.float64)
        for name in ("alpha", "sigma", "alpha_derivative", "sigma_derivative"):
            one, many = getattr(path, name)(t), getattr(path, name)(tensor)
            assert isinstance(one, float)
            assert one == pytest.approx(float(many), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=names)
def test_ends(path):
    assert path.alpha(1.0) == pytest.approx(1.0, abs=1e-12) and path.sigma(1.0) == pytest.approx(0.0, abs=1e-12)
    assert path.alpha(0.0) == pytest.approx(0.0, abs=0.007) and path.sigma(0.0) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("path", PATHS[1:], ids=names[1:])
def test_variance_is_preserved(path):
    for t in (0.0, 0.3, 0.7, 0.999):
        assert path.alpha(t) ** 2 + path.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-12)


def test_variance_preserving_by_hand():
    # T = 0.5: log alpha = -0.25 * 19.9 * 0.25 - 0.5 * 0.1 * 0.5
    assert VariancePreserving().alpha(0.5) == pytest.approx(math.exp(-1.24375 - 0.025), rel=1e-12)
    with pytest.raises(ValueError, match="infinite at t = 1"):
        VariancePreserving().sigma_derivative(1.0)
    with pytest.raises(ValueError, match="beta_min = 0"):
        VariancePreserving(beta_min=0.0)


@pytest.mark.parametrize("path", PATHS, ids=names)
@pytest.mark.parametrize("time_shape", [None, (4,), (4, 3)], ids=str)
def test_draw_is_the_definition(path, time_shape):
    x1, x0 = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    t = 0.37 if time_shape is None else 0.05 + 0.9 * torch.rand(time_shape)
    x, v = path.draw(x1, t, x0=x0)
    time = torch.as_tensor(t, dtype=torch.float64)
    time = time.reshape(*time.shape, *[1] * (3 - time.dim())) if time_shape else time
    torch.testing.assert_close(
        x.double(), path.alpha(time) * x1.double() + path.sigma(time) * x0.double(), rtol=1e-5, atol=1e-5
    )
    expected = path.alpha_derivative(time) * x1.double() + path.sigma_derivative(time) * x0.double()
    torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_noise_makes_point_and_velocity():
    x1 = torch.randn(6, 40)
    x, v = Linear().draw(x1, 0.25, seed=3)
    x0 = (x - 0.25 * x1) / 0.75
    torch.testing.assert_close(v, x1 - x0, rtol=1e-4, atol=1e-5)
    assert abs(float(x0.mean())) < 0.3 and 0.8 < float(x0.std()) < 1.2


def test_noise_follows_the_sample_not_the_batch():
    x1 = torch.zeros(6, 40)
    whole, _ = Linear().draw(x1, 0.0, seed=3)
    ids = torch.tensor([4, 1])
    part, _ = Linear().draw(x1[:2], 0.0, seed=3, sample_ids=ids)
    assert torch.equal(part, whole[ids])
    other, _ = Linear().draw(x1, 0.0, seed=4)
    assert not torch.equal(other, whole)


def test_gradients_reach_data_and_times():
    x1, x0 = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    t = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    x, v = Trigonometric().draw(x1, t, x0=x0)
    (x.square().sum() + v.sum()).backward()
    a, b = x1.detach().clone().requires_grad_(), t.detach().clone().requires_grad_()
    alpha, sigma = torch.sin(math.pi / 2 * b)[:, None], torch.cos(math.pi / 2 * b)[:, None]
    plain = alpha * a + sigma * x0, math.pi / 2 * (sigma * a - alpha * x0)
    (plain[0].square().sum() + plain[1].sum()).backward()
    torch.testing.assert_close(x1.grad, a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("t", "error", "words"),
    [
        (float("nan"), ValueError, "t = nan"),
        (float("inf"), ValueError, "t = inf"),
        (torch.tensor([0.1, float("nan"), 0.2, 0.3]), ValueError, "contains NaN"),
        (torch.rand(5), ValueError, r"\(5,\).*leading dimensions"),
        (torch.rand(3), ValueError, "leading dimensions"),
        (torch.rand(4, 3, 1), ValueError, "leading dimensions"),
        (torch.tensor([0, 1, 0, 1]), TypeError, "float"),
    ],
    ids=str,
)
def test_bad_times(t, error, words):
    # (B, 3): a time of shape (3,) would broadcast over the last axis in plain torch
    with pytest.raises(error, match=words):
        Linear().draw(torch.zeros(4, 3), t)


def test_bad_noise():
    with pytest.raises(ValueError, match=r"x0 has shape \(4, 2\)"):
        Linear().draw(torch.zeros(4, 3), 0.5, x0=torch.zeros(4, 2))
