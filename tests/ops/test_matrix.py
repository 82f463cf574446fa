"""Every op, {eager, compiled} x {forward, backward, jvp, jvp + backward, vmap}, against plain torch and by
gradcheck."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from pyflowmap import ops
from pyflowmap.ops import Noise
from pyflowmap.ops.combine_operator import _apply  # noqa: F401  (registers the operator)
from pyflowmap.reference import per_row
from pyflowmap.tangents import jvp as tangent_verb

B, EVENT = 3, (2, 5)


def tensors(seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(B, *EVENT, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, v, torch.randn(B, generator=rng, dtype=torch.float64).to(dtype)


NOISE = Noise(3)
FIELD = ops.combine((), ((1.0,),), noise=NOISE, like=torch.empty(B, *EVENT, dtype=torch.float64))[0]
MASK = (torch.arange(EVENT[-1]) % 2).double().view(1, 1, -1)


def _inner(a, b):
    return (a * b).flatten(1).sum(1)


# name -> (through our op, the same in plain torch), functions of (x, v, h)
def _plain(x, v, h):
    return ops.combine((x, v), ((1.0, h), (0.3, (2.0, h))))


def _plain_torch(x, v, h):
    h = per_row(h, 3)
    return x + h * v, 0.3 * x + 2 * h * v


def _noisy(x, v, h):
    return ops.combine((x, v), ((1.0, -1.0, (0.5, h)),), noise=NOISE)


def _noisy_torch(x, v, h):
    return (x - v + 0.5 * per_row(h, 3) * FIELD.to(x.dtype),)


def _gram(x, v, h):
    r = ops.combine((x, v), ((1.0, h), (-0.5, 1.0)), store=(True, False), gram=True, cross=True, sums=True)
    return (*r.outputs, r.gram, r.cross, r.sums)


def _gram_torch(x, v, h):
    y = (x + per_row(h, 3) * v, -0.5 * x + v)
    gram = torch.stack([torch.stack([_inner(a, b) for b in y], -1) for a in y], -2)
    cross = torch.stack([torch.stack([_inner(a, b) for b in (x, v)], -1) for a in y], -2)
    return y[0], gram, cross, torch.stack([a.flatten(1).sum(1) for a in y], -1)


def _noise_gram(x, v, h):
    r = ops.combine((x, v), ((1.0, 0.0, h), (0.0, h, -0.5)), noise=NOISE, store=(False, False), gram=True, cross=True)
    return r.gram, r.cross


def _noise_gram_torch(x, v, h):
    n, h = FIELD.to(x.dtype), per_row(h, 3)
    y = (x + h * n, h * v - 0.5 * n)
    table = lambda rows, columns: torch.stack([torch.stack([_inner(a, b) for b in columns], -1) for a in rows], -2)  # noqa: E731
    return table(y, y), table(y, (x, v, n))


def _masked(x, v, h):
    return ops.combine((x, v), ((1.0, 0.0), (0.5, 0.25)), mask=(MASK, ((-0.5, 0.5), (1.0, 0.0))))


def _masked_torch(x, v, h):
    m = MASK.to(x.dtype)
    return (1 - 0.5 * m) * x + 0.5 * m * v, (0.5 + m) * x + 0.25 * v


def _clamped(x, v, h):
    return ops.combine((x, v), ((1.0, h), (1.0, 1.0)), clamp=((-0.4, 0.7), None))


def _clamped_torch(x, v, h):
    return (x + per_row(h, 3) * v).clamp(-0.4, 0.7), x + v


def _clamped_gram(x, v, h):
    r = ops.combine((x, v), ((1.0, h),), clamp=((-0.4, 0.7),), gram=True, sums=True)
    return (*r.outputs, r.gram, r.sums)


def _clamped_gram_torch(x, v, h):
    y = (x + per_row(h, 3) * v).clamp(-0.4, 0.7)
    return y, _inner(y, y)[:, None, None], y.flatten(1).sum(1)[:, None]


def _wide(x, v, h):
    inputs = tuple(x * (i + 1) for i in range(6)) + tuple(v * (i + 1) for i in range(5))
    return ops.combine(inputs, ((*(0.1 * i for i in range(10)), h), (h,) * 11))


def _wide_torch(x, v, h):
    inputs = [x * (i + 1) for i in range(6)] + [v * (i + 1) for i in range(5)]
    h = per_row(h, 3)
    return sum(0.1 * i * a for i, a in enumerate(inputs[:10])) + h * inputs[10], sum(h * a for a in inputs)


def _full_gram(x, v, h):
    """Six outputs and six inputs: derivatives need more than one launch."""
    inputs = (x, v, x * 2, v * 3, x - v, x + v)
    r = ops.combine(
        inputs, tuple(tuple(h if (k + j) % 2 else 0.1 * (k - j) for j in range(6)) for k in range(6)), gram=True
    )
    return (*r.outputs[:1], r.gram)


def _full_gram_torch(x, v, h):
    inputs, h = (x, v, x * 2, v * 3, x - v, x + v), per_row(h, 3)
    y = [sum((h if (k + j) % 2 else 0.1 * (k - j)) * inputs[j] for j in range(6)) for k in range(6)]
    return y[0], torch.stack([torch.stack([_inner(a, b) for b in y], -1) for a in y], -2)


def _modulated(x, v, h):
    return (ops.norm_modulate(x, per_row(h, 2) * v[:, 0], v[:, 1]),)


def _modulated_torch(x, v, h):
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (normal * (1 + per_row(h, 3) * v[:, :1]) + v[:, 1:],)


def _modulated_rms(x, v, h):
    return (ops.norm_modulate(x, per_row(h, 3) * v, v, kind="rms", eps=0.1),)


def _modulated_rms_torch(x, v, h):
    return (x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * (1 + per_row(h, 3) * v) + v,)


def _gated(x, v, h):
    return (ops.gated_residual(x, v[:, 0], per_row(h, 3) * v),)


def _gated_torch(x, v, h):
    return (x + v[:, :1] * per_row(h, 3) * v,)


def _activated(x, v, h):
    return (ops.activation(x + per_row(h, 3) * v, "gelu_tanh"), ops.gated_unit(x, per_row(h, 3) * v, "silu"))


def _activated_torch(x, v, h):
    a = x + per_row(h, 3) * v
    tanh = torch.tanh((2.0 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))
    return 0.5 * a * (1.0 + tanh), x / (1.0 + torch.exp(-x)) * per_row(h, 3) * v


def _attended(x, v, h):
    q = torch.stack([x, per_row(h, 3) * v], 1)
    return ops.attention(q, v[:, None], x[:, None]), ops.attention(q, v[:, None], x[:, None], scale=0.7, causal=True)


def _attended_torch(x, v, h):
    logits = torch.stack([x, per_row(h, 3) * v], 1) @ v[:, None].mT
    seen = torch.ones(2, 2, dtype=torch.bool).tril()
    weights = (logits * 5**-0.5, torch.where(seen, 0.7 * logits, -torch.inf))
    return tuple(w.exp() / w.exp().sum(-1, keepdim=True) @ x[:, None] for w in weights)


def _turned(x, v, h):
    q, angle = torch.stack([x, v], 1)[..., :4], torch.arange(4, dtype=x.dtype).view(2, 2)
    return (ops.norm_rope(q, v.mean((0, 1))[:4] + h[0], angle.cos(), angle.sin(), eps=0.1),)


def _turned_torch(x, v, h):
    q = torch.stack([x, v], 1)[..., :4]
    q = q / (q.square().mean(-1, keepdim=True) + 0.1).sqrt() * (v.mean((0, 1))[:4] + h[0])
    turn = torch.polar(torch.ones(2, 2, dtype=x.dtype), torch.arange(4, dtype=x.dtype).view(2, 2))
    turned = torch.complex(q[..., :2], q[..., 2:]) * turn
    return (torch.cat([turned.real, turned.imag], -1),)


def _timed(x, v, h):
    return (ops.time_embedding(h, x[:, 0, 0] + v[:, 1, 1], torch.arange(1.0, 4.0), dtype=x.dtype),)


def _timed_torch(x, v, h):
    a, b = (each[:, None] * torch.arange(1.0, 4.0) for each in (h, x[:, 0, 0] + v[:, 1, 1] - h))
    return (torch.cat([a.cos(), a.sin(), b.cos(), b.sin()], 1),)


CASES = {
    name[1:]: (function, globals()[f"{name}_torch"])
    for name, function in list(globals().items())
    if f"{name}_torch" in globals()
}
OPS = {  # the rest are cases of `combine`
    "activation": {"activated"},
    "gated_unit": {"activated"},
    "norm_modulate": {"modulated", "modulated_rms"},
    "gated_residual": {"gated"},
    "attention": {"attended"},
    "norm_rope": {"turned"},
    "time_embedding": {"timed"},
}
DRAWS = {"noisy", "noise_gram"}  # noise has no sample ids inside vmap: refused
HEAVY = {"wide", "full_gram"}
every_case = pytest.mark.parametrize("case", CASES)


def cells(cases=tuple(CASES), inductor="noise_gram"):
    """All cases in eager and aot_eager; inductor, which takes a C++ compiler ten seconds a cell, on the richest one."""
    quick = [(mode, case) for mode in ("eager", "aot_eager") for case in cases]
    return pytest.mark.parametrize("mode, case", [*quick, pytest.param("inductor", inductor, marks=pytest.mark.slow)])


def test_every_op_is_in_the_matrix():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == {"combine", *OPS} and set().union(*OPS.values()) < set(CASES)


def compiled(function, mode):
    if mode == "eager":
        return function
    torch._dynamo.reset()
    return torch.compile(function, backend=mode, fullgraph=True)


def same(got, want, rtol=1e-9, atol=1e-9):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def total(values):
    """A loss that weighs every number differently."""
    weights = [torch.arange(y.numel(), dtype=y.dtype).mul(1.7).add(0.3).sin().view(y.shape) for y in values]
    return sum((w * y).sum() for w, y in zip(weights, values, strict=True))


@cells()
def test_forward(case, mode):
    ours, theirs = CASES[case]
    same(compiled(ours, mode)(*tensors()), theirs(*tensors()))


@cells()
def test_backward(case, mode):
    ours, theirs = CASES[case]
    grads = []
    for function in (compiled(lambda *a: total(ours(*a)), mode), lambda *a: total(theirs(*a))):
        leaves = [t.requires_grad_() for t in tensors()]
        function(*leaves).backward()
        grads.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    same(*grads)


@cells()
def test_jvp(case, mode):
    """Also the guard against a tangent that is zero in silence: it must be non-zero wherever torch's is."""
    ours, theirs = CASES[case]

    def tangent(function):
        return lambda *a: torch.func.jvp(function, a[:3], a[3:])

    arguments = (*tensors(), *tensors(1))
    y, dy = compiled(tangent(ours), mode)(*arguments)
    want, d_want = tangent(theirs)(*arguments)
    same(y, want)
    same(dy, d_want)
    assert all((d != 0).any() for d in dy)


