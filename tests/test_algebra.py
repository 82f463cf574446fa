"""The lazy linear algebra: what it computes, what it refuses, and how many launches it takes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tolerance import assert_within, bound

from pyflowmap import algebra, combination, ops
from pyflowmap.algebra import Lazy, evaluate, inner, lazy, noise, per_sample, weighted
from pyflowmap.ops import backend as backends

SHAPE = (4, 3, 5)


@pytest.fixture
def xvu():
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=rng) for _ in range(3))


def close(result, exact, magnitude=8.0, operations=12):
    assert_within(result, exact.double(), bound(exact, torch.full_like(exact, magnitude).double(), operations))


@pytest.fixture
def launches(monkeypatch):
    """Counts calls of the kernel, on whichever road."""
    count = {"kernel": 0}

    def counted(function):
        def call(*args):
            answer = function(*args)
            count["kernel"] += bool(answer)
            return answer

        return call

    for name in ("combine", "update"):
        monkeypatch.setattr(backends.direct, name, counted(getattr(backends.direct, name)))

    class Module:
        combine = staticmethod(counted(backends._C.combine))

    real = backends.module_for
    monkeypatch.setattr(backends, "module_for", lambda *a: Module if real(*a) is backends._C else real(*a))
    return count


# ---- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "h",
    [
        0.5,
        2,
        -3,
        True,
        np.float64(0.3),
        np.float32(0.3),
        np.int64(3),
        np.array(0.7),
        torch.tensor(0.3),
        torch.tensor(2),
    ],
    ids=lambda h: f"{type(h).__name__}-{h}",
)
def test_numbers_on_either_side(xvu, h):
    x, v, _ = xvu
    number = float(h)
    for written in (h * lazy(v), lazy(v) * h):
        assert type(written) is Lazy
        close(evaluate(lazy(x) + written), x.double() + number * v.double())
    close(evaluate(lazy(x) / h - lazy(v)), x.double() / number - v.double())
    close(evaluate(-lazy(x) - h * lazy(v)), -x.double() - number * v.double())


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_leading_dimensions(xvu, shape, dtype):
    x, v, _ = xvu
    h = (torch.rand(shape) + 0.5).to(dtype)
    wide = per_sample(h.double(), v)
    close(evaluate(lazy(x) + h * lazy(v)), x.double() + wide * v.double())
    close(evaluate(lazy(x) + lazy(v) * h * 2.0), x.double() + 2 * wide * v.double())
    if dtype != torch.bfloat16:  # 1 / h is torch's own, in the dtype of h
        close(evaluate(lazy(x) - lazy(v) / h), x.double() - v.double() / wide)


def test_leading_dimensions_mix(xvu):
    x, v, u = xvu
    h, f = torch.rand(4), torch.rand(4, 3)
    exact = x.double() + per_sample(h, v).double() * v.double() + per_sample(f, u).double() * u.double()
    close(evaluate(lazy(x) + h * lazy(v) + f * lazy(u)), exact)
    close(evaluate(lazy(x) + f * (h * lazy(v))), x.double() + per_sample(f * h[:, None], v).double() * v.double())
    close(evaluate(f * lazy(x) + h * lazy(x)), per_sample(f + h[:, None], x).double() * x.double())


def test_square_shapes_do_not_align_with_the_last_axis():
    """(3,) against (3, 3): torch's own h * x scales columns; here it scales samples."""
    x, h = torch.ones(3, 3), torch.tensor([1.0, 2.0, 3.0])
    assert evaluate(h * lazy(x)).tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert torch.equal(per_sample(h, x) * x, evaluate(h * lazy(x)))


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (4, 5), (1, 1, 1), (4, 1), (2, 4)])
def test_other_shapes_are_refused(xvu, shape):
    with pytest.raises(ValueError, match=r"leading dimensions") as error:
        torch.rand(shape) * lazy(xvu[0])
    assert str(shape).replace("(", r"(") in str(error.value) and "\n" not in str(error.value)


def test_full_size_coefficient_is_refused(xvu):
    with pytest.raises(ValueError, match="elementwise"):
        lazy(xvu[0]) * xvu[1]


