"""The attention kernel itself: the module's functions on outputs made here, against `reference.attention` in float64.

The yardstick of an error is what plain torch makes of the same formula in the kernel's arithmetic: the kernel may be
as wrong as that (the order of its sums is another), and half a unit in the last place of the storage type.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyflowmap import _C, reference
from pyflowmap.ops import backend as backends

TANGENTS = ("dq", "dk", "dv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["cpu"])
def module(request: pytest.FixtureRequest) -> Any:
    return _C if request.param == "cpu" else backends.simt()


# ---- a case ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Operands of one call; gradients are of (o, do) with respect to (q, k, v, dq, dk, dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    go: Tensor | None = None
    gdo: Tensor | None = None
    scale: float = 1.0
    causal: bool = False

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:3], self.v.shape[3])


def make(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int = 65,
    keys: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    tangents: tuple[str, ...] = TANGENTS,
    causal: bool = False,
    seed: int = 0,
    size: float = 1.0,
    tangent_size: float = 1.0,
    **rest: Any,
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    kv_heads, keys, value_dim = kv_heads or heads, queries if keys is None else keys, value_dim or dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k, v = draw(batch, heads, queries, dim), draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, value_dim)
    moves = [tangent_size * draw(*x.shape) if name in tangents else None for name, x in zip(TANGENTS, (q, k, v))]
    go, gdo = draw(batch, heads, queries, value_dim), draw(batch, heads, queries, value_dim) / tangent_size
    cast = lambda x: None if x is None else x.to(dtype)  # noqa: E731
    rest.setdefault("scale", dim**-0.5)
    rest.setdefault("go", cast(go))
    rest.setdefault("gdo", cast(gdo))
    return Case(cast(size * q), cast(k), cast(v), *map(cast, moves), causal=causal, **rest)


# ---- the kernel -----------------------------------------------------------------------------------------------------


def sums_of(case: Case) -> torch.dtype:
    return torch.float64 if case.q.dtype == torch.float64 else torch.float32


def forward(module: Any, case: Case, tangent: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(o, do, lse, mu); outputs start as NaN, so that what is not written shows."""
    o, d_o = (torch.full(case.out_shape, math.nan, dtype=case.q.dtype) for _ in range(2))
    lse, mu = (torch.full(case.out_shape[:3], math.nan, dtype=sums_of(case)) for _ in range(2))
    given = (*case.operands, o, d_o if tangent else None, lse, mu)
    assert module.attention_forward(given, case.scale, case.causal) is True
    return o, d_o if tangent else None, lse, mu


def backward(module: Any, case: Case, wanted: str = "qkvQKV") -> list[Tensor | None]:
    """Gradients of q, k, v, dq, dk, dv (Q, K, V): through o alone where gdo is None. Those not wanted are None."""
    o, d_o, lse, mu = forward(module, case, tangent=case.gdo is not None)
    shapes = [x.shape for x in (case.q, case.k, case.v)] * 2
    out = [
        torch.full(shape, math.nan, dtype=case.q.dtype) if name in wanted else None
        for name, shape in zip("qkvQKV", shapes)
    ]
    if case.gdo is None:
        out[3:] = [None] * 3
    given = (*case.operands, o, d_o, lse, mu, case.go, case.gdo, *out)
    assert module.attention_backward(given, case.scale, case.causal) is True
    return out


# ---- what is exact --------------------------------------------------------------------------------------------------


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x  # noqa: E731
    return Case(*map(cast, case))


def value(case: Case) -> Any:
    return lambda q, k, v: reference.attention(q, k, v, case.mask, case.lengths, case.scale, case.causal)


def push(case: Case, *primals: Tensor) -> tuple[Tensor, Tensor]:
    tangents = [torch.zeros_like(x) if d is None else d for d, x in zip(case[3:6], primals)]
    return torch.func.jvp(value(case), primals, tuple(tangents))


def pull(case: Case) -> list[Tensor]:
    """Gradients of <go, o> + <gdo, do> with respect to q, k, v, dq, dk, dv, by autograd of the JVP."""
    primals = [x.detach().requires_grad_() for x in case[:3]]
    if case.gdo is None:
        return list(torch.autograd.grad((value(case)(*primals) * case.go).sum(), primals))
    tangents = [(torch.zeros_like(x) if d is None else d).detach().requires_grad_() for d, x in zip(case[3:6], primals)]
    o, d_o = torch.func.jvp(value(case), tuple(primals), tuple(tangents))
    total = (d_o * case.gdo).sum() + (0 if case.go is None else (o * case.go).sum())
    return list(torch.autograd.grad(total, primals + tangents))