@cells([c for c in CASES if c not in HEAVY])
@pytest.mark.parametrize("through", ["primal", "tangent"])
def test_jvp_and_backward(case, through, mode):
    """The gradient of a loss on the primal, and on the tangent (what MeanFlow with a full second order asks for)."""
    ours, theirs = CASES[case]
    which = 0 if through == "primal" else 1

    def loss(function):
        return lambda *a: total(torch.func.jvp(function, a[:3], a[3:])[which])

    grads = []
    for function in (compiled(loss(ours), mode), loss(theirs)):
        leaves = [t.requires_grad_() for t in (*tensors(), *tensors(1))]
        function(*leaves).backward()
        grads.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    same(*grads)


@cells(inductor="gram")
def test_vmap(case, mode):
    ours, theirs = CASES[case]
    stacked = [torch.stack(pair) for pair in zip(tensors(), tensors(1), strict=True)]
    function = compiled(lambda *a: torch.func.vmap(ours, in_dims=(0, 0, None))(*a), mode)
    arguments = (*stacked[:2], stacked[2][0])
    if case in DRAWS:
        with pytest.raises(Exception, match=r"noise inside torch\.func\.vmap"):
            function(*arguments)
        return
    got = function(*arguments)
    rows = [theirs(x, v, stacked[2][0]) for x, v in zip(*stacked[:2], strict=True)]
    same(got, [torch.stack(ys) for ys in zip(*rows, strict=True)])


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", sorted(set().union(*OPS.values())))
def test_dual(case, mode):
    """Dual numbers in place of forward-mode AD: value, tangent, and the gradient of a loss on the tangent."""
    ours, theirs = CASES[case]
    results = []
    for function, derivative in ((ours, _dual), (theirs, torch.func.jvp)):
        leaves = [t.requires_grad_() for t in (*tensors(), *tensors(1))]
        run = compiled(lambda *a, f=function, d=derivative: d(f, a[:3], a[3:]), mode if function is ours else "eager")
        y, dy = run(*leaves)
        grads = torch.autograd.grad(total(dy), leaves, materialize_grads=True)
        results.append([*y, *dy, *grads])
    same(*results)


