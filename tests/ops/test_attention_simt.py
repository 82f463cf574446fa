"""Attention forward, with and without a tangent: the CUDA source in the emulator against float64 and torch.func.jvp."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tolerance import assert_within
from torch import Tensor

from pyflowmap.ops import backend as backends

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALL, ONLY_Q, NONE = "qkv", "q", ""


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 65
    keys: int = 65
    head_dim: int = 64
    value_dim: int = 64
    tangents: str = ALL
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    mask: str | None = None  # "bool", "add", "f16": shapes below
    tokens_first: bool = False  # (B, S, H, D) in memory
    size: float = 1.0  # of the tangents
    scale: float | None = None


@dataclass
class Inputs:
    case: Case
    primals: list[Tensor]
    tangents: list[Tensor | None]
    mask: Tensor | None
    lengths: Tensor | None
    scale: float


def inputs(case: Case, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int, columns: int, size: float = 1.0) -> Tensor:
        shape = (case.batch, tokens, heads, columns) if case.tokens_first else (case.batch, heads, tokens, columns)
        x = (size * torch.randn(shape, generator=rng)).to(case.dtype)
        return x.transpose(1, 2) if case.tokens_first else x

    shapes = (
        (case.heads, case.queries, case.head_dim),
        (case.kv_heads, case.keys, case.head_dim),
        (case.kv_heads, case.keys, case.value_dim),
    )
    primals = [draw(*shape) for shape in shapes]
    tangents = [
        draw(*shape, case.size) if name in case.tangents else None for name, shape in zip("qkv", shapes, strict=True)
    ]
    mask = None
    if case.mask == "bool":
        mask = torch.rand(case.batch, case.heads, case.queries, case.keys, generator=rng) < 0.6
        mask[:, 0, case.queries // 2] = False  # a query that sees nothing
        mask[:, :, 0, : case.keys - 1] = False  # one that sees the last key alone
    elif case.mask is not None:  # shared by samples and heads; a whole tile of keys hidden from one query
        mask = torch.randn(1, 1, case.queries, case.keys, generator=rng)
        mask[torch.rand(mask.shape, generator=rng) < 0.2] = -math.inf
        mask[..., -1, :] = -math.inf
        mask[..., 1, :64] = -math.inf
        mask = mask.to({"add": case.dtype, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}[case.mask])
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return Inputs(case, primals, tangents, mask, lengths, scale)


def attention(x: Inputs) -> dict[str, Tensor]:
    """What the kernel writes, into memory full of NaN."""
    case, (q, k, v) = x.case, x.primals
    shape = (case.batch, case.queries, case.heads, case.value_dim)
    blank = torch.full(shape, math.nan, dtype=case.dtype)
    o = blank.transpose(1, 2) if case.tokens_first else blank.transpose(1, 2).contiguous()
    rows = torch.full((case.batch, case.heads, case.queries), math.nan)
    out = {"o": o, "lse": rows}
    if case.tangents:
        out |= {"do": o.clone(), "mu": rows.clone()}
    tensors = (q, k, v, *x.tangents, x.mask, x.lengths, o, out.get("do"), rows, out.get("mu"))
    assert backends.simt().attention_forward(tensors, x.scale, case.causal)
    return out


# ---- the reference, and how far from it a kernel may be --------------------------------------------------------------


def hidden(x: Inputs) -> Tensor:
    case = x.case
    gone = torch.zeros(case.batch, case.heads, case.queries, case.keys, dtype=torch.bool)
    if case.causal:
        gone |= torch.ones(case.queries, case.keys).triu(1).bool()
    if x.lengths is not None:
        gone |= torch.arange(case.keys) >= x.lengths.clamp(0, case.keys).view(-1, 1, 1, 1)
    if x.mask is not None:
        gone |= ~x.mask if x.mask.dtype == torch.bool else x.mask == -math.inf
    return gone


def reference(x: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(exact, allowed error), both float64."""
    case, gone = x.case, hidden(x)
    blind = gone.all(-1, keepdim=True)
    wide = lambda t: t.double().repeat_interleave(case.heads // t.shape[1], dim=1)  # noqa: E731
    primals = [wide(t) for t in x.primals]
    tangents = [torch.zeros_like(p) if t is None else wide(t) for p, t in zip(primals, x.tangents, strict=True)]
    bias = torch.zeros(gone.shape, dtype=torch.float64)
    if x.mask is not None and x.mask.dtype != torch.bool:
        bias = bias + x.mask.double()
    bias = bias.masked_fill(gone, -math.inf).masked_fill(blind, 0.0)

    def weights(q: Tensor, k: Tensor) -> Tensor:
        s = x.scale * q @ k.transpose(-1, -2) + bias
        return torch.softmax(s, -1).masked_fill(blind, 0.0)

    def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(q, k) @ v

    exact = {}
    exact["o"], exact["do"] = torch.func.jvp(value, tuple(primals), tuple(tangents))
    (q, k, v), (dq, dk, dv) = primals, tangents
    p, s = weights(q, k), x.scale * q @ k.transpose(-1, -2) + bias
    ds = x.scale * (dq @ k.transpose(-1, -2) + q @ dk.transpose(-1, -2))
    exact["mu"] = (p * ds).sum(-1)
    exact["lse"] = torch.logsumexp(s, -1).masked_fill(blind.squeeze(-1), -math.inf)

    # One rounding to the operands' type of P and W; the other errors are float32's: of S, which P takes as a relative
    # error, of dS, and of the sums.
    info = torch.finfo(case.dtype)
    u, eps = info.eps / 2, torch.finfo(torch.float32).eps
    if case.dtype == torch.float32:
        u = 2 * eps  # of a product by pieces
    last = info.eps / 2  # where a result is stored
    c = abs(x.scale)
    # The roundings of a sum of n terms add up as a random walk does, to sqrt(n); times 4 for the worst of many.
    walk = 4 * eps * math.sqrt(case.head_dim)
    operations = 4 * math.sqrt(case.keys + 32)
    size = lambda a, b: c * (a.square() @ b.square().transpose(-1, -2)).sqrt()  # noqa: E731
    s_error = (walk * size(q, k) + 4 * eps * (s.abs() + bias.abs())).masked_fill(gone, 0.0)
    ds_error = walk * (size(dq, k) + size(q, dk))
    # With no keys at all there is still a largest error: none.
    worst = torch.nn.functional.pad(s_error, (0, 1)).amax(-1, keepdim=True)
    relative = u + 2 * worst + operations * eps
    tiny = (
        info.smallest_normal * info.eps
    )  # where a weight is subnormal; the largest of its row is 1 before the division
    w = p * ds
    w_error = relative * w.abs() + p * ds_error + tiny * (p > 0)
    p_error = relative * p + tiny * (p > 0)
    o_error = p_error @ v.abs()
    mu_error = w_error.sum(-1)
    do_error = w_error @ v.abs() + p_error @ dv.abs()
    do_error = do_error + mu_error[..., None] * exact["o"].abs() + exact["mu"].abs()[..., None] * o_error
    allowed = {
        "o": o_error + last * exact["o"].abs() + tiny,
        "do": do_error + last * exact["do"].abs() + tiny,
        "mu": mu_error + eps * exact["mu"].abs(),
        "lse": worst.squeeze(-1) + operations * eps + 4 * eps * exact["lse"].abs().nan_to_num(posinf=0.0),
    }
    return exact, allowed


def check(case: Case, seed: int = 0) -> dict[str, Tensor]:
    x = inputs(case, seed)
    computed = attention(x)
    exact, allowed = reference(x)
    for name, y in computed.items():
        assert_within(y, exact[name], allowed[name], name)
    return computed


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [ALL, ONLY_Q, NONE])
def test_value_and_tangent(simt, dtype, tangents):
    check(Case(dtype, heads=1, kv_heads=1, queries=70, keys=50, tangents=tangents))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [ALL, NONE])