def assert_as_good(
    got: Tensor, exact: Tensor, yardstick: Tensor, what: str, slack: float = 0.5, cancels: float = 0.0
) -> None:
    """|got - exact| <= 1.5 max|yardstick - exact| + slack units in the last place of the storage type.

    A few units of the arithmetic are allowed on top, where plain torch happens to be exact (one key, one dimension):
    of the result, or of `cancels`, the size of what cancels in it.
    """
    assert got.isfinite().all(), f"{what}: not finite"
    eps, arithmetic = torch.finfo(got.dtype).eps, torch.finfo(yardstick.dtype).eps
    most = exact.abs().max().item() if exact.numel() else 0.0
    most = max(most, cancels)
    noise = 1.5 * (yardstick.double() - exact).abs().max().item() if exact.numel() else 0.0
    tiny = torch.finfo(got.dtype).smallest_normal
    allowed = noise + 8 * arithmetic * most + slack * eps * (exact.abs() if slack == 0.5 else most) + tiny
    error = (got.double() - exact).abs()
    assert (error <= allowed).all(), f"{what}: off by {error.max():.3g}, allowed {noise + 8 * arithmetic * most:.3g}"


def check_forward(module: Any, case: Case, tangent: bool = True) -> None:
    wide, plain = as_dtype(case, torch.float64), as_dtype(case, sums_of(case))
    o, d_o, lse, mu = forward(module, case, tangent)
    (exact, d_exact), (torch_o, torch_do) = push(wide, *wide[:3]), push(plain, *plain[:3])
    assert_as_good(o, exact, torch_o, "o")
    if tangent:
        assert_as_good(d_o, d_exact, torch_do, "do")
    # lse is the log of the normaliser, mu the mean tangent of the scores: the tangent of lse.
    ones = lambda c: c._replace(v=torch.ones_like(c.v[..., :1]), dv=None)  # noqa: E731
    (l_exact, m_exact), (l_plain, m_plain) = (log_sum(ones(wide)), log_sum(ones(plain)))
    blind = l_exact == -math.inf
    assert (lse[blind] == -math.inf).all() and (mu[blind] == 0).all() and (o[blind] == 0).all()
    assert_as_good(lse[~blind], l_exact[~blind], l_plain[~blind], "lse")
    if tangent:
        assert_as_good(mu[~blind], m_exact[~blind], m_plain[~blind], "mu")


def log_sum(case: Case) -> tuple[Tensor, Tensor]:
    """lse and its tangent, written out: through torch.logsumexp of the scores that are seen."""
    shared = case.q.shape[1] // case.k.shape[1]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return case.scale * (q @ k.repeat_interleave(shared, 1).transpose(-2, -1))

    s = scores(case.q, case.k)
    _, ds = torch.func.jvp(
        scores, (case.q, case.k), tuple(torch.zeros_like(x) if d is None else d for d, x in zip(case[3:5], case[:2]))
    )
    keys = torch.arange(case.k.shape[2])
    if case.mask is not None:
        s = s.masked_fill(~case.mask, -math.inf) if case.mask.dtype == torch.bool else s + case.mask.to(s.dtype)
    if case.lengths is not None:
        s = s.masked_fill(keys >= case.lengths.view(-1, 1, 1, 1), -math.inf)
    if case.causal:
        s = s.masked_fill(keys > torch.arange(s.shape[2])[:, None], -math.inf)
    lse = s.logsumexp(-1) if s.shape[-1] else torch.full(s.shape[:3], -math.inf, dtype=s.dtype)
    return lse, (torch.where(s == -math.inf, 0, (s - lse[..., None]).exp()) * ds).sum(-1)


def check_backward(module: Any, case: Case) -> None:
    """Of 16-bit operands, O enters the row sums as it was rounded: a few units of the largest gradient more."""
    wide = as_dtype(case, torch.float64)
    exact, plain = pull(wide), pull(as_dtype(case, sums_of(case)))
    slack = 4.0 if case.q.dtype.itemsize == 2 else 0.5
    # The gradient of a score is P (go V' - go O): what it is a difference of, times the other factor of the score.
    o, d_o = push(wide, *wide[:3])
    largest = lambda *tensors: max((x.abs().max().item() for x in tensors if x is not None and x.numel()), default=0.0)  # noqa: E731
    size = lambda g, y: 0.0 if g is None or not y.numel() else (g * y).abs().sum(-1).max().item()  # noqa: E731
    factor, shift = abs(case.scale) * largest(case.q, case.k), 1 + largest(case.dq, case.dk) * abs(case.scale)
    primal = factor * (size(wide.go, o) + size(wide.gdo, d_o)) + factor * shift * size(wide.gdo, o)
    cancels = (primal, primal, 0.0, factor * size(wide.gdo, o), factor * size(wide.gdo, o), 0.0)
    names = ("gq", "gk", "gv", "gdq", "gdk", "gdv")
    for name, got, e, t, c in zip(names, backward(module, case), exact, plain, cancels):
        assert got is not None
        assert_as_good(got, e, t, name, slack, c)


