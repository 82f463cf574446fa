"""The CUDA source of attention's backward pass, in the emulator, against float64 autograd of softmax attention.

What the forward pass hands over (o, do, lse, mu) is the reference's, rounded to the storage type.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tolerance import assert_within
from torch import Tensor

from pyflowmap.ops import backend as backends

pytestmark = pytest.mark.usefixtures("simt")
NAMES = ("q", "k", "v", "dq", "dk", "dv")


# ---- the specification: softmax attention in plain torch -----------------------------------------------------------


@dataclass
class Case:
    """Shapes and options of one call; `given` are the tangents that there are, `asked` the gradients."""

    b: int = 1
    h: int = 1
    kv: int = 1
    queries: int = 17
    keys: int = 17
    d: int = 16
    dv: int | None = None
    both: bool = True
    dtype: torch.dtype = torch.float32
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    mask: str | None = None
    scale: float | None = None
    given: tuple[str, ...] = ("dq", "dk", "dv")
    cotangents: tuple[str, ...] = ("go", "gdo")
    asked: tuple[str, ...] = NAMES
    tokens_first: bool = False  # tensors are (B, S, H, D) in memory
    offset: int = 0  # elements that each tensor starts past an aligned address
    tangent_size: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def visible(case: Case, mask: Tensor | None) -> Tensor:
    """(B, H or 1, queries, keys): which keys a query sees."""
    i, j = torch.arange(case.queries)[:, None], torch.arange(case.keys)[None, :]
    seen = (j <= i if case.causal else torch.ones_like(i >= j))[None, None]
    if case.lengths is not None:
        seen = seen & (j < torch.tensor(case.lengths)[:, None, None, None])
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return seen.expand(case.b, -1, -1, -1)


def scores(case: Case, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    s = q @ k.repeat_interleave(case.h // case.kv, 1).mT * scale_of(case)
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask.double()
    return s


def attention(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    seen = visible(case, mask)
    # A row of minus infinities has no softmax: it takes zeros, and its weights are 0 afterwards.
    s = scores(case, q, k, mask).masked_fill(~seen & seen.any(-1, keepdim=True), -math.inf)
    s = torch.where(seen.any(-1, keepdim=True), s, 0.0)
    return (s.softmax(-1) * seen) @ v.repeat_interleave(case.h // case.kv, 1)


def scale_of(case: Case) -> float:
    return case.d**-0.5 if case.scale is None else case.scale


# ---- a call --------------------------------------------------------------------------------------------------------


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    value = case.d if case.dv is None else case.dv
    q, k = (case.b, case.h, case.queries, case.d), (case.b, case.kv, case.keys, case.d)
    v, o = (case.b, case.kv, case.keys, value), (case.b, case.h, case.queries, value)
    return {"q": q, "k": k, "v": v, "dq": q, "dk": k, "dv": v, "go": o, "gdo": o}


def draw(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], Tensor | None]:
    rng = torch.Generator().manual_seed(seed)
    x = {}
    for name, shape in shapes(case).items():
        x[name] = torch.randn(shape, generator=rng, dtype=torch.float64).to(case.dtype)
        if name in ("dq", "dk", "dv"):
            x[name] = x[name] * case.tangent_size if name in case.given else torch.zeros_like(x[name])
        if name in ("go", "gdo") and name not in case.cotangents:
            x[name] = torch.zeros_like(x[name])
    mask = None
    if case.mask == "bool":  # one head's for all; sample 0 has a query that sees nothing
        mask = torch.rand((case.b, 1, case.queries, case.keys), generator=rng) < 0.6
        mask[0, 0, case.queries // 2] = False
    if case.mask == "added":
        mask = torch.randn((1, case.h, case.queries, case.keys), generator=rng)
        mask[torch.rand(mask.shape, generator=rng) < 0.3] = -math.inf
        mask[0, 0, 0] = -math.inf
    if case.mask == "keys":  # one number per key, in the storage type
        mask = torch.randn((case.b, 1, 1, case.keys), generator=rng).to(case.dtype)
    return x, mask


def lay_out(case: Case, x: Tensor | None) -> Tensor | None:
    """The same numbers in the memory order of the case, amid NaN."""
    if x is None:
        return None
    order = (0, 2, 1, 3) if case.tokens_first else (0, 1, 2, 3)
    shape = [x.shape[i] for i in order]
    shape[-1] += 8 if case.tokens_first else 0
    storage = torch.full((math.prod(shape) + case.offset,), math.nan, dtype=x.dtype)
    y = storage[case.offset :].view(shape)[..., : x.shape[-1]].permute(order)
    return y.copy_(x)


def run(case: Case, x: dict[str, Tensor], mask: Tensor | None, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    module = backends.simt()
    value = {name: lay_out(case, x[name]) for name in x}
    given = [value[n] if n in case.given and case.both else None for n in ("dq", "dk", "dv")]
    outs = {
        n: lay_out(case, torch.full(shapes(case)[n], math.nan, dtype=case.dtype))
        for n in case.asked
        if case.both or n in ("q", "k", "v")
    }
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    tensors = (
        *(value[n] for n in ("q", "k", "v")),
        *given,
        mask,
        lengths,
        lay_out(case, saved["o"]),
        lay_out(case, saved["do"]) if case.both else None,
        saved["lse"],
        saved["mu"] if case.both else None,
        value["go"] if "go" in case.cotangents or not case.both else None,
        value["gdo"] if "gdo" in case.cotangents and case.both else None,
        *(outs.get(n) for n in NAMES),
    )
    module.set_options(**case.options)
    try:
        assert module.attention_backward(tensors, scale_of(case), case.causal) is True
    finally:
        module.set_options()
    return outs


def expected(case: Case, x: dict[str, Tensor], mask: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, what the forward pass saved), by autograd in float64."""
    leaf = {n: x[n].double().requires_grad_() for n in NAMES}
    primals, tangents = tuple(leaf[n] for n in NAMES[:3]), tuple(leaf[n] for n in NAMES[3:])
    o, do = torch.func.jvp(lambda q, k, v: attention(case, q, k, v, mask), primals, tangents)
    loss = (o * x["go"].double()).sum()
    if case.both:
        loss = loss + (do * x["gdo"].double()).sum()
    grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(leaf[n]) if g is None else g for n, g in zip(NAMES, grads, strict=True)}

    q, k, dq, dk = (leaf[n].detach() for n in ("q", "k", "dq", "dk"))
    seen = visible(case, mask)
    s = scores(case, q, k, mask).masked_fill(~seen, -math.inf)
    group = case.h // case.kv
    ds = (dq @ k.repeat_interleave(group, 1).mT + q @ dk.repeat_interleave(group, 1).mT) * scale_of(case)
    weights = torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0.0)
    saved = {
        "o": o.detach().to(case.dtype),
        "do": do.detach().to(case.dtype),
        "lse": s.logsumexp(-1).float(),
        "mu": (weights * ds).sum(-1).float(),
    }
    return gradients, saved