def test_products_and_conversions_are_refused(xvu):
    x = lazy(xvu[0])
    for bad in (lambda: x * x, lambda: x / x, lambda: bool(x), lambda: 1.0 + x, lambda: x - 1, lambda: "2" + x):
        with pytest.raises(TypeError):
            bad()
    with pytest.raises(TypeError):
        x * "two"
    with pytest.raises(TypeError):
        np.ones(3) * x
    with pytest.raises(ValueError, match=r"\(4, 3, 5\).*\(4, 5, 3\)"):
        evaluate(x + lazy(torch.ones(4, 5, 3)))
    with pytest.raises(TypeError, match="list"):
        lazy([1.0])
    with pytest.raises(ValueError):
        evaluate()
    with pytest.raises(ValueError):
        per_sample(torch.ones(3), xvu[0])


# ---- combining -------------------------------------------------------------------------------------------------------


def test_operands_merge(xvu):
    x, v, _ = xvu
    r = lazy(x) + 2 * lazy(v) - 0.5 * lazy(x) + (lazy(v) + lazy(x)) / 4
    assert len(r.operands) == 2
    close(evaluate(r), 0.75 * x.double() + 2.25 * v.double())
    assert torch.equal(evaluate(lazy(x) - lazy(x) + lazy(v)), v)


def test_sums_in_c_are_the_sums_in_python(xvu):
    """What C merges, and what it leaves to Python: two per-row factors, noise, versions that differ."""
    x, v, _ = (lazy(t) for t in xvu)
    h = torch.rand(4)
    python = lambda a, b: combination._merge(a, b)  # noqa: E731
    for a, b in ((x, v), (x + v, 0.5 * x), (h * x, v), (x + h * v, 2.0 * x), (2 * x, x), (x, x)):
        merged = backends.direct.sum_of(1.0, a, 1.0, b)
        assert merged is not None and merged == python(a, b)
        assert backends.direct.sum_of(1.0, a, -0.5, b) == python(a, b * -0.5)
    field = noise(xvu[0], seed=1)
    stale = lazy(xvu[0])
    xvu[0].add_(1)
    for a, b in ((h * v, h * v), (v, field), (field, v), (stale, lazy(xvu[0])), (v, 3.0), (v, xvu[1])):
        assert backends.direct.sum_of(1.0, a, 1.0, b) is None
    with pytest.raises(TypeError, match="factor"):
        backends.direct.sum_of(1.0, x, 1.0)
    long = [lazy(torch.randn(2)) for _ in range(40)]
    assert len(sum(long[1:], long[0]).operands) == 40


def test_a_weighted_sum_is_the_sum(xvu):
    x, v, u = (lazy(t) for t in xvu)
    h = torch.rand(4)
    for terms in ((1.0, x, 0.5, v, -2.0, x), (2, x, 0.5, v + 3.0 * u), (h, x, 0.5, v), (0.25, noise(xvu[0], seed=1))):
        expected = sum((c * y for c, y in zip(terms[2::2], terms[3::2])), terms[0] * terms[1])
        assert torch.equal(evaluate(weighted(*terms)), evaluate(expected))
    assert weighted(0.5, x, 0.25, v, 1.0, x).operands == (xvu[0], xvu[1])


def test_cancelled_operand_is_not_read(xvu):
    x = torch.full(SHAPE, math.nan)
    h = torch.rand(4)
    assert torch.equal(evaluate(lazy(x) - lazy(x) + lazy(xvu[1])), xvu[1])
    assert torch.equal(evaluate(h * lazy(x) - h * lazy(x) + lazy(xvu[1])), xvu[1])
    assert torch.equal(evaluate(torch.zeros(4) * lazy(x) + lazy(xvu[1])), xvu[1])


def test_bare_tensors_join(xvu):
    x, v, _ = xvu
    for r in (x + 0.5 * lazy(v), 0.5 * lazy(v) + x):
        close(evaluate(r), x.double() + 0.5 * v.double())
    close(evaluate(x - 0.5 * lazy(v)), x.double() - 0.5 * v.double())
    assert torch.equal(evaluate(x), x)


