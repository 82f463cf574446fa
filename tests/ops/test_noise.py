"""The noise: a function of (seed, sample id, stream, element) and of nothing else, and normal."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from tolerance import NORMAL

from pyflowmap import ops, reference
from pyflowmap.ops import Noise

pytestmark = pytest.mark.sanitizer  # kernels: run again under ASan, UBSan and TSan by `make sanitize`


def field(backend, shape, seed, ids=None, stream=0, leading=1, sample_dims=1, memory_format=torch.contiguous_format):
    like = torch.empty(shape, device=backend.device).contiguous(memory_format=memory_format)
    to = lambda v: v.to(backend.device) if isinstance(v, torch.Tensor) else v  # noqa: E731
    noise = Noise(to(seed), to(stream), to(ids), sample_dims)
    (y,) = ops.combine((), ((1.0,),), noise=noise, like=like, leading=leading)
    assert y.stride() == like.stride()
    return y.cpu()


def ids_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


# ---- the same field, however it is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 3, 4, 63, 64, 65, 515, 3 * 17 * 11])
def test_batch_does_not_matter(backend, elements):
    """Alone, in a batch of 64, or in another order."""
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(elements)) * 10**12 - 5
    batch = field(backend, (64, elements), 7, ids)
    for row in (0, 1, 31, 63):
        assert torch.equal(field(backend, (1, elements), 7, ids[row : row + 1])[0], batch[row])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(field(backend, (64, elements), 7, ids[order]), batch[order])


def test_ids_default_to_their_place(backend):
    assert torch.equal(field(backend, (5, 9), 3), field(backend, (5, 9), 3, ids_of(0, 1, 2, 3, 4)))


def test_memory_order_does_not_matter(backend):
    shape = (2, 3, 5, 7)
    logical = field(backend, shape, 11)
    assert torch.equal(field(backend, shape, 11, memory_format=torch.channels_last), logical)
    reversed_memory = torch.empty(shape[::-1], device=backend.device).permute(3, 2, 1, 0)
    (y,) = ops.combine((), ((1.0,),), noise=Noise(11), like=reversed_memory)
    assert torch.equal(y.cpu(), logical)
    wide = torch.zeros(2, 6, 5, 7, device=backend.device)
    ops.combine((), ((1.0,),), noise=Noise(11), out=(wide[:, :3],))
    assert torch.equal(wide[:, :3].cpu(), logical) and not wide[:, 3:].any()


@pytest.mark.parametrize("shape", [(2, 3, 10), (2, 5, 3), (1, 4, 1), (3, 1, 129)])
def test_rows_of_a_sample_do_not_matter(backend, shape):
    """Per-frame coefficients (leading=2) draw the same field as one coefficient per sample, also where rows are odd."""
    whole = field(backend, shape, 5)
    assert torch.equal(field(backend, shape, 5, leading=2), whole)
    assert torch.equal(field(backend, shape, 5, leading=3), whole)
    one = field(backend, shape, 5, leading=2, sample_dims=0)  # the tensor is one sample
    assert torch.equal(one.flatten(), field(backend, (1, one.numel()), 5)[0])


def test_seed_on_the_device(backend):
    for seed, stream in itertools.product((0, -3, 2**40 + 1), (0, 5)):
        number = field(backend, (2, 70), seed, stream=stream)
        assert torch.equal(field(backend, (2, 70), torch.tensor(seed), stream=torch.tensor(stream)), number)
        assert torch.equal(field(backend, (2, 70), torch.tensor([seed]), stream=stream), number)


def test_storage_types_round_the_same_field(backend):
    exact = field(backend, (2, 33), 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        like = torch.empty(2, 33, dtype=dtype, device=backend.device)
        if dtype == torch.float64 and backend.name == "cuda":
            continue
        (y,) = ops.combine((), ((1.0,),), noise=Noise(4), like=like)
        assert y.dtype == dtype and torch.equal(y.cpu(), exact.to(dtype))


# ---- which field: the specification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63, 2**64 - 1, 2**32, 2**32 + 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
def test_against_the_reference(backend, seed, stream):
    ids = ids_of(0, 1, -1, 2**32, 2**62 + 3, -(2**63))
    got = field(backend, (6, 201), seed, ids, stream)
    exact = reference.normal(Noise(seed, stream, ids), (6, 201))
    assert (got.double() - exact).abs().max() < NORMAL


def test_radii_near_zero_and_far_out():
    """Among a million radii some come from uniforms next to 1 and next to 0, where a logarithm goes wrong first."""
    got = ops.combine((), ((1.0,),), noise=Noise(17), like=torch.empty(4, 1 << 19))[0]
    assert (got.double() - reference.normal(Noise(17), (4, 1 << 19))).abs().max() < NORMAL


def test_every_bit_of_the_names_counts(backend):
    """No two of these fields agree anywhere: neither a bit of the seed, nor of the id, nor of the stream is dropped."""
    names = [(0, 0, 0)]
    names += [(1 << b, 0, 0) for b in (0, 31, 32, 33, 62)] + [(-(2**63), 0, 0)]
    names += [(0, 1 << b, 0) for b in (0, 31, 32, 33, 62)] + [(0, -(2**63), 0)]
    names += [(0, 0, 1 << b) for b in (0, 1, 31)]
    fields = [field(backend, (1, 64), seed, ids_of(i), stream)[0] for seed, i, stream in names]
    for a, b in itertools.combinations(fields, 2):
        assert (a == b).sum() <= 1


def test_published_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    full = 0xFFFFFFFF
    vectors = [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, answer in vectors:
        words = reference.philox([torch.tensor(c) for c in counter], tuple(torch.tensor(k) for k in key))
        assert tuple(int(w) for w in words) == answer


# ---- is it normal? ---------------------------------------------------------------------------------------------------
# Thresholds are p > 1e-4 or five standard errors, of a fixed seed: it passes always or never; a wrong law is far off.


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """(64 samples, 2^15), float64."""
    (y,) = ops.combine((), ((1.0,),), noise=Noise(2024), like=torch.empty(64, 1 << 15))
    return y.double()


def test_distribution(draws):
    assert stats.kstest(draws.flatten()[: 1 << 20].numpy(), "norm").pvalue > 1e-4
    for k in range(4):  # each of the four numbers of a Philox block
        assert stats.kstest(draws[:, k::4].flatten().numpy(), "norm").pvalue > 1e-4
    for row in draws[:8]:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4


def test_moments(draws):
    x = draws.flatten()
    factorial = lambda n: 1 if n <= 0 else n * factorial(n - 2)  # noqa: E731
    moment = lambda n: 0 if n % 2 else factorial(n - 1)  # noqa: E731
    for n in range(1, 7):
        error = ((moment(2 * n) - moment(n) ** 2) / x.numel()) ** 0.5
        assert abs(x.pow(n).mean() - moment(n)) < 5 * error, f"moment {n}"


def test_tails(draws):
    assert draws.abs().max() <= 6.67  # sqrt(-2 ln 2^-32): what 32 bits can reach
    for level in (3.0, 4.0, 4.5):
        expected = draws.numel() * 2 * stats.norm.sf(level)
        assert abs((draws.abs() > level).sum() - expected) < 5 * expected**0.5
    assert torch.isfinite(draws).all()  # the smallest uniform is 2^-32, never 0


def _independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """No correlation of values, squares or signs; the pair of their ranks is uniform on an 8 x 8 board."""
    a, b = a.flatten(), b.flatten()
    n = a.numel()
    for f in (lambda x: x, lambda x: (x**2 - 1) / 2**0.5, torch.sign):
        assert abs((f(a) * f(b)).mean()) < 5 / n**0.5
    assert abs((a * (b**2 - 1)).mean()) < 5 * 2**0.5 / n**0.5
    cell = lambda x: (torch.special.ndtr(x) * 8).long().clamp(0, 7)  # noqa: E731
    board = torch.bincount(cell(a) * 8 + cell(b), minlength=64)
    assert stats.chisquare(board.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 256])
def test_neighbouring_elements(draws, lag):
    _independent(draws[:, lag:], draws[:, :-lag])


def test_samples_streams_and_seeds(draws):
    _independent(draws[1:], draws[:-1])
    like = torch.empty(64, 1 << 13)
    draw = lambda *name: ops.combine((), ((1.0,),), noise=Noise(*name), like=like)[0].double()  # noqa: E731
    base = draw(2024, 0)
    for other in (draw(2025, 0), draw(2024, 1), draw(2024 + 2**32, 0), draw(2024, 0, torch.arange(64) + 2**32)):
        _independent(base, other)


def test_unseeded_noise_follows_torch():
    from pyflowmap.algebra import evaluate, noise

    like = torch.empty(2, 8)
    torch.manual_seed(3)
    a, b = evaluate(noise(like)), evaluate(noise(like))
    torch.manual_seed(3)
    assert torch.equal(evaluate(noise(like)), a) and not torch.equal(a, b)
