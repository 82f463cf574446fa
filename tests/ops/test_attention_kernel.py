"""The attention kernel itself, over its contract (csrc/attention/attention.h), against the reference in float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_calls import (
    TANGENTS,
    Case,
    as_dtype,
    backward,
    check,
    check_backward,
    check_forward,
    forward,
    make,
    push,
)
from torch import Tensor

from pyflowmap import _C
from pyflowmap.ops import backend as backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The cases are small, and threads have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu"])
def module(request: pytest.FixtureRequest) -> Any:
    return _C if request.param == "cpu" else backends.simt()


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
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_any_stride(module, kind):
    dense = boolean_mask(2, 1, 65, 130)
    dense = dense if kind == torch.bool else torch.zeros(dense.shape).masked_fill(~dense, -math.inf)
    case = make(queries=65, keys=65, mask=dense[..., ::2])
    turned = case._replace(mask=case.mask.transpose(2, 3).contiguous().transpose(2, 3))
    packed = case._replace(mask=case.mask.contiguous())
    for a, b, c in zip(forward(module, case), forward(module, turned), forward(module, packed)):
        assert torch.equal(a, b) and torch.equal(a, c)
    check(module, case)


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
    assert module.attention((*case.operands, out, d_out, lse, mu), case.scale, False) is True
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
def test_no_keys(module):
    o, d_o, lse, mu = forward(module, make(queries=5, keys=0))
    assert (o == 0).all() and (d_o == 0).all() and (lse == -math.inf).all() and (mu == 0).all()
    assert all((g == 0).all() for g in backward(module, make(queries=5, keys=0)))


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


@pytest.mark.parametrize("dtype", DTYPES[:3])
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
        assert ours.mean() <= 1.5 * theirs.mean()


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
    if causal:  # a query that sees no key from 37 on: what it holds does not reach their gradients
        bad = {name: getattr(case, name).clone() for name in ("q", "dq", "go", "gdo")}
        for x in bad.values():
            x[:, :, :37] = math.nan
        for name, a, b in zip("qkvQKV", backward(module, case), backward(module, case._replace(**bad))):
            if name not in "qQ":
                assert torch.equal(a[:, :, 37:], b[:, :, 37:])


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
    for case in (
        make(queries=300, dim=32, causal=causal),
        make(batch=1, heads=2, kv_heads=1, queries=1100, dim=8, causal=causal),
    ):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            through_o = backward(module, case._replace(gdo=None))[:3]
            results.append([*forward(module, case), *backward(module, case), *through_o])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_cut_into_runs(module, causal, kv_heads):
    check(
        module,
        make(batch=1, heads=2, kv_heads=kv_heads, queries=1100, dim=8, causal=causal, lengths=torch.tensor([1090])),
    )


def test_instruction_sets_agree():
    """Each is as good as the yardstick by itself; `check` under every one."""
    ours = _C.build()["isa"]
    names = ("base", "v3", "v4")
    try:
        for name in names[: names.index(ours) + 1]:
            _C.set_isa(name)
            for dtype in (torch.float32, torch.float64):
                check(_C, make(dtype=dtype, queries=150, dim=40, value_dim=24, causal=True))
            check(_C, make(dtype=torch.float16, queries=70, keys=130, dim=5, mask=boolean_mask(2, 2, 70, 130)))
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
    a = tuple(map(cut, x)) + (None, None) + tuple(map(cut, out[:2]))
    a += (lse[..., :n].contiguous(), mu[..., :n].contiguous())
    assert _C.attention(a, 0.25, False) and _C.attention_backward(a + tuple(map(cut, out[2:])), 0.25, False)
run(32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 1024  # KiB: ten operands of half a MB each in scratch and partial sums