def test_together_equals_apart(xvu, launches):
    x, v, u = (lazy(t) for t in xvu)
    h = torch.rand(4)
    terms = (x + h * v, x - u / 3, 0.1 * v, h * u + noise(xvu[0], seed=3))
    together = evaluate(*terms)
    assert launches["kernel"] == 1 and type(together) is tuple
    for one, term in zip(together, terms, strict=True):
        assert torch.equal(one, evaluate(term))


def test_more_than_eight(launches):
    tensors = [torch.randn(3, 7) for _ in range(20)]
    r = sum((lazy(t) * (0.1 * i) for i, t in enumerate(tensors[1:], 1)), lazy(tensors[0]))
    exact = tensors[0].double() + sum(0.1 * i * t.double() for i, t in enumerate(tensors[1:], 1))
    close(evaluate(r), exact, magnitude=float(20 * 2 * 4), operations=30)
    assert launches["kernel"] == 3  # 8 inputs, then 7 beside the partial sum, then 5
    nine = evaluate(*(2.0 * lazy(t) for t in tensors[:9]))
    assert all(torch.equal(y, 2 * t) for y, t in zip(nine, tensors, strict=False))


def test_out_and_dtype(xvu):
    x, v, _ = xvu
    o = torch.empty(SHAPE)
    assert evaluate(lazy(x) + lazy(v), out=o) is o and torch.equal(o, x + v)
    a, b = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE)
    result = evaluate(lazy(x) + lazy(v), 2.0 * lazy(v), out=(a, b))
    assert result[0] is a and result[1] is b
    assert torch.equal(a, (x + v).bfloat16()) and torch.equal(b, 2 * v)
    assert evaluate(lazy(x), dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="tuple of 2"):
        evaluate(lazy(x), lazy(v), out=o)
    with pytest.raises(ValueError, match="dtype"):
        evaluate(lazy(x), out=o, dtype=torch.float16)
    state = x.clone()
    assert evaluate(lazy(state) + 0.5 * lazy(v), out=state) is state
    close(state, x.double() + 0.5 * v.double())