def _dual(function, primals, tangents):
    return tangent_verb(function, primals, tangents, track_tangent=True)


def test_vmap_over_gradients_and_other_axes():
    x, v, h = tensors()
    ours, theirs = CASES["gram"]
    per_weight = lambda f: torch.func.vmap(  # noqa: E731
        torch.func.grad(lambda x, h: total(f(x, v, h)), argnums=(0, 1)), in_dims=(1, None)
    )(torch.stack([x, 2 * x], 1), h)
    same(per_weight(ours), per_weight(theirs))
    same(
        torch.func.jacrev(lambda h: ours(x, v, h)[1])(h)[None], torch.func.jacrev(lambda h: theirs(x, v, h)[1])(h)[None]
    )
    same(
        torch.func.jacfwd(lambda h: ours(x, v, h)[1])(h)[None], torch.func.jacfwd(lambda h: theirs(x, v, h)[1])(h)[None]
    )


@every_case
def test_gradcheck(case):
    leaves = [t.requires_grad_() for t in tensors()]
    slim = [t[:2, :, :2].detach().clone().requires_grad_() if t.ndim == 3 else t for t in leaves]
    ours = CASES[case][0]
    arguments = slim if case in ("plain", "gram", "wide", "full_gram") else leaves
    if arguments is slim:
        arguments[2] = leaves[2][:2].detach().clone().requires_grad_()
    assert gradcheck(ours, arguments, check_forward_ad=True, check_undefined_grad=False)
    if case not in HEAVY:
        assert gradgradcheck(ours, arguments)


