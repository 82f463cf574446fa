"""Writing to Duals: what torch.func.jvp does, or an error; eager and compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyflowmap as pfm
from pyflowmap.tangents import Dual, TensorDual

EVEN, ODD = (Ellipsis, slice(0, None, 2)), (Ellipsis, slice(1, None, 2))
MASK = torch.tensor([True, False, True, False])


def rotary(x: Tensor, angle: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * angle.cos() - x[..., 1::2] * angle.sin()
    out[..., 1::2] = x[..., 0::2] * angle.sin() + x[..., 1::2] * angle.cos()
    return out


def augmented(x: Tensor, y: Tensor) -> Tensor:
    x = x.sin()
    x += y.repeat(1, 2)
    x *= 1.5
    x -= 0.3 * x
    x /= 2.0 + x.square()
    return x


def methods(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.add_(y.repeat(1, 2), alpha=0.5).mul_(x).clamp_(-1.0, 2.0)
    return x.exp_()


def masked(x: Tensor, y: Tensor) -> Tensor:
    x = x * 2
    x.masked_fill_(MASK, -3.0)
    return x.tanh() * x * y.repeat(1, 2)


def indexed(x: Tensor, y: Tensor) -> Tensor:
    x = x * x
    x[0] = y[1].repeat(2)
    x[1, 2:] = 7.0
    x[:, MASK] = x[:, ~MASK] * y
    x[torch.tensor([2]), torch.tensor([3])] = x[0, 0] * 0.5
    return x * x


def zeroed(x: Tensor, y: Tensor) -> Tensor:
    z = x.exp()
    z.zero_()
    z += y.repeat(1, 2)
    return z * x


def filled(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.fill_(2.5)
    z[..., :2] = y
    return z * z


def copied(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z.copy_(y[:, :1])  # broadcasts
    w = x.new_empty(3, 2)
    w.copy_(y)
    return z * x + w.repeat(1, 2)


def activated(x: Tensor, y: Tensor) -> Tensor:
    z = F.relu(x * 3, inplace=True) + F.silu(x - 1, inplace=True) + F.leaky_relu(x + 1, 0.1, True)
    return (z - y.repeat(1, 2)).relu_()


def constant_written(x: Tensor, y: Tensor) -> Tensor:
    z = x * y.repeat(1, 2)
    z[:, 0] = torch.arange(3.0, dtype=z.dtype)
    z[:, 1].sum()
    return z.cumsum(1)


FUNCTIONS = [
    rotary, augmented, methods, masked, indexed, zeroed, filled, copied, activated, constant_written,
]  # fmt: skip
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def arguments() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    y, dy = (torch.randn(3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return (x, y), (dx, dy)


@each_function
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_tangent_is_written_too(function: Callable, as_tensor: bool) -> None:
    primals, tangents = arguments()
    expected = function(*primals), difference(function, primals, tangents)
    before = [x.clone() for x in (*primals, *tangents)]
    actual = pfm.jvp(function, primals, tangents, as_tensor=as_tensor)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-7, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(before, (*primals, *tangents), strict=True)), (
        "an argument was written to"
    )


@each_function
@pytest.mark.parametrize("moved", [0, 1])
def test_one_tangent_alone(function: Callable, moved: int) -> None:
    primals, tangents = arguments()
    alone = tuple(dx if i == moved else None for i, dx in enumerate(tangents))
    if moved == 1 and function not in (masked, activated, constant_written):  # x is plain: so is what is written to
        with pytest.raises(RuntimeError, match="plain tensor"):
            pfm.jvp(function, primals, alone)
        return
    expected = difference(function, primals, tuple(0.0 if dx is None else dx for dx in alone))
    torch.testing.assert_close(pfm.jvp(function, primals, alone)[1], expected, rtol=1e-7, atol=1e-8)


@each_function
def test_gradients_of_the_written_primal(function: Callable) -> None:
    """Autograd refuses some of these written in place; of Duals all are out of place. By differences, then."""
    primals, tangents = arguments()
    leaves = [x.clone().requires_grad_() for x in primals]
    gradients = torch.autograd.grad(
        pfm.jvp(function, tuple(leaves), tangents)[0].square().sum(), leaves, materialize_grads=True
    )
    slope = sum((g * dx).sum() for g, dx in zip(gradients, tangents, strict=True))
    expected = difference(lambda *x: function(*x).square().sum(), primals, tangents)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_compiled(tracked: bool) -> None:
    def all_of_them(primals: Any, tangents: Any) -> Any:
        return [pfm.jvp(f, primals, tangents, track_tangent=tracked) for f in functions]

    functions = [rotary, indexed] if tracked else FUNCTIONS
    torch._dynamo.reset()
    primals, tangents = arguments()
    found = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)(primals, tangents)
    for function, pair in zip(functions, found, strict=True):
        expected = pfm.jvp(function, primals, tangents)
        torch.testing.assert_close(
            pair, expected, rtol=1e-12, atol=1e-12, msg=lambda m, f=function: f"{f.__name__}: {m}"
        )


def difference(function: Callable, primals: Any, tangents: Any, h: float = 1e-5) -> Tensor:
    ends = [function(*[x + step * dx for x, dx in zip(primals, tangents, strict=True)]) for step in (h, -h)]
    return (ends[0] - ends[1]) / (2 * h)


def test_gradient_through_a_tracked_written_tangent() -> None:
    (x, y), (dx, dy) = arguments()
    gradients = []
    for jvp in (
        lambda a: pfm.jvp(indexed, (a, y), (dx, dy), track_tangent=True),
        lambda a: torch.func.jvp(indexed, (a, y), (dx, dy)),
    ):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(jvp(leaf)[1].square().sum(), leaf))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


# ---- refusals ----


@pytest.fixture(params=[Dual, TensorDual])
def x(request: pytest.FixtureRequest) -> Any:
    return request.param(torch.ones(2, 4), torch.full((2, 4), 0.5))


def test_an_augmented_index_raises(x: Any) -> None:
    with pytest.raises(RuntimeError, match="view of a Dual"):
        x[:, ::2] += 1.0
    assert torch.equal(x.primal, torch.ones(2, 4))


def test_a_stale_view_raises(x: Any) -> None:
    row = x[0]
    x += 1.0
    with pytest.raises(RuntimeError, match="after its owner was written to"):
        row * 2.0
    assert torch.equal((x[0] * 2.0).primal, torch.full((4,), 4.0))  # a later view is good


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("view", [lambda x: x[0], lambda x: x.reshape(4, 2), lambda x: x.flatten()])
def test_views_in_inference_mode_are_views(view: Callable, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = Dual(torch.ones(2, 4), torch.ones(2, 4))
        part = view(x)
        with pytest.raises(RuntimeError, match="view of a Dual"):
            part.mul_(2.0)
        x.mul_(2.0)
        with pytest.raises(RuntimeError, match="after its owner was written to"):
            part * 2.0


def test_a_view_of_a_dual_without_tangent() -> None:
    x = Dual(torch.ones(2, 4), torch.ones(2, 4))
    for fresh in (torch.zeros_like(x), x.new_zeros(2, 4)):
        fresh[0].fill_(3.0)  # nothing to lose: it reaches the owner
        assert fresh.primal.sum() == 12.0
        part = fresh.view(-1)
        fresh.copy_(x)
        with pytest.raises(RuntimeError, match="after its owner was written to"):
            part * 2.0


def test_a_stale_view_cannot_be_returned() -> None:
    def stale(x: Any) -> Any:
        y = x * 2.0
        part = y[0]
        y.mul_(2.0)
        return part

    with pytest.raises(RuntimeError, match="after its owner was written to"):
        pfm.jvp(stale, (torch.ones(2, 4),), (torch.ones(2, 4),))


SAME = [
    lambda x: F.dropout(x, 0.3, training=False),
    lambda x: F.alpha_dropout(x, 0.3, training=False),
    lambda x: +x,
    lambda x: torch.broadcast_tensors(x)[0],
    lambda x: torch.atleast_2d(x),
    lambda x: x.contiguous(),
]


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("write", [operator.iadd, operator.imul, operator.imod, operator.ifloordiv])
def test_what_gives_back_its_argument_is_its_argument(same: Callable, write: Callable) -> None:
    def written(x: Tensor) -> Tensor:
        y = x * 3.0
        z = same(y)
        z = write(z, 1.7)
        return y * z + x

    x, dx = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    y, dy = pfm.jvp(written, (x,), (dx,))
    expected = written(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dy, (written(x + 1e-6 * dx) - written(x - 1e-6 * dx)) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("write", ["iadd", "isub", "imul", "itruediv", "imod", "ifloordiv"])
def test_compiled_augmented_assignment_of_a_tensor_is_in_place(write: str) -> None:
    other = torch.rand(2, 4, dtype=torch.float64) + 1.0

    def written(x: Tensor) -> Tensor:
        y = x * 3.0
        z = y
        z = getattr(operator, write)(z, other)
        return y * z + x

    x, dx = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    compiled = torch.compile(lambda x, dx: pfm.jvp(written, (x,), (dx,)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, dx), pfm.jvp(written, (x,), (dx,)))
    torch.testing.assert_close(compiled(x, dx)[0], written(x))


def test_compiled_product_with_a_tensor_keeps_its_order() -> None:
    x, dx, w = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    compiled = torch.compile(
        lambda x, dx: pfm.jvp(lambda x: x @ w + 2.0 * (w @ x), (x,), (dx,)), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x, dx), (x @ w + 2.0 * (w @ x), dx @ w + 2.0 * (w @ dx)))


@pytest.mark.parametrize("function", [lambda x: x + 1.0, lambda x: (x + 1.0).view(-1), lambda x: x - torch.ones(2, 4)])
def test_a_tangent_shares_no_memory_with_the_callers(function: Callable) -> None:
    x, dx = torch.ones(2, 4), torch.ones(2, 4)
    dy = pfm.jvp(function, (x,), (dx,))[1]
    dy.mul_(7.0)
    assert torch.equal(dx, torch.ones(2, 4))
    (_, _), (dy, dz) = pfm.jvp(lambda x: ((y := x * 2.0), y + 1.0), (x,), (dx,))
    dy.mul_(7.0)
    assert torch.equal(dz, 2.0 * torch.ones(2, 4))


def test_a_stale_view_of_a_view_raises(x: Any) -> None:
    part = x.view(4, 2).transpose(0, 1)[0]
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="after its owner was written to"):
        torch.stack([part, part])


@pytest.mark.parametrize(
    "write", ["add_", "__setitem__", "zero_", "copy_", "relu_", "fill_", "masked_fill_", "inplace"]
)
def test_writing_to_a_view_raises(x: Any, write: str) -> None:
    view = x[:, 1:3]
    writes = {
        "add_": lambda: view.add_(1.0),
        "__setitem__": lambda: view.__setitem__(0, 1.0),
        "zero_": lambda: view.zero_(),
        "copy_": lambda: view.copy_(torch.ones(2, 2)),
        "relu_": lambda: torch.relu_(view),
        "fill_": lambda: view.fill_(2.0),
        "masked_fill_": lambda: view.masked_fill_(torch.ones(2, 2, dtype=torch.bool), 0.0),
        "inplace": lambda: F.relu(view, inplace=True),
    }
    with pytest.raises(RuntimeError, match="view of a Dual"):
        writes[write]()
    assert torch.equal(x.primal, torch.ones(2, 4)), "the owner's value was written to before the refusal"


@pytest.mark.parametrize(
    "chunked", [lambda x: x.chunk(2), lambda x: x.split(1), lambda x: x.unbind(0), lambda x: list(x)]
)
def test_parts_are_views(x: Any, chunked: Callable) -> None:
    with pytest.raises(RuntimeError, match="view of a Dual"):
        chunked(x)[0].mul_(2.0)


def test_a_plain_tensor_takes_no_tangent(x: Any) -> None:
    plain = torch.zeros(2, 4)
    for write in (
        lambda: plain.add_(x),
        lambda: plain.__setitem__(0, x[0]),
        lambda: plain.copy_(x),
        lambda: plain.__iadd__(x),
        lambda: operator.iadd(plain[0], x[0]),
        lambda: operator.imul(plain, x),
        lambda: torch.relu_(plain).sub_(x),
        lambda: plain.index_copy_(0, torch.tensor([0]), x[:1]),
        lambda: plain.masked_scatter_(torch.ones(2, 4, dtype=torch.bool), x),
        lambda: plain.addcmul_(plain, x),
        lambda: plain.lerp_(x, 0.5),
    ):
        with pytest.raises(RuntimeError, match=r"plain tensor|no tangent rule"):
            write()
    assert torch.equal(plain, torch.zeros(2, 4))


def test_out_raises(x: Any) -> None:
    out = torch.zeros(2, 4)
    for call in (
        lambda: torch.sin(x, out=out),
        lambda: torch.add(x, 1.0, out=out),
        lambda: torch.stack([x[0]], out=out),
    ):
        with pytest.raises(TypeError, match="out="):
            call()
    with pytest.raises(TypeError):
        torch.sin(torch.zeros(2, 4), out=x)
    assert torch.equal(out, torch.zeros(2, 4))


def test_a_result_of_another_shape_raises(x: Any) -> None:
    with pytest.raises(RuntimeError, match="does not fit"):
        x.add_(torch.ones(3, 2, 4))


def test_a_write_keeps_the_dtype() -> None:
    x = Dual(torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
    x += Dual(torch.ones(3), torch.full((3,), 2.0))
    assert (x.dtype, x.tangent.dtype) == (torch.bfloat16, torch.bfloat16)
    assert x.tangent.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("function", [torch.relu_, F.elu_, torch.exp_, F.hardtanh_, torch.nn.functional.threshold_])
def test_functions_with_an_underscore(function: Callable) -> None:
    more = (0.5, 0.1) if function is F.threshold_ else ()
    primals, tangents = arguments()
    expected = difference(lambda x: function(x.clone(), *more), primals[:1], tangents[:1])
    actual = pfm.jvp(lambda x: function(x * 1.0, *more), primals[:1], tangents[:1])[1]
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


def test_two_names_of_one_dual_see_the_write(x: Any) -> None:
    same = x
    x *= 3.0
    assert same is x
    assert torch.equal(same.tangent, torch.full((2, 4), 1.5))


def test_a_write_in_a_module_that_asks_for_it() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2)).double()
    (x, _), (dx, _) = arguments()
    expected = torch.func.jvp(network, (x,), (dx,))
    torch.testing.assert_close(pfm.jvp(network, (x,), (dx,)), expected)


# ---- x.detach(): a plain tensor in the same memory, which sees later writes ----


def detached_before(x: Tensor) -> Tensor:
    h = x * 1.0
    old = h.detach()
    h += 1.0
    return h - old


def detached_view(x: Tensor) -> Tensor:
    h = x * 1.0
    v = h.detach().view(-1)
    h[0] = 5.0
    return h * v.sum()


def view_detached(x: Tensor) -> Tensor:
    h = x * 1.0
    v = h.view(-1).detach()
    h[0] = 5.0
    h *= 2.0
    return h * v.sum()


def detached_between_writes(x: Tensor) -> Tensor:
    h = x * 1.0
    v = h.detach()
    h[0] = 5.0
    w = h.detach()
    h *= 2.0
    u = h[:1].detach()
    h += 1.0
    return h * (v + w).sum() * u


def detached_then_zeroed(x: Tensor) -> Tensor:
    h = x * 3.0
    v = h.detach()
    h.zero_()
    h += x
    return h + v


DETACHED = [  # of ones along ones: values and tangents by hand
    (detached_before, [0.0, 0.0], [1.0, 1.0]),
    (detached_view, [30.0, 6.0], [0.0, 6.0]),
    (view_detached, [120.0, 24.0], [0.0, 24.0]),
    (detached_between_writes, [3388.0, 924.0], [0.0, 616.0]),
    (detached_then_zeroed, [2.0, 2.0], [1.0, 1.0]),
]


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["dual", "tensor"])
@pytest.mark.parametrize(("function", "value", "slope"), DETACHED, ids=lambda f: getattr(f, "__name__", ""))
def test_detached_values_see_later_writes(
    function: Callable, value: list[float], slope: list[float], as_tensor: bool, recorded: bool
) -> None:
    x = torch.ones(2).requires_grad_(recorded)
    assert function(torch.ones(2)).tolist() == value
    y, dy = pfm.jvp(function, (x,), (torch.ones(2),), as_tensor=as_tensor)
    assert (y.tolist(), dy.tolist()) == (value, slope)


def test_compiled_detached_values_see_later_writes() -> None:
    functions, one = [row[0] for row in DETACHED], torch.ones(2)
    compiled = torch.compile(
        lambda x, dx: [pfm.jvp(f, (x,), (dx,)) for f in functions], backend="aot_eager", fullgraph=True
    )
    for (y, dy), (_, value, slope) in zip(compiled(one, one), DETACHED, strict=True):
        assert (y.tolist(), dy.tolist()) == (value, slope)


def test_gradients_after_a_detached_value_was_written() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y, dy = pfm.jvp(detached_view, (x,), (torch.ones_like(x),), track_tangent=True)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 6.0]
    assert not dy.requires_grad  # the tangent does not depend on x


@pytest.mark.parametrize("recorded", [False, True])
def test_a_write_to_a_detached_value(recorded: bool) -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 1.0
        v = h.detach()
        h *= 2.0
        v += 1.0
        return h

    x = torch.ones(2).requires_grad_(recorded)
    if recorded:  # autograd's new value cannot stay in the old memory
        with pytest.raises(RuntimeError, match=r"detach\(\) gave was written to"):
            pfm.jvp(function, (x,), (torch.ones(2),))
    else:
        assert pfm.jvp(function, (x,), (torch.ones(2),))[0].tolist() == [3.0, 3.0]


def test_a_view_is_stale_after_a_write_to_what_was_detached() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 1.0
        h.detach()
        h *= 2.0
        row = h[0]
        h *= 2.0
        return row

    for recorded in (False, True):
        with pytest.raises(RuntimeError, match="after its owner was written to"):
            pfm.jvp(function, (torch.ones(2).requires_grad_(recorded),), (torch.ones(2),))


def test_a_leaf_that_was_detached_is_not_written() -> None:
    def function(x: Tensor) -> Tensor:
        x.detach()
        x += 1.0
        return x

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="was detached before"):
        pfm.jvp(function, (x,), (torch.ones(2),))
    assert x.tolist() == [1.0, 1.0]


def test_x_data_raises() -> None:
    for as_tensor in (False, True):
        with pytest.raises((AttributeError, NotImplementedError)):
            pfm.jvp(lambda x: (x * 1.0).data.mul_(2.0), (torch.ones(2),), (torch.ones(2),), as_tensor=as_tensor)
