"""Cases of attention, the kernel called on outputs made here, what is exact, and how far from it a result may be.

The yardstick of an error is what plain torch makes of the same formula in the kernel's arithmetic: the kernel may be
as wrong as that (the order of its sums is another), and half a unit in the last place of the storage type.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowmap import reference

TANGENTS = ("dq", "dk", "dv")

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
    assert module.attention(given, case.scale, case.causal) is True
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
    got: Tensor, exact: Tensor, yardstick: Tensor, what: str, slack: float = 0.5, cancels: float = 0.0, units: float = 8
) -> None:
    """|got - exact| <= 1.5 max|yardstick - exact| + slack units in the last place of the storage type.

    A few units of the arithmetic are allowed on top, where plain torch happens to be exact (one key, one dimension):
    of the result, or of `cancels`, the size of what cancels in it. float64 has no wider reference: units alone.
    """
    assert got.isfinite().all(), f"{what}: not finite"
    eps, arithmetic = torch.finfo(got.dtype).eps, torch.finfo(yardstick.dtype).eps
    most = exact.abs().max().item() if exact.numel() else 0.0
    most = max(most, cancels)
    units = 16 * units if got.dtype == torch.float64 else units
    noise = 1.5 * (yardstick.double() - exact).abs().max().item() if exact.numel() else 0.0
    tiny = torch.finfo(got.dtype).smallest_normal
    allowed = noise + units * arithmetic * most + slack * eps * (exact.abs() if slack == 0.5 else most) + tiny
    error = (got.double() - exact).abs()
    assert (error <= allowed).all(), (
        f"{what}: off by {error.max():.3g}, allowed {noise + units * arithmetic * most:.3g}"
    )


def check_forward(module: Any, case: Case, tangent: bool = True) -> None:
    wide, plain = as_dtype(case, torch.float64), as_dtype(case, sums_of(case))
    o, d_o, lse, mu = forward(module, case, tangent)
    (exact, d_exact), (torch_o, torch_do) = push(wide, *wide[:3]), push(plain, *plain[:3])
    assert_as_good(o, exact, torch_o, "o")
    if tangent:
        assert_as_good(d_o, d_exact, torch_do, "do")
    # lse is the log of the normaliser, mu the mean tangent of the scores: the tangent of lse.
    (l_exact, m_exact), (l_plain, m_plain) = log_sum(wide), log_sum(plain)
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
    lse = log_sum(wide)[0]
    units = 8 + largest(lse[lse != -math.inf])  # P = exp(S - lse), where lse is rounded
    names = ("gq", "gk", "gv", "gdq", "gdk", "gdv")
    for name, got, e, t, c in zip(names, backward(module, case), exact, plain, cancels):
        assert got is not None
        assert_as_good(got, e, t, name, slack, c, units)


def check(module: Any, case: Case) -> None:
    check_forward(module, case)
    check_backward(module, case)
    check_backward(module, case._replace(gdo=None))