def test_dual_level_without_functorch():
    x, v, h = tensors()
    with fwAD.dual_level():
        (y, _) = ops.combine((fwAD.make_dual(x, v), v), ((1.0, fwAD.make_dual(h, h)), (1.0, 1.0)))
        primal, tangent = fwAD.unpack_dual(y)
    torch.testing.assert_close(primal, x + per_row(h, 3) * v)
    torch.testing.assert_close(tangent, v + per_row(h, 3) * v)


def test_shared_and_zero_dimensional_coefficients():
    """One vector in many places collects all its gradients; a 0-d one is summed over the batch."""
    x, v, h = tensors()
    s = torch.tensor(0.7, dtype=torch.float64)
    ours = lambda x, v, h, s: ops.combine((x, v), ((h, (2.0, h)), (s, (-1.0, s))))  # noqa: E731
    theirs = lambda x, v, h, s: (per_row(h, 3) * (x + 2 * v), s * (x - v))  # noqa: E731
    leaves = [t.requires_grad_() for t in (x, v, h, s)]
    same(torch.autograd.grad(total(ours(*leaves)), leaves), torch.autograd.grad(total(theirs(*leaves)), leaves))


def test_half_precision_gradients_keep_their_dtype():
    x, v, h = (t.bfloat16().requires_grad_() for t in tensors())
    (y,) = ops.combine((x, v.float()), ((1.0, h),), dtype=torch.float32)
    gx, gh = torch.autograd.grad(y.sum(), (x, h))
    assert gx.dtype == gh.dtype == torch.bfloat16 and (gx == 1).all()
    torch.testing.assert_close(gh.double(), v.double().flatten(1).sum(1), rtol=2**-7, atol=2**-7)


def test_opcheck():
    x, v, h = tensors(dtype=torch.float32)
    scalars = torch.tensor([[1.0, 0.5, 0.1]], dtype=torch.float64)
    arguments = (
        [x, v],
        [h],
        scalars,
        x,
        None,
        None,
        3,
        None,
        0,
        None,
        None,
        True,
        1,
        1,
        [-1, 0, -1],
        [],
        [False],
        [0.0, 0.0],
    )
    torch.library.opcheck(torch.ops.pyflowmap.combine.default, (*arguments, [0], [True], True, True, True))


@pytest.mark.parametrize("what", ["step", "seed"])
def test_new_numbers_do_not_recompile(what):
    """Twenty step sizes, or seeds, through one compiled function: one graph, and one more when it turns symbolic."""
    from torch._dynamo.utils import counters

    x, v, _ = tensors(dtype=torch.float32)

    def step(x, v, number):
        if what == "step":
            return ops.combine((x, v), ((1.0, number), (number * number, -number)))
        return ops.combine((x,), ((1.0, 0.5),), noise=Noise(number))

    function = compiled(step, "aot_eager")
    counters.clear()
    for i in range(20):
        number = 0.05 * (i + 1) if what == "step" else 1000 + i
        same(function(x, v, number), step(x, v, number), rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] <= 2


def test_checkpoint():
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        leaves = [t.requires_grad_() for t in tensors()]
        total(wrap(CASES["noise_gram"][0], *leaves)).backward()
        grads.append([t.grad for t in leaves])
    same(*grads)


def test_mask_is_never_silently_constant():
    """It has no derivative, and says so on every road."""
    x, m = torch.randn(2, 3), torch.rand(2, 3)
    call = lambda m: ops.combine((x,), ((0.0,),), mask=(m, ((1.0,),)))[0]  # noqa: E731
    for bad in (
        lambda: torch.func.jvp(call, (m,), (m,)),
        lambda: torch.func.grad(lambda m: call(m).sum())(m),
        lambda: call(m.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match=r"mask.*detach"):
            bad()
    h = torch.rand(2, requires_grad=True)
    with pytest.raises(ValueError, match="detach"):
        ops.combine((x,), ((h,),), mask=(m, ((1.0,),)))[0].sum().backward()
    with pytest.raises(ValueError, match="detach"):
        torch.func.jvp(lambda h: ops.combine((x,), ((h,),), mask=(m, ((1.0,),)))[0], (h.detach(),), (h.detach(),))