def allowed(case: Case, x: dict[str, Tensor], mask: Tensor | None, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each gradient may be from `exact`: the contract's formulas with the errors of their operands.

    u is the unit roundoff of the storage type (o, do and the weights are rounded to it), w what a float32 chain of the
    n terms of the longest sum here adds to a sum of given magnitude: independent roundings grow as sqrt(n) (Higham and
    Mary, 2019).
    """
    u = torch.finfo(case.dtype).eps / 2
    chain = max(case.d, case.dv or 0) + case.queries * case.h // case.kv + case.keys + 40
    w = math.sqrt(chain) * torch.finfo(torch.float32).eps
    group, c = case.h // case.kv, abs(scale_of(case))
    wide = {n: x[n].double() for n in x}
    for n in ("k", "v", "dk", "dv"):
        wide[n] = wide[n].repeat_interleave(group, 1)
    q, k, v, dq, dk, dv, go, gdo = (wide[n] for n in (*NAMES, "go", "gdo"))
    if not case.both:
        dq, dk, dv, gdo = (torch.zeros_like(y) for y in (dq, dk, dv, gdo))
    a_ = {n: y.abs() for n, y in zip((*NAMES, "go", "gdo"), (q, k, v, dq, dk, dv, go, gdo), strict=True)}
    seen = visible(case, mask)
    s = scores(case, q, k[:, ::group], mask).masked_fill(~seen, -math.inf)
    p = torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0.0)
    ds = (dq @ k.mT + q @ dk.mT) * scale_of(case)
    mu = (p * ds).sum(-1, keepdim=True)
    o, do = p @ v, p @ dv + (p * (ds - mu)) @ v
    row = lambda y, z: (y.abs() * z.abs()).sum(-1, keepdim=True)  # noqa: E731

    finite = torch.where(seen, s, 0.0)
    lse = torch.where(seen.any(-1), s.logsumexp(-1), 0.0)[..., None]
    size = c * (a_["q"] @ a_["k"].mT) + finite.abs() + lse.abs() + 4
    p_error = w * size + u  # relative
    ds_size = c * (a_["dq"] @ a_["k"].mT + a_["q"] @ a_["dk"].mT)
    centred, centred_error = ds - mu, w * (ds_size + mu.abs())
    y, y_size = gdo @ v.mT, a_["gdo"] @ a_["v"].mT
    a, a_size = (gdo * o).sum(-1, keepdim=True), row(gdo, o)
    a_error = (u + w) * a_size
    D_size = row(go, o) + row(gdo, do) + a_size * mu.abs()
    D = (go * o).sum(-1, keepdim=True) + (gdo * do).sum(-1, keepdim=True) - a * mu
    x_size = a_["go"] @ a_["v"].mT + a_["gdo"] @ a_["dv"].mT
    g = go @ v.mT + gdo @ dv.mT + y * centred - a * ds - D
    g_error = w * (x_size + y_size * (ds_size + mu.abs()) + a_size * ds_size) + a_error * ds_size + (u + w) * D_size
    gdy, gdy_error = y - a, w * y_size + a_error
    weight = {"p": (p, p * p_error)}
    weight["dp"] = (p * centred, p * (p_error * centred.abs() + centred_error))
    weight["gds"] = (p * gdy, p * (p_error * gdy.abs() + gdy_error))
    weight["gs"] = (p * g, p * (p_error * g.abs() + g_error))

    def total(names: tuple[tuple[str, str], ...], keys: bool) -> Tensor:
        error = 0.0
        for name, factor in names:
            exact_weight, its_error = weight[name]
            all_errors = its_error + w * exact_weight.abs()
            error = error + (all_errors.mT if keys else all_errors) @ a_[factor]
        return error.unflatten(1, (case.kv, group)).sum(2) if keys else error

    errors = {
        "q": c * total((("gs", "k"), ("gds", "dk")), False),
        "k": c * total((("gs", "q"), ("gds", "dq")), True),
        "v": total((("p", "go"), ("dp", "gdo")), True),
        "dq": c * total((("gds", "k"),), False),
        "dk": c * total((("gds", "q"),), True),
        "dv": total((("p", "gdo"),), True),
    }
    # Twice: second-order terms, and halves below the normal range.
    tiny = torch.finfo(case.dtype).smallest_normal
    return {n: 2 * (e + u * exact[n].abs() + tiny) for n, e in errors.items()}


def check(case: Case, seed: int = 0) -> dict[str, Tensor]:
    x, mask = draw(case, seed)
    exact, saved = expected(case, x, mask)
    computed = run(case, x, mask, saved)
    bounds = allowed(case, x, mask, exact)
    assert set(computed) == {n for n in case.asked if case.both or not n.startswith("d")}
    for name, result in computed.items():
        assert_within(result, exact[name], bounds[name], f"gradient of {name}")
    return computed


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = pytest.mark.parametrize("both", [False, True], ids=["value", "both"])


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@MODES
@pytest.mark.parametrize("dtype", DTYPES)
def test_small(dtype, both):
    check(Case(dtype=dtype, both=both, h=2, kv=1, queries=19, keys=33, d=16, causal=False))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 17), (65, 65), (130, 130), (1, 130), (130, 3)])
def test_sizes(queries, keys, dtype, both):
    check(Case(dtype=dtype, both=both, queries=queries, keys=keys, d=64))


@pytest.mark.parametrize("d", [64, 100, 200])
def test_float32_is_as_exact_as_torch(d):
    """Products of three bfloat16 pieces are not to be seen: an error no larger than that of torch's own float32."""
    case = Case(queries=70, keys=90, d=d)
    x, mask = draw(case)
    exact, saved = expected(case, x, mask)
    computed = run(case, x, mask, saved)
    leaf = {n: x[n].clone().requires_grad_() for n in NAMES}
    weight = lambda q, k: ((q @ k.mT) * scale_of(case)).softmax(-1)  # noqa: E731
    o, do = torch.func.jvp(
        lambda q, k, v: weight(q, k) @ v, tuple(leaf[n] for n in NAMES[:3]), tuple(leaf[n] for n in NAMES[3:])
    )
    by_torch = torch.autograd.grad((o * x["go"]).sum() + (do * x["gdo"]).sum(), list(leaf.values()))
    for name, theirs in zip(NAMES, by_torch, strict=True):
        ours, limit = ((y.double() - exact[name]).pow(2).mean().sqrt() for y in (computed[name], theirs))
        assert ours <= 1.5 * limit, f"gradient of {name}: error {ours:.3g}, torch's {limit:.3g}"


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 64, 72, 97, 128, 129, 256])
def test_buckets(d, dtype, both):
    check(Case(dtype=dtype, both=both, queries=18, keys=37, d=d))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "dv"), [(16, 48), (80, 24), (128, 5), (40, 130)])