@pytest.mark.parametrize("a", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("b", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_promotion_is_torchs(a, b):
    x, v = torch.randn(2, 3).to(a), torch.randn(2, 3).to(b)
    r = lazy(x) + 0.5 * lazy(v)
    assert r.dtype == evaluate(r).dtype == (x + v).dtype
    exact = x.double() + 0.5 * v.double()
    arithmetic = torch.float64 if torch.float64 in (a, b) else torch.float32
    assert_within(evaluate(r), exact, bound(exact, x.double().abs() + v.double().abs(), 5, arithmetic, (x + v).dtype))


def test_overwritten_operand_raises(xvu):
    x, v, _ = (t.clone() for t in xvu)
    before = lazy(x) + 1.0 * lazy(v)
    merged = 2.0 * before
    x.add_(1)
    for stale in (before, merged, before.detach()):
        with pytest.raises(RuntimeError, match=r"overwritten.*clone"):
            evaluate(stale)
        with pytest.raises(RuntimeError, match="overwritten"):
            inner(stale)
    with pytest.raises(RuntimeError, match="overwritten"):
        evaluate(stale, out=torch.empty(SHAPE))
    with pytest.raises(RuntimeError, match="overwritten between"):
        before + lazy(x)
    y = lazy(v) + lazy(x)
    evaluate(0.5 * lazy(v), out=x)  # our own writes count too
    with pytest.raises(RuntimeError, match="overwritten"):
        evaluate(y)


def test_an_overwritten_coefficient_raises(xvu):
    x, v, _ = (t.clone() for t in xvu)
    h, g, f = torch.rand(4), torch.rand(4), torch.rand(4, 3)
    built = {
        "product": lazy(x) + h * lazy(v),
        "scaled": -2.0 * (lazy(x) - h * lazy(v)),
        "merged": h * lazy(x) + lazy(v) + 0.5 * lazy(v),
        "weighted": weighted(0.5, h * lazy(v), 1.0, lazy(x)),
        "detached": (lazy(x) + h * lazy(v)).detach(),
        "noise": lazy(x) + h * noise(x, seed=0),
        "per frame": lazy(x) + h * lazy(v) + f * lazy(x),
    }
    good = {  # of products, sums and quotients of coefficients, which were computed before the write
        "product of two": g * (h * lazy(x)),
        "sum of two": h * lazy(x) + g * lazy(x),
        "quotient": lazy(x) / h,
    }
    expected = {name: evaluate(c) for name, c in good.items()}
    for c in built.values():
        evaluate(c)
    h.mul_(7.0)
    for name, c in built.items():
        for use in (evaluate, lambda c: evaluate(c, out=torch.empty(SHAPE)), inner, lambda c: inner(c, x)):
            with pytest.raises(RuntimeError, match=r"coefficient .* overwritten .*clone"):
                pytest.fail(f"{name}: {use(c)}")
    for name, c in good.items():
        assert torch.equal(evaluate(c), expected[name])
        assert torch.equal(evaluate(c, out=torch.empty(SHAPE)), expected[name])
    g.zero_()
    assert torch.equal(evaluate(good["product of two"]), expected["product of two"])
    with pytest.raises(RuntimeError, match="coefficient"):
        g * built["product"]  # would be a product of the new numbers
    with pytest.raises(RuntimeError, match="coefficient"):
        built["product"] + h * lazy(v)


def test_coefficient_tensors_stay_on_the_direct_road(xvu, launches):
    x, v, _ = xvu
    h, out = torch.rand(4), torch.empty(SHAPE)
    assert backends.direct.update((lazy(x) + h * lazy(v),), out)
    assert torch.equal(out, evaluate(lazy(x) + h * lazy(v)))
    with torch.inference_mode():
        y, k = torch.rand(SHAPE), torch.rand(4)
        assert evaluate(h * lazy(y) + k * lazy(x), out=out) is out  # inference tensors have no counter
        close(out, per_sample(h, y).double() * y.double() + per_sample(k, x).double() * x.double())


def test_methods_of_tensors_name_the_cure(xvu):
    x = lazy(xvu[0])
    for use in (lambda: x.clamp(0, 1), lambda: x.mean(), lambda: x.T, lambda: x.view(-1), lambda: torch.clamp(x, 0, 1)):
        with pytest.raises((AttributeError, TypeError), match=r"pfm\.evaluate\(\.\.\.\) it first"):
            use()
    for use in (lambda: x**2, lambda: x**x, lambda: pow(x, 0.5)):
        with pytest.raises(TypeError, match=r"not linear.*pfm\.inner"):
            use()
    assert not hasattr(x, "nonsense") and not hasattr(x, "__array__") and not hasattr(x, "clamp")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        x.nonsense  # noqa: B018
    copied = copy.copy(x)
    assert torch.equal(evaluate(copied), xvu[0])


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_in_a_combination(xvu):
    x, _, _ = xvu
    field = evaluate(noise(x, seed=5))
    h = torch.rand(4)
    exact = x.double() + per_sample(h, x).double() * field.double()
    close(evaluate(lazy(x) + h * noise(x, seed=5)), exact)
    n = noise(x, seed=5)
    assert len((n + 2 * n).operands) == 1
    close(evaluate(n + 2 * noise(x, seed=5)), 3 * field.double(), magnitude=20.0)
    ids = torch.tensor([3, 2, 1, 0])
    assert torch.equal(evaluate(noise(x, seed=5, sample_ids=ids)), field.flip(0))
    assert not torch.equal(evaluate(noise(x, seed=5, stream=1)), field)
    assert evaluate(noise(x.bfloat16(), seed=5)).dtype == torch.bfloat16
    assert torch.equal(evaluate(h * lazy(x) + noise(x, seed=5) - h * lazy(x)), field)


def test_two_noise_fields_are_refused(xvu):
    x = xvu[0]
    for other in (noise(x, seed=2), noise(x, seed=1, stream=1), noise(x, seed=1, sample_ids=torch.arange(4))):
        with pytest.raises(ValueError, match="one noise field"):
            noise(x, seed=1) + other
        with pytest.raises(ValueError, match="one noise field"):
            evaluate(noise(x, seed=1), lazy(x) + other)
    with pytest.raises(ValueError):
        noise(x, seed=1) + noise(x[:2], seed=1)


def test_one_unseeded_field_used_twice_is_one_field(xvu):
    n = noise(xvu[0])
    a, b = evaluate(n, 2.0 * n)
    assert torch.equal(2 * a, b)


# ---- inner products --------------------------------------------------------------------------------------------------


def test_inner(xvu):
    x, v, u = xvu
    X, V, U = (t.double() for t in xvu)
    h, f = torch.rand(4), torch.rand(4, 3)
    for a, A in ((lazy(x), X), (lazy(x) + h * lazy(v), X + per_sample(h, v) * V), (f * lazy(x), per_sample(f, x) * X)):
        for b, B in ((None, A), (lazy(u), U), (lazy(x) - 2 * lazy(u), X - 2 * U)):
            exact = (A * B).sum((1, 2))
            magnitude = ((X.abs() + V.abs()) * (B.abs() + X.abs())).sum((1, 2)) * 3
            got = inner(a, b)
            assert got.shape == (4,) and got.dtype == torch.float32
            assert_within(got, exact, bound(exact, magnitude, 90))
    assert inner(x, v).shape == (4,) and inner(lazy(X)).dtype == torch.float64
    assert inner(lazy(x.bfloat16())).dtype == torch.float32
    assert torch.allclose(inner(lazy(X), lazy(V)), (X * V).sum((1, 2)), rtol=1e-14)
    assert inner(torch.arange(3.0)).tolist() == [0.0, 1.0, 4.0]


def test_inner_is_not_expanded():
    """||a - b||^2 for b = a + 1e-4: aa - 2ab + bb would lose every digit."""
    a = torch.randn(3, 4096) * 10
    b = a + 1e-4 * torch.randn(3, 4096)
    exact = (a.double() - b.double()).square().sum(1)
    assert_within(inner(lazy(a) - lazy(b)), exact, bound(exact, exact, 70))


def test_inner_with_noise(xvu):
    x = xvu[0]
    for like in (x, x.double()):
        field = evaluate(noise(like, seed=4))
        torch.testing.assert_close(inner(noise(like, seed=4)), field.square().sum((1, 2)))
        torch.testing.assert_close(inner(lazy(like), noise(like, seed=4)), (like * field).sum((1, 2)))


def test_inner_refusals(xvu):
    with pytest.raises(ValueError):
        inner(xvu[0], xvu[0][:2])
    with pytest.raises(ValueError):
        inner(torch.tensor(1.0))


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_detach_cuts_operands_and_coefficients(xvu):
    x, v, _ = (t.clone().requires_grad_() for t in xvu)
    h = torch.rand(4, requires_grad=True)
    target = lazy(x) + h * lazy(v)
    assert target.requires_grad and not target.detach().requires_grad
    inner(lazy(x) - target.detach()).sum().backward()
    assert v.grad is None and h.grad is None
    expected = 2 * (x - (x + per_sample(h, v) * v)).detach()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_loss(xvu):
    """weight(inner(r)).mean(): the weight is plain torch on (B,) numbers."""
    x, v, u = (t.double().requires_grad_() for t in xvu)
    h = torch.rand(4, dtype=torch.double, requires_grad=True)
    e = inner(lazy(x) - h * lazy(v) - 0.3 * lazy(u))
    got = torch.autograd.grad((e / (e.detach() + 0.1)).mean(), (x, v, u, h))
    r = x - per_sample(h, v) * v - 0.3 * u
    e = r.square().sum((1, 2))
    want = torch.autograd.grad((e / (e.detach() + 0.1)).mean(), (x, v, u, h))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_short_road_of_a_squared_norm(xvu, launches):
    """Same bits as combine(gram=True), two launches with the gradient, and right for a gradient of the gradient."""
    x, v, u = xvu
    h = torch.rand(4)
    x.requires_grad_()
    r = lambda: lazy(x) - h * lazy(v) - 0.3 * lazy(u)  # noqa: E731
    e = inner(r())
    general = ops.combine((x, v, u), ((1.0, (-1.0, h), -0.3),), store=(False,), gram=True, dtype=torch.float32).gram
    assert torch.equal(e, general[:, 0, 0])
    launches["kernel"] = 0
    (got,) = torch.autograd.grad(inner(r()).sum(), x)
    assert launches["kernel"] == 2
    (want,) = torch.autograd.grad(general.sum(), x)
    assert torch.equal(got, want)

    wide = [t.detach().double().requires_grad_() for t in (x, v, u)]
    both = lambda a, b, c: inner(lazy(a) - h.double() * lazy(b) - 0.3 * lazy(c) + 0.1 * lazy(a))  # noqa: E731
    assert torch.autograd.gradcheck(both, wide) and torch.autograd.gradgradcheck(both, wide)


def test_several_combinations_into_given_tensors(xvu):
    """The call that is united in C answers as the one that is united in Python."""
    x, v, u = xvu
    h = torch.rand(4)
    terms = (lazy(x) + h * lazy(v), lazy(u) - 0.5 * lazy(x), 2.0 * lazy(v))
    o = tuple(torch.empty(SHAPE) for _ in terms)
    assert backends.direct.update(terms, o)
    for one, term in zip(o, terms, strict=True):
        assert torch.equal(one, evaluate(term))
    assert not backends.direct.update((*terms, x), (*o, torch.empty(SHAPE)))  # a bare tensor: Python wraps it
    assert not backends.direct.update(terms, o[:2])
    mixed = evaluate(lazy(x) + lazy(v), u, out=o[:2])
    assert mixed[0] is o[0] and torch.equal(o[1], u)
    nine = tuple(lazy(torch.randn(SHAPE)) for _ in range(9))
    assert not backends.direct.update((sum(nine[1:], nine[0]),), o[:1])
    u.add_(1)
    before = [y.clone() for y in o]
    with pytest.raises(RuntimeError, match="overwritten"):
        evaluate(*terms, out=o)
    assert all(torch.equal(y, z) for y, z in zip(o, before, strict=True))
    with pytest.raises(ValueError, match="share memory"):
        evaluate(lazy(x), lazy(v), out=(o[0], o[0]))


def test_our_write_into_a_saved_tensor_is_seen(xvu):
    x = xvu[0].clone()
    w = torch.rand(SHAPE, requires_grad=True)
    loss = (w * x).sum()
    evaluate(0.5 * lazy(x), out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- launches --------------------------------------------------------------------------------------------------------


def test_heun_is_two_launches(launches):
    def velocity(x, t):
        return lazy(-(x.operands[0] if len(x.operands) == 1 else evaluate(x)))

    def heun(velocity, x, s, t):
        k1 = velocity(x, s)
        k2 = velocity(x + (t - s) * k1, t)
        return x + (t - s) / 2 * (k1 + k2)

    x = torch.randn(4, 6)
    y = evaluate(heun(velocity, lazy(x), 0.0, 0.5))
    assert launches["kernel"] == 2
    close(y, x.double() * (1 - 0.5 + 0.125))


def test_guided_multistep_update_is_one_launch(launches):
    """Guidance, a change of parameterisation, history and renoising: still one launch, extra results included."""
    x, cond, null, old = (torch.randn(4, 6) for _ in range(4))
    v = lazy(null) + 3.0 * (lazy(cond) - lazy(null))
    data = lazy(x) + 0.7 * v
    y, kept = evaluate(lazy(x) + 0.1 * (1.5 * v - 0.5 * lazy(old)) + 0.01 * noise(x, seed=1) + 0.0 * data, v)
    assert launches["kernel"] == 1 and y.shape == kept.shape == x.shape
    close(kept, null.double() + 3 * (cond.double() - null.double()), magnitude=30.0)


def test_repr_says_what_it_is(xvu):
    text = repr(lazy(xvu[0]) + 0.5 * lazy(xvu[1]) + torch.rand(4) * noise(xvu[0], seed=1))
    for part in ("Lazy", "0.5", "noise", "(4, 3, 5)", "float32"):
        assert part in text
    assert algebra.Lazy is Lazy
