"""`error_norm` on every back end against its formula in float64: layouts, storage, long rows, rows that wait, bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.row_layers import instruction_sets, on
from tolerance import CHAIN, assert_within

from pyflowmap import _C, reference
from pyflowmap.ops.error_norm import error_norm

pytestmark = pytest.mark.sanitizer

ERROR = (71 / 57600, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # of Dormand and Prince
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, terms=6, dtypes=(torch.float32,), seed=0, factor=True):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtypes[n % len(dtypes)])  # noqa: E731
    h = torch.rand(shape[0], generator=rng, dtype=torch.float64) - 0.5 if factor else None
    return [draw(n) for n in range(terms)], draw(terms), draw(terms + 1), h


def coefficients(terms):
    return [ERROR[j % 6] * (1 + j // 6) for j in range(terms)]


def by_hand(terms, c, x, y, rtol, atol, h):
    """The formula, and how much larger its terms are than their sum: what cancellation may cost."""
    flat = lambda each: each.double().reshape(len(x), -1)  # noqa: E731
    tolerance = atol + rtol * torch.maximum(flat(x).abs(), flat(y).abs())
    h = torch.ones(len(x), 1, dtype=torch.float64) if h is None else h[:, None].double()
    parts = torch.stack([h * a * flat(k) / tolerance for a, k in zip(c, terms)])
    ratio, size = parts.sum(0), parts.abs().sum(0)
    return ratio.square().sum(1), (ratio.abs() * size).sum(1), size.square().sum(1)


def check(terms, x, y, h, rtol=1e-3, atol=1e-4, device="cpu", unit=torch.float32):
    c = coefficients(len(terms))
    moved = [each if each is None else each.to(device) for each in (*terms, x, y, h)]
    found = error_norm(moved[: len(terms)], c, *moved[-3:-1], rtol, atol, moved[-1])
    exact, cross, largest = by_hand(terms, c, x, y, rtol, atol, h)
    assert found.dtype == unit and found.device == moved[0].device
    u = torch.finfo(unit).eps / 2
    n = len(terms) + 8  # roundings of a ratio
    allowed = 2 * n * u * cross + (n * u) ** 2 * largest + (CHAIN + 4) * u * exact
    assert_within(found, exact, allowed + 1e-30)
    return found


@given(
    shape=st.sampled_from([(1, 1), (3, 7), (2, 16), (5, 3, 11), (2, 2, 3, 8), (4,), (1, 515), (3, 2049), (2, 4100)]),
    terms=st.integers(1, 7),
    dtypes=st.lists(st.sampled_from(STORAGE), min_size=1, max_size=3),
    factor=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_float64(backend, shape, terms, dtypes, factor, seed):
    check(*problem(shape, terms, dtypes, seed, factor), device=backend.device)


@given(shape=st.sampled_from([(3, 7), (4,), (2, 3, 600), (2, 17000)]), terms=st.integers(1, 7), seed=st.integers(0, 99))
def test_float64(shape, terms, seed):
    check(*problem(shape, terms, (torch.float64,), seed), unit=torch.float64)


def test_the_reference_says_the_same(backend):
    terms, x, y, h = problem((3, 5, 70))
    here = [each.to(backend.device) for each in (*terms, x, y, h)]
    got = error_norm(here[:6], ERROR, here[6], here[7], 1e-3, 1e-4, here[8])
    double = reference.error_norm([k.double() for k in terms], ERROR, x.double(), y.double(), 1e-3, 1e-4, h)
    torch.testing.assert_close(got.cpu().double(), double, rtol=1e-5, atol=0)
    torch.testing.assert_close(double, by_hand(terms, ERROR, x, y, 1e-3, 1e-4, h)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded", "mixed"])
def test_layouts(backend, layout):
    terms, x, y, h = problem((3, 4, 6, 5))
    lie = {
        "channels_last": lambda v, n: v.contiguous(memory_format=torch.channels_last),
        "transposed": lambda v, n: v.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda v, n: torch.stack([v, v + math.nan], -1)[..., 0],
        "expanded": lambda v, n: v[:1].expand_as(v) if n == 1 else v,
        "mixed": lambda v, n: v.contiguous(memory_format=torch.channels_last) if n % 2 else v,
    }[layout]
    check(*[[lie(k, n) for n, k in enumerate(terms)], lie(x, 6), lie(y, 7), h], device=backend.device)
    channels = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert not channels.is_contiguous()


def test_rows_that_wait_are_not_read(backend):
    terms, x, y, h = problem((4, 33))
    h[1] = h[3] = 0.0
    clean = check(terms, x, y, h, device=backend.device)
    for each in (*terms, x, y):
        each[1], each[3] = math.nan, math.inf
    here = [each.to(backend.device) for each in (*terms, x, y, h)]
    for function in (error_norm, reference.error_norm):
        found = function(here[:6], ERROR, here[6], here[7], 1e-3, 1e-4, here[8])
        assert found[1] == found[3] == 0.0
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("place", ["term", "x", "y"])
@pytest.mark.parametrize("columns", [5, 3000])
def test_nan_is_seen(backend, place, columns):
    terms, x, y, _ = problem((3, columns))
    {"term": terms[4], "x": x, "y": y}[place][1, columns - 2] = math.nan
    found = error_norm(
        [k.to(backend.device) for k in terms], ERROR, x.to(backend.device), y.to(backend.device), 1e-3, 1e-4
    )
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("columns", [6, 2050])
def test_a_row_does_not_depend_on_the_others(backend, columns):
    terms, x, y, h = problem((9, columns))
    run = lambda rows: error_norm(  # noqa: E731
        [k[rows].to(backend.device) for k in terms],
        ERROR,
        *(each[rows].to(backend.device) for each in (x, y)),
        1e-3,
        1e-4,
        h[rows].to(backend.device),
    )
    whole = run(list(range(9)))
    for rows in ([4], [8, 0, 3]):
        assert torch.equal(run(rows), whole[rows])


def test_bits_do_not_depend_on_threads_or_grid():
    terms, x, y, h = problem((3, 40000))
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(error_norm(terms, ERROR, x, y, 1e-3, 1e-4, h))
    torch.set_num_threads(before)
    assert torch.equal(*runs)


@pytest.mark.parametrize("options", [{"multiprocessors": 1}, {"order": "reverse"}, {"fill": 0xFF}], ids=str)
def test_bits_do_not_depend_on_the_emulated_machine(simt, options):
    terms, x, y, h = problem((3, 5000))
    runs = []
    for chosen in ({}, options):
        with on("simt", **chosen):
            runs.append(error_norm(terms, ERROR, x, y, 1e-3, 1e-4, h))
    assert torch.equal(*runs)


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa):
    _C.set_isa(isa)
    try:
        for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32)):
            check(*problem((3, 1037), dtypes=dtypes))
        check(*problem((3, 1037), dtypes=(torch.float64,)), unit=torch.float64)
    finally:
        _C.set_isa(instruction_sets()[-1])


def test_no_gradient_and_no_kernel_where_someone_watches():
    terms, x, y, h = problem((3, 8))
    plain = error_norm(terms, ERROR, x, y, 1e-3, 1e-4, h)
    recorded = error_norm([k.requires_grad_() for k in terms], ERROR, x.requires_grad_(), y, 1e-3, 1e-4, h)
    assert not recorded.requires_grad and torch.equal(plain, recorded)
    torch._dynamo.reset()
    compiled = torch.compile(error_norm, backend="aot_eager", fullgraph=True)(
        [k.detach() for k in terms], ERROR, x.detach(), y, 1e-3, 1e-4, h
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
    vmapped = torch.func.vmap(lambda k: error_norm([k], [1.0], x.detach(), y, 1e-3, 1e-4))(torch.stack(terms).detach())
    each = torch.stack([error_norm([k], [1.0], x, y, 1e-3, 1e-4) for k in terms])
    torch.testing.assert_close(vmapped, each, rtol=1e-5, atol=0)


def test_errors_name_what_is_wrong():
    terms, x, y, h = problem((3, 8))
    for change, words in (
        (dict(terms=[]), "0 terms"),
        (dict(terms=terms + terms[:2], coefficients=[1.0] * 8), "8 terms"),
        (dict(terms=[*terms[:5], terms[5][:2]]), r"term 5 has shape \(2, 8\)"),
        (dict(y=y[:, :4]), r"y has shape \(3, 4\)"),
        (dict(factor=h[:2]), r"the factor \(2,\)"),
        (dict(atol=0.0), "atol = 0.0"),
    ):
        given_ = dict(terms=terms, coefficients=list(ERROR), x=x, y=y, rtol=1e-3, atol=1e-4, factor=h) | change
        with pytest.raises(ValueError, match=words):
            error_norm(**given_)
    assert error_norm([torch.zeros(0, 3)], [1.0], torch.zeros(0, 3), torch.zeros(0, 3), 1e-3, 1e-4).shape == (0,)
    assert error_norm([torch.zeros(2, 0)], [1.0], torch.zeros(2, 0), torch.zeros(2, 0), 1e-3, 1e-4).tolist() == [0, 0]