def test_value_dim_is_its_own(d, dv, dtype, both):
    check(Case(dtype=dtype, both=both, queries=20, keys=35, d=d, dv=dv))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 17, 65, 130])
def test_causal(size, dtype, both):
    check(Case(dtype=dtype, both=both, causal=True, queries=size, keys=size, d=32, h=2))


@pytest.mark.sanitizer
@MODES
def test_lengths(both):
    """0 sees nothing, and what lies beyond a sample's length is not looked at; lengths are clamped."""
    case = Case(both=both, b=5, lengths=(0, 1, 40, 999, -3), queries=18, keys=40, d=16)
    check(case)
    x, mask = draw(case)
    exact, saved = expected(case, x, mask)
    bounds = allowed(case, x, mask, exact)
    for name in ("k", "v", "dk", "dv"):
        for b, n in enumerate(case.lengths):
            x[name][b, :, max(n, 0) :] = math.nan
    for name, result in run(case, x, mask, saved).items():
        assert_within(result, exact[name], bounds[name], f"gradient of {name}")
        for b, n in enumerate(case.lengths):
            if name in ("k", "v", "dk", "dv"):
                assert (result[b, :, max(n, 0) :] == 0).all(), f"hidden keys of {name} take no gradient"


@MODES
@pytest.mark.parametrize("name", ["k", "v", "dk", "dv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_queries_do_not_look_at_later_keys(name, dtype, both):
    """A NaN in a key is in the gradients of the queries that see it, and in no other's."""
    case = Case(dtype=dtype, both=both, causal=True, queries=50, keys=50, d=16)
    x, mask = draw(case)
    exact, saved = expected(case, x, mask)
    bounds = allowed(case, x, mask, exact)
    x[name][0, 0, 21, 3] = math.nan
    computed = run(case, x, mask, saved)
    for query in ("q", "dq") if both else ("q",):
        assert_within(computed[query][:, :, :21], exact[query][:, :, :21], bounds[query][:, :, :21], query)
    if both or name in ("k", "v"):
        assert computed["q"][:, :, 21:].isnan().all()


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bool", "added", "keys"])
def test_masks(mask, dtype, both):
    check(Case(dtype=dtype, both=both, mask=mask, b=2, h=2, queries=35, keys=50, d=24))


@MODES
def test_everything_at_once(both):
    case = Case(both=both, dtype=torch.bfloat16, b=2, h=4, kv=2, queries=70, keys=70, d=40, dv=56, mask="added")
    check(case)
    case.causal, case.lengths, case.tokens_first = True, (70, 33), True
    check(case)


def test_hidden_query_takes_and_gives_no_gradient():
    case = Case(mask="bool", queries=20, keys=20)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    x["go"][0, 0, 10] = 1e30  # no finite cotangent of a row that sees nothing shows anywhere
    x["gdo"][0, 0, 10] = 1e30
    computed = run(case, x, mask, saved)
    x["go"][0, 0, 10] = x["gdo"][0, 0, 10] = 0.0
    again = run(case, x, mask, saved)
    for name in NAMES:
        assert torch.equal(computed[name], again[name]), name
    assert (computed["q"][0, 0, 10] == 0).all() and (computed["dq"][0, 0, 10] == 0).all()


@MODES
@pytest.mark.parametrize(("h", "kv"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_heads(h, kv, dtype, both):
    check(Case(dtype=dtype, both=both, b=2, h=h, kv=kv, queries=33, keys=21, d=24))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens_first", "offset", "d"), [(True, 0, 32), (True, 1, 32), (False, 3, 20), (True, 0, 19)])
def test_layouts(tokens_first, offset, d, dtype, both):
    """(B, S, H, D) with gaps, addresses that are not multiples of 16 bytes: the bits of the dense call."""
    case = Case(dtype=dtype, both=both, h=2, queries=33, keys=21, d=d)
    dense = check(case)
    case.tokens_first, case.offset = tokens_first, offset
    strided = check(case)
    for name, result in dense.items():
        assert torch.equal(result, strided[name]), name


@pytest.mark.parametrize("cotangents", [("go", "gdo"), ("gdo",)])
@pytest.mark.parametrize(
    "given", [g for n in range(4) for g in itertools.combinations(("dq", "dk", "dv"), n)], ids=lambda g: "+".join(g)
)
def test_tangents_that_are_not_given_are_zero(given, cotangents):
    check(Case(given=given, cotangents=cotangents, queries=18, keys=34, d=16))


def test_no_cotangent_of_the_value_is_zero():
    """go null and go of zeros: the same bits; gdo null is the backward pass through O alone."""
    case = Case(queries=20, keys=35, d=16, dtype=torch.bfloat16)
    x, mask = draw(case)
    x["go"].zero_()
    _, saved = expected(case, x, mask)
    zeros = run(case, x, mask, saved)
    case.cotangents = ("gdo",)
    for name, result in run(case, x, mask, saved).items():
        assert torch.equal(result, zeros[name]), name


@MODES
@pytest.mark.parametrize("asked", [(n,) for n in NAMES] + [("q", "dv"), ("k", "dk", "v"), ("dq", "v")])
def test_gradients_not_asked_for(asked, both):
    """What is asked for has the same bits, whatever else is."""
    case = Case(dtype=torch.bfloat16, both=both, queries=20, keys=35, d=16)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    whole = run(case, x, mask, saved)
    case.asked = asked
    for name, result in run(case, x, mask, saved).items():
        assert torch.equal(result, whole[name]), name


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_of_any_size(size, dtype):
    check(Case(dtype=dtype, tangent_size=size, queries=33, keys=50, d=32))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale):
    check(Case(scale=scale, queries=18, keys=20))


@MODES
def test_no_keys(both):
    """The other empty calls have no data in what they must be given: they are not the kernel's."""
    case = Case(both=both, queries=5, keys=0)
    x, mask = draw(case)
    o = torch.zeros(shapes(case)["go"])
    saved = {"o": o, "do": o, "lse": torch.full(o.shape[:3], -math.inf), "mu": torch.zeros(o.shape[:3])}
    for name, result in run(case, x, mask, saved).items():
        assert (result == 0).all(), name


@pytest.mark.sanitizer
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_and_any_fill_give_the_same_bits(dtype, both):
    """Races, uninitialised shared memory and missing waits show as other bits."""
    case = Case(dtype=dtype, both=both, h=2, kv=1, queries=70, keys=70, d=24, causal=True)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    first = run(case, x, mask, saved)
    for options in (
        {"fill": 0xFF},
        {"order": "reverse"},
        {"order": "random", "seed": 3, "fill": 0xFF},
        {"async_copy": "at_issue"},
        {"host_threads": 2},
    ):
        case.options = options
        for name, result in run(case, x, mask, saved).items():
            assert torch.equal(result, first[name]), f"{name} under {options}"


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [96, 128, 256])
def test_any_fill_gives_the_same_bits_in_every_bucket(d, dtype, both):
    case = Case(dtype=dtype, both=both, queries=34, keys=50, d=d - 8)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    first = run(case, x, mask, saved)
    case.options = {"fill": 0xFF, "order": "random", "seed": 1}
    for name, result in run(case, x, mask, saved).items():
        assert torch.equal(result, first[name]), name


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_forward_kernel_saves(dtype, both):
    """The two directions agree on lse, mu and on queries that see nothing."""
    case = Case(dtype=dtype, both=both, b=2, h=2, kv=1, queries=35, keys=35, d=40, mask="bool", lengths=(35, 9))
    x, mask = draw(case)
    exact, saved = expected(case, x, mask)
    saved = {name: torch.full_like(y, math.nan) for name, y in saved.items()}
    tangents = [x[n] if both else None for n in ("dq", "dk", "dv")]
    given = (x["q"], x["k"], x["v"], *tangents, mask, torch.tensor(case.lengths))
    outs = (saved["o"], saved["do"] if both else None, saved["lse"], saved["mu"] if both else None)
    assert backends.simt().attention((*given, *outs), scale_of(case), case.causal) is True
    bounds = allowed(case, x, mask, exact)
    for name, result in run(case, x, mask, saved).items():
        # Twice: o, do, lse and mu now have the forward pass's own errors, which are of the same size.
        assert_within(result, exact[name], 2 * bounds[name], f"gradient of {name}")


def test_refusals():
    case = Case(dtype=torch.float64)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    with pytest.raises(AssertionError):
        run(case, x, mask, saved)  # float64 is the CPU's
    case = Case(d=257)
    x, mask = draw(case)
    _, saved = expected(case, x, mask)
    with pytest.raises(RuntimeError, match="at most 256"):
        run(case, x, mask, saved)