@pytest.mark.parametrize("columns", [1, 8, 32, 33, 40, 48, 64, 72, 80, 96, 100, 128])
def test_every_head_dim(simt, dtype, tangents, columns):
    check(Case(dtype, queries=34, keys=70, head_dim=columns, value_dim=columns, heads=1, kv_heads=1, tangents=tangents))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [ALL, NONE])
@pytest.mark.parametrize("columns", [256, 129])
def test_widest_heads(simt, dtype, tangents, columns):
    check(Case(dtype, queries=34, keys=37, head_dim=columns, value_dim=256, tangents=tangents))


@pytest.mark.parametrize("head_dim, value_dim", [(16, 80), (128, 24), (7, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_of_another_width(simt, dtype, head_dim, value_dim):
    check(Case(dtype, queries=20, keys=35, head_dim=head_dim, value_dim=value_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tangents", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_every_set_of_tangents(simt, dtype, tangents):
    check(Case(dtype, queries=33, keys=40, tangents=tangents))


@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_length_of_sequence(simt, dtype, tokens, causal):
    check(Case(dtype, queries=tokens, keys=tokens, causal=causal))
    check(Case(dtype, queries=tokens, keys=tokens, causal=causal, tangents=NONE))


@pytest.mark.parametrize("queries, keys", [(1, 130), (130, 1), (17, 64), (65, 0)])
def test_cross_attention(simt, queries, keys):
    check(Case(queries=queries, keys=keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_small_and_large_tangents(simt, dtype, size):
    check(Case(dtype, size=size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mu_sums_what_was_rounded(simt, dtype):
    """All weights equal and V = 1: O = 1 and T = l mu whatever roundings W met; with mu of the unrounded W, dO != 0."""
    x = inputs(Case(dtype, keys=130, tangents=ONLY_Q))
    x.primals[0].zero_()
    x.primals[2].fill_(1.0)
    y = attention(x)
    ds = x.scale * (x.tangents[0].double() @ x.primals[1].double().transpose(-1, -2))
    assert (y["o"] == 1).all()
    assert (y["do"].double().abs() <= 130 * torch.finfo(torch.float32).eps * ds.abs().mean(-1, keepdim=True)).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_scale(simt, scale):
    check(Case(torch.float32, scale=scale))
    check(Case(torch.bfloat16, scale=scale))


def test_float32_is_no_coarser_than_torch(simt):
    """Errors against those of the same in torch and float32: products of fewer than 24 bits would be far above."""

    def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(x.scale * q @ k.transpose(-1, -2), -1) @ v

    x = inputs(Case(torch.float32, queries=130, keys=130))
    computed, (exact, _) = attention(x), reference(x)
    plain = torch.func.jvp(value, tuple(x.primals), tuple(x.tangents))
    for name, theirs in zip(("o", "do"), plain, strict=True):
        error = lambda y: float((y.double() - exact[name]).square().mean().sqrt())  # noqa: B023, E731
        assert error(computed[name]) <= 2 * error(theirs), name


# ---- which keys a query sees -----------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("mask", ["bool", "add"])
def test_masks(simt, mask):
    check(Case(torch.bfloat16, queries=33, keys=70, mask=mask))
    check(Case(torch.bfloat16, queries=33, keys=70, mask=mask, tangents=NONE))


@pytest.mark.parametrize("dtype, mask", [(d, m) for d in DTYPES for m in ("bool", "add", "f16", "f32", "f64")])
def test_masks_of_every_dtype(simt, dtype, mask):
    y = check(Case(dtype, queries=17, keys=66, mask=mask))
    assert not y["o"].isnan().any()


def test_a_query_that_sees_nothing(simt):
    case = Case(mask="bool")
    y = attention(inputs(case))
    blind = case.queries // 2
    assert (y["o"][:, 0, blind] == 0).all() and (y["do"][:, 0, blind] == 0).all()
    assert (y["lse"][:, 0, blind] == -math.inf).all() and (y["mu"][:, 0, blind] == 0).all()


@pytest.mark.parametrize("mask", ["bool", "add"])
def test_a_masked_key_has_no_weight_whatever_it_is(simt, mask):
    x = inputs(Case(torch.float32, queries=17, keys=20, mask=mask))
    hide = -math.inf if mask == "add" else False
    x.mask[..., 7] = hide
    clean = attention(x)
    x.primals[1][..., 7, :] = math.nan
    x.tangents[1][..., 7, :] = math.nan
    for name, y in attention(x).items():
        assert torch.equal(y, clean[name]), name


@pytest.mark.parametrize("tangents", [ALL, NONE])
def test_lengths(simt, tangents):
    y = check(Case(batch=5, queries=20, keys=70, lengths=(0, 1, 64, 70, 1000), tangents=tangents))
    assert (y["o"][0] == 0).all()
    check(Case(batch=2, queries=70, keys=70, lengths=(-3, 66), causal=True, tangents=tangents))


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_with_mask_and_lengths(simt, dtype):
    check(Case(dtype, batch=2, queries=66, keys=66, causal=True, mask="add", lengths=(66, 40)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [ALL, ONLY_Q, NONE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_keys_are_not_looked_at(simt, dtype, tangents, bad):
    """NaN in keys past the length changes no bit; under a causal mask only the queries that see it turn to NaN."""
    case = Case(dtype, heads=1, kv_heads=1, queries=70, keys=70, lengths=(40,), tangents=tangents)
    x = inputs(case)
    clean = attention(x)
    for t in (*x.primals[1:], *x.tangents[1:]):
        if t is not None:
            t[..., 40:, :] = bad
    for name, y in attention(x).items():
        assert torch.equal(y, clean[name]), name

    x = inputs(replace(case, causal=True, lengths=None))
    clean = attention(x)
    for seen_from in (69, 37):
        for t in (*x.primals[1:], *x.tangents[1:]):
            if t is not None:
                t[..., seen_from, 3] = bad
        dirty = attention(x)
        for name in dirty:
            assert (
                torch.equal(dirty[name][..., :seen_from], clean[name][..., :seen_from])
                if name in ("lse", "mu")
                else (torch.equal(dirty[name][..., :seen_from, :], clean[name][..., :seen_from, :]))
            ), name
        assert not dirty["o"][..., seen_from:, 3].isfinite().any()


@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_reach_those_who_see_them(simt, which):
    """One NaN in V, or in dV alone: column by column, from its row on."""
    x = inputs(Case(heads=1, kv_heads=1, queries=70, keys=70, causal=True))
    (x.primals, x.tangents)[which][2][..., 20, 5] = math.nan
    y = attention(x)
    expected = torch.zeros(70, 64, dtype=torch.bool)
    expected[20:, 5] = True
    assert torch.equal(y["do"][0, 0].isnan(), expected)
    assert torch.equal(y["o"][0, 0].isnan(), expected if which == 0 else torch.zeros_like(expected))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_first_and_shared_keys(simt, dtype):
    check(Case(dtype, batch=2, heads=4, kv_heads=2, queries=17, keys=20, tokens_first=True))
    check(Case(dtype, heads=3, kv_heads=1, queries=17, keys=20, head_dim=24, value_dim=20, tokens_first=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_off_16_bytes(simt, dtype):
    """Rows that start anywhere take the road element by element: the same bits."""
    case = Case(dtype, queries=33, keys=35)
    x = inputs(case)
    aligned = attention(x)

    def shifted(t: Tensor) -> Tensor:
        room = torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype)
        room[..., 1:-2] = t
        return room[..., 1:-2]

    x.primals = [shifted(t) for t in x.primals]
    x.tangents = [shifted(t) for t in x.tangents]
    for name, y in attention(x).items():
        assert torch.equal(y, aligned[name]), name


def test_writes_nothing_else(simt):
    """Results into the middle of larger tensors."""
    x = inputs(Case(queries=17, keys=20, heads=1, kv_heads=1, head_dim=40, value_dim=40))
    room = torch.full((2, 1, 3, 19, 50), 7.0, dtype=torch.bfloat16)
    o, do = room[0, :, 1:2, 1:18, 5:45], room[1, :, 1:2, 1:18, 5:45]
    tensors = (*x.primals, *x.tangents, None, None, o, do, None, None)
    assert backends.simt().attention_forward(tensors, x.scale, False)
    plain = attention(x)
    assert torch.equal(o, plain["o"]) and torch.equal(do, plain["do"])
    o.fill_(7.0)
    do.fill_(7.0)
    assert (room == 7.0).all()


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(simt):
    yield backends.simt().set_options
    backends.simt().set_options()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns, tangents", [(64, ALL), (256, ALL), (64, NONE)])
def test_order_fill_and_copies_do_not_matter(options, dtype, columns, tangents):
    """Shared memory's first content, the order of threads and blocks, and when a copy lands."""
    x = inputs(
        Case(dtype, heads=1, kv_heads=1, queries=35, keys=70, head_dim=columns, value_dim=columns, tangents=tangents)
    )
    first = attention(x)
    for setting in (
        {"fill": 0xFF},
        {"order": "reverse", "async_copy": "at_issue"},
        {"order": "random", "seed": 1, "fill": 0xFF, "host_threads": 2},
        {"order": "random", "seed": 2, "async_copy": "at_issue"},
    ):
        options(**setting)
        for name, y in attention(x).items():
            assert torch.equal(y, first[name]), (setting, name)


def test_causal_in_any_order(options):
    x = inputs(Case(queries=130, keys=130, causal=True, heads=1, kv_heads=1))
    x.primals[2][..., 100, 1] = math.nan  # through the path that sets such values apart
    first = attention(x)
    for setting in ({"order": "reverse", "fill": 0xFF}, {"order": "random", "seed": 3, "async_copy": "at_issue"}):
        options(**setting)
        for name, y in attention(x).items():
            assert torch.equal(y.nan_to_num(7.0), first[name].nan_to_num(7.0)), (setting, name)


def test_a_head_does_not_depend_on_its_batch(simt):
    x = inputs(Case(batch=3, heads=2, kv_heads=2, queries=70, keys=33))
    whole = attention(x)
    x.case = replace(x.case, batch=1)
    x.primals, x.tangents = [t[1:2] for t in x.primals], [t[1:2] for t in x.tangents]
    for name, y in attention(x).items():
        assert torch.equal(y, whole[name][1:2]), name


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_too_wide(simt):
    with pytest.raises(RuntimeError, match="256"):
        attention(inputs(Case(queries=2, keys=2, head_dim=264, value_dim=8)))