def check(module: Any, case: Case) -> None:
    check_forward(module, case)
    check_backward(module, case)
    check_backward(module, case._replace(gdo=None))


# ---- forward and backward over the contract -------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [s for n in range(4) for s in itertools.combinations(TANGENTS, n)])
def test_each_subset_of_tangents(module, dtype, tangents):
    check(module, make(dtype=dtype, tangents=tangents, dim=8))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_forward_is_the_value_alone(module, dtype):
    case = make(dtype=dtype)
    check_forward(module, case, tangent=False)
    assert torch.equal(forward(module, case, tangent=False)[0], forward(module, case)[0])


@pytest.mark.sanitizer
@pytest.mark.parametrize("queries", [1, 17, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_lengths_of_rows(module, queries, causal):
    check(module, make(batch=1, queries=queries, dim=24, causal=causal, seed=queries))


@pytest.mark.sanitizer
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (300, 1), (17, 65), (129, 200)])
def test_cross_attention(module, queries, keys):
    check(module, make(batch=1, queries=queries, keys=keys, dim=8, seed=keys))


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 32, 40, 48, 64, 72, 80, 96, 128, 256])
def test_head_dims(module, dim):
    check(module, make(batch=1, queries=33, dim=dim, seed=dim))


@pytest.mark.sanitizer
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 40), (72, 8), (1, 33), (100, 1), (300, 5)])
def test_values_of_another_size(module, dim, value_dim):
    check(module, make(batch=1, queries=40, dim=dim, value_dim=value_dim, seed=dim))


@pytest.mark.sanitizer
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_share_keys(module, heads, kv_heads, causal):
    check(module, make(heads=heads, kv_heads=kv_heads, queries=70, dim=8, causal=causal))


