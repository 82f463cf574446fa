"""Laws of training times against their distributions; weights against their formulas."""

import math

import pytest
import torch
from scipy import stats

from pyflowmap import times, weights

X = torch.zeros(20000, 1)


def test_uniform_is_uniform():
    assert stats.kstest(times.uniform(X, seed=0).numpy(), "uniform").pvalue > 1e-3


def test_uniform_pair_is_two_sorted_uniforms():
    s, t = times.uniform_pair(X, seed=0)
    assert bool((s <= t).all())
    # order statistics of two uniforms: minimum ~ Beta(1, 2), maximum ~ Beta(2, 1)
    assert stats.kstest(s.numpy(), stats.beta(1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(t.numpy(), stats.beta(2, 1).cdf).pvalue > 1e-3


def test_logit_normal():
    t = times.logit_normal(X, 0.4, 1.3, seed=1).double()
    z = (torch.logit(t) - 0.4) / 1.3
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


def test_logit_normal_pair_shares():
    s, t = times.logit_normal_pair(X, -0.4, 1.0, equal=0.75, seed=2)
    assert bool((s <= t).all())
    share = float((s == t).float().mean())
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / len(X))


def test_laws_are_seeded_and_float32():
    for law in (times.uniform, times.logit_normal):
        assert torch.equal(law(X, seed=5), law(X, seed=5)) and not torch.equal(law(X, seed=5), law(X, seed=6))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(times.uniform(X, generator=generator), times.uniform(X, generator=generator))
    assert times.uniform(X.double()).dtype == torch.float32


@pytest.mark.parametrize("call", [
    lambda: times.uniform_pair(X, equal=1.5),
    lambda: times.logit_normal(X, std=-1.0),
    lambda: times.uniform(torch.tensor(1.0)),
    lambda: times.uniform(X, seed=1, generator=torch.Generator()),
])  # fmt: skip
def test_bad_laws(call):
    with pytest.raises(ValueError):
        call()


ERROR = torch.tensor([0.5, 2.0, 8.0])
TIME = torch.tensor([0.2, 0.5, 0.9])


def test_weights_by_hand():
    torch.testing.assert_close(weights.constant(2.0)(ERROR, size=4), ERROR / 2)
    torch.testing.assert_close(
        weights.adaptive(p=0.5, c=1.0)(ERROR), torch.tensor([0.5 / 1.5**0.5, 2 / 3**0.5, 8 / 3.0])
    )
    torch.testing.assert_close(
        weights.adaptive(p=1.0, c=1.0, norm="mean")(ERROR, size=2), (ERROR / 2) / (ERROR / 2 + 1)
    )
    torch.testing.assert_close(weights.power(-2.0, "1-s", norm="sum")(ERROR, s=TIME), ERROR / (1 - TIME) ** 2)
    torch.testing.assert_close(weights.given(lambda s, t: t - s, norm="sum")(ERROR, s=TIME, t=TIME + 0.1), 0.1 * ERROR)


def test_adaptive_weight_is_not_differentiated():
    e = ERROR.clone().requires_grad_()
    weights.adaptive(p=1.0, c=0.0)(e).sum().backward()
    torch.testing.assert_close(e.grad, 1 / ERROR)


def test_learned_weight_finds_the_log_error():
    weight = weights.learned(bounds=(-6.0, 6.0))
    optimiser = torch.optim.Adam(weight.parameters(), 0.02)
    times_ = torch.linspace(0, 1, 64)
    error = torch.exp(-3 * times_)
    for _ in range(300):
        optimiser.zero_grad()
        weight(error, s=times_, t=times_, size=1).mean().backward()
        optimiser.step()
    torch.testing.assert_close(weight.log_error(times_, times_).detach(), error.log(), atol=0.15, rtol=0)


def test_learned_weight_is_bounded_and_starts_neutral():
    weight = weights.learned()
    torch.testing.assert_close(weight(ERROR, s=TIME, t=TIME, size=1).detach(), ERROR)  # w = 0: exp(0) e + 0
    torch.nn.init.constant_(weight.head.bias, 100.0)
    assert bool((weight.log_error(TIME, TIME) == 4.0).all())


@pytest.mark.parametrize("call", [
    lambda: weights.constant()(ERROR),
    lambda: weights.adaptive(norm="max"),
    lambda: weights.adaptive(c=-1.0),
    lambda: weights.power(1.0, "r"),
    lambda: weights.power(1.0, "t")(ERROR, s=TIME, size=1),
    lambda: weights.learned(bounds=(1.0, 1.0)),
])  # fmt: skip
def test_bad_weights(call):
    with pytest.raises(ValueError):
        call()