@pytest.mark.sanitizer
@pytest.mark.parametrize("lengths", [(0, 33), (65, 1), (64, -5), (1000, 17)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(module, lengths, causal):
    check(module, make(lengths=torch.tensor(lengths), causal=causal))


def boolean_mask(*shape: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[..., : min(3, shape[2]), :] = False  # queries that see nothing
    return mask


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(2, 2, 65, 70), (1, 2, 65, 70), (2, 1, 1, 70), (1, 1, 65, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_masks(module, shape, kind):
    mask = boolean_mask(*shape)
    if kind != torch.bool:
        hidden = torch.zeros(shape).masked_fill(~mask, -math.inf)
        mask = (torch.randn(shape, generator=torch.Generator().manual_seed(6)) + hidden).to(kind)
    case = make(queries=65, keys=70, dim=8, mask=mask)
    check(module, case)
    lengths, scores = torch.tensor([70, 30]), case._replace(scale=-0.3)
    check(module, scores._replace(lengths=lengths))


@pytest.mark.sanitizer
@pytest.mark.parametrize("last", ["transposed", "every second"])
def test_masks_of_any_stride(module, last):
    mask = boolean_mask(2, 1, 70, 130)
    mask = boolean_mask(2, 1, 70, 65).transpose(2, 3) if last == "transposed" else mask[:, :, :65, :140:2][..., :65]
    case = make(mask=mask[:, :, :65, :65].contiguous() if last != "transposed" else mask, queries=mask.shape[2], keys=mask.shape[3])
    strided = case._replace(mask=mask[:, :, : mask.shape[2]])
    assert torch.equal(forward(module, case)[1], forward(module, strided)[1])
    check(module, strided)


@pytest.mark.sanitizer
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.3])
def test_any_scale(module, scale):
    check(module, make(scale=scale, queries=37))


@pytest.mark.sanitizer
def test_mask_with_causal_and_lengths(module):
    mask = boolean_mask(2, 1, 150, 150)
    check(module, make(queries=150, dim=8, mask=mask, causal=True, lengths=torch.tensor([140, 9])))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(module, dtype):
    """(B, S, H, D) layouts, a fused projection, shared samples and heads: the bits of contiguous copies."""
    case = make(dtype=dtype, queries=70, heads=4, kv_heads=2)
    turned = [x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:6]]
    padded = [F.pad(x, (3, 5))[..., 3:-5] for x in turned]
    views = case._replace(**dict(zip(("q", "k", "v", "dq", "dk", "dv"), padded)))
    for a, b in zip(forward(module, case), forward(module, views)):
        assert torch.equal(a, b)
    for a, b in zip(backward(module, case), backward(module, views)):
        assert torch.equal(a, b)
    shared = case._replace(k=case.k[:1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v))
    dense = shared._replace(k=shared.k.contiguous(), v=shared.v.contiguous())
    for a, b in zip(forward(module, shared), forward(module, dense)):
        assert torch.equal(a, b)


@pytest.mark.sanitizer
def test_outputs_of_any_stride(module):
    case = make(queries=40)
    o, d_o, lse, mu = forward(module, case)
    wide = torch.full((2, 40, 2, 16 + 4), math.nan)
    out, d_out = wide.transpose(1, 2)[..., 2:-2], wide.clone().transpose(1, 2)[..., 2:-2]
    assert module.attention_forward((*case.operands, out, d_out, lse, mu), case.scale, False) is True
    assert torch.equal(out, o) and torch.equal(d_out, d_o)
    assert wide[..., :2].isnan().all() and wide[..., -2:].isnan().all()


@pytest.mark.sanitizer
@pytest.mark.parametrize("wanted", ["q", "kV", "vQ", "K", "qkvK"])
def test_gradients_that_are_asked_for(module, wanted):
    case = make(queries=40)
    for some, all_ in zip(backward(module, case, wanted), backward(module, case)):
        assert some is None or torch.equal(some, all_)


@pytest.mark.sanitizer
def test_cotangent_of_the_tangent_alone(module):
    check_backward(module, make(go=None))
    check_backward(module, make(go=None, tangents=()))


@pytest.mark.sanitizer
def test_empty_sizes(module):
    o, d_o, lse, mu = forward(module, make(queries=5, keys=0))
    assert (o == 0).all() and (d_o == 0).all() and (lse == -math.inf).all() and (mu == 0).all()
    assert all((g == 0).all() for g in backward(module, make(queries=5, keys=0)))
    assert all((g == 0).all() for g in backward(module, make(queries=0, keys=5)))
    assert all(g.numel() == 0 for g in backward(module, make(batch=0)))


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tangent_size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangents_of_any_size(module, tangent_size, dtype):
    check(module, make(dtype=dtype, queries=130, dim=64, tangent_size=tangent_size))


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(module, causal):
    """Scores of some hundreds: exp of one of them overflows, its difference from the maximum does not."""
    case = make(size=1e2, queries=300, dim=64, causal=causal)
    check_forward(module, case)
    check_backward(module, case)


@pytest.mark.sanitizer
def test_a_rising_maximum(module):
    """Every block of keys brings a larger score: the accumulators are rescaled each time."""
    case = make(batch=1, heads=1, queries=20, keys=600, dim=4)
    slope = torch.linspace(-30, 60, 600).view(1, 1, 1, 600)
    check(module, case._replace(mask=slope))


def test_exponential(module):
    """One query, two keys: the weights are 1 / (1 + e^-x), so lse - x = log1p(e^-x) shows e^-x; values show it too."""
    x = torch.cat([torch.linspace(0, 87, 4000), torch.logspace(-6, 1, 500)])
    q, k = x.view(1, 1, -1, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)  # o = e^-x / (1 + e^-x): e^-x itself for large x
    o = forward(module, Case(q, k, v), tangent=False)[0].double().flatten()
    exact = torch.sigmoid(-x.double())
    eps = torch.finfo(torch.float32).eps
    assert ((o - exact).abs() <= 4 * eps * exact).all()  # 2 ulp of e^-x, a sum, a division


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_no_worse_than_torch(module, dtype, causal):
    """Torch's own fused attention in the same dtype, and the JVP of its composition; worst and mean error."""
    case = make(dtype=dtype, queries=300, dim=64, causal=causal)
    wide = as_dtype(case, torch.float64)
    (exact, d_exact), (_, d_torch) = push(wide, *wide[:3]), push(case, *case[:3])
    torch_o = F.scaled_dot_product_attention(*case[:3], is_causal=causal, scale=case.scale)
    o, d_o, *_ = forward(module, case)
    for got, by_torch, right in ((o, torch_o, exact), (d_o, d_torch, d_exact)):
        ours, theirs = (got.double() - right).abs(), (by_torch.double() - right).abs()
        assert ours.max() <= 1.5 * theirs.max()
        assert ours.mean() <= 1.2 * theirs.mean()


@pytest.mark.sanitizer
@pytest.mark.parametrize("causal", [True, False])
def test_hidden_values_are_not_looked_at(module, causal):
    """NaN in a hidden key, its value, their tangents changes no bit; nor does a query that sees nothing."""
    lengths = None if causal else torch.tensor([65, 40])
    case = make(causal=causal, lengths=lengths, queries=70)
    if causal:  # keys from 37 on are hidden from the queries before
        spoil, rows = (lambda x: x[:, :, 37:]), slice(0, 37)
    else:
        spoil, rows = (lambda x: x[1, :, 40:]), slice(0, 70)
    bad = {name: getattr(case, name).clone() for name in ("k", "v", "dk", "dv")}
    for x in bad.values():
        spoil(x).fill_(math.nan)
    spoiled = case._replace(**bad)
    for a, b in zip(forward(module, case), forward(module, spoiled)):
        assert torch.equal(a[:, :, rows], b[:, :, rows])
    for name, a, b in zip("qkvQKV", backward(module, case), backward(module, spoiled)):
        if name in "qQ":
            assert torch.equal(a[:, :, rows], b[:, :, rows])


@pytest.mark.sanitizer
def test_blind_queries_give_nothing(module):
    case = make(mask=torch.ones(1, 1, 65, 65, dtype=torch.bool).index_fill(2, torch.tensor([0, 9]), False))
    bad = {name: getattr(case, name).clone() for name in ("q", "dq", "go", "gdo")}
    for x in bad.values():
        x[:, :, [0, 9]] = math.nan
    for a, b in zip(backward(module, case), backward(module, case._replace(**bad))):
        assert torch.equal(a, b)


@pytest.mark.sanitizer
def test_nan_is_seen(module):
    case = make(queries=20)
    case.q[0, 0, 3] = math.nan
    case.v[1, 1, 5, 2] = math.inf
    o, d_o, lse, _ = forward(module, case)
    assert o[0, 0, 3].isnan().all() and d_o[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert not o[1, 1, :, 2].isfinite().any()
    assert o[0, 1].isfinite().all() and o[0, 0, :3].isfinite().all()


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_threads_do_not_change_bits(module, causal):
    """Several units for each thread; and one head long enough that its keys are cut into runs."""
    before = torch.get_num_threads()
    for case in (make(queries=300, dim=32, causal=causal), make(batch=1, heads=2, kv_heads=1, queries=1100, dim=8, causal=causal)):
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append([*forward(module, case), *backward(module, case), *backward(module, case._replace(gdo=None))[:3]])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_cut_into_runs(module, causal, kv_heads):
    check(module, make(batch=1, heads=2, kv_heads=kv_heads, queries=1100, dim=8, causal=causal, lengths=torch.tensor([1090])))


def test_instruction_sets_agree():
    """Each is as good as the yardstick by itself; `check` under every one."""
    ours = _C.build()["isa"]
    names = ("base", "v3", "v4")
    try:
        for name in names[: names.index(ours) + 1]:
            _C.set_isa(name)
            for dtype in DTYPES:
                check(_C, make(dtype=dtype, queries=150, dim=40, value_dim=24, causal=True))
                check(_C, make(dtype=dtype, queries=70, keys=130, dim=5, mask=boolean_mask(2, 2, 70, 130)))
    finally:
        _C.set_isa(ours)


def test_memory_does_not_grow_with_queries_times_keys():
    """4096 x 4096 scores are 64 MB; the call may touch a tenth of that."""
    program = """
import resource, torch
from pyflowmap import _C
torch.set_num_threads(2)
x = [torch.ones(1, 2, 4096, 16) for _ in range(6)]
out = [torch.ones(1, 2, 4096, 16) for _ in range(10)]
lse, mu = torch.ones(1, 2, 4096), torch.ones(1, 2, 4096)
def run(n):
    cut = lambda t: t[:, :, :n]
    a = tuple(map(cut, x)) + (None, None) + tuple(map(cut, out[:2])) + (lse[..., :n].contiguous(), mu[..., :n].contiguous())
    assert _C.attention_forward(a, 0.25, False) and _C.attention_backward(a + tuple(map(cut, out[2:])), 0.25, False)
run(32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 1024  # KiB: ten operands of half a MB each in scratch and partial sums
