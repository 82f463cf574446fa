"""The specification in plain torch: what every kernel computes, without a thought for speed.

Tests run it in float64; `PYFLOWMAP_BACKEND=reference` runs the whole library on it, so that any doubt about a kernel
can be settled by running again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Coefficient = float | Tensor | tuple[float, Tensor | None]


class Noise(NamedTuple):
    """A field of normal numbers, named by what it depends on and never stored.

    The number at a place is a function of (`seed`, sample id, `stream`, element), nothing else: `seed` and `stream` are
    ints or int64 tensors of one element on the operands' device; `sample_ids` (int64, one per sample) defaults to
    0, 1, 2, ...; a sample spans the first `sample_dims` dimensions.
    """

    seed: int | Tensor
    stream: int | Tensor = 0
    sample_ids: Tensor | None = None
    sample_dims: int = 1


class Combined(NamedTuple):
    """What `combine` returns when inner products are asked for."""

    outputs: tuple[Tensor, ...]
    gram: Tensor | None = None  # (*leading, K, K)
    cross: Tensor | None = None  # (*leading, K, J (+ 1 with noise))
    sums: Tensor | None = None  # (*leading, K)


def per_row(vector: Tensor, ndim: int) -> Tensor:
    """`vector` with trailing axes of size 1, so that it broadcasts against `ndim` dimensions from the left."""
    return vector.reshape(vector.shape + (1,) * (ndim - vector.ndim))


def coefficient(c: Coefficient, ndim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One coefficient as a tensor that broadcasts against an operand: formed in float64, rounded once to `dtype`."""
    scalar, vector = c if isinstance(c, tuple) else (1.0, c) if isinstance(c, Tensor) else (float(c), None)
    if vector is None:
        return torch.tensor(scalar, dtype=torch.float64, device=device).to(dtype)
    return (scalar * per_row(vector, ndim).to(torch.float64)).to(dtype)


def combine(
    inputs: Sequence[Tensor],  # J tensors of one shape (*leading, *event)
    coefficients: Sequence[Sequence[Coefficient]],  # K rows of J numbers, one more with noise
    *,
    leading: int = 1,
    noise: Noise | None = None,
    mask: tuple[Tensor, Sequence[Sequence[Coefficient]]] | None = None,
    clamp: Sequence[tuple[float, float] | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
    gram: bool = False,
    cross: bool = False,
    sums: bool = False,
) -> Combined:
    """Row-wise linear combinations and their inner products; the contract is in csrc/combine/combine.h.

    Y[k, r] = clamp(sum_j C[k, j, r] X[j, r] + C[k, J, r] N[r]), with C = A, or A + mask * B.
    A term whose coefficient is exactly zero contributes nothing, whatever its operand holds.
    """
    first = inputs[0] if inputs else like
    if first is None:
        raise ValueError("combine: without inputs, like= must give the shape")
    arithmetic = torch.float64 if any(x.dtype == torch.float64 for x in inputs or (first,)) else torch.float32
    terms = [x.to(arithmetic) for x in inputs]
    if noise is not None:
        terms.append(normal(noise, first.shape, first.device).to(arithmetic))
    zero = torch.zeros((), dtype=arithmetic, device=first.device)

    values = []
    for k, row in enumerate(coefficients):
        y = torch.zeros(first.shape, dtype=arithmetic, device=first.device)
        for j, term in enumerate(terms):
            c = coefficient(row[j], first.ndim, arithmetic, first.device)
            if mask is not None:
                c = c + mask[0].to(arithmetic) * coefficient(mask[1][k][j], first.ndim, arithmetic, first.device)
            y = y + torch.where(c == 0, zero, c * term)
        if clamp is not None and clamp[k] is not None:
            low, high = clamp[k]  # type: ignore[misc]
            y = torch.where(y < low, low, torch.where(y > high, high, y))
        values.append(y)

    lead = first.shape[:leading]
    columns = math.prod(first.shape[leading:])  # not -1, which an empty tensor leaves open
    flat = [v.reshape(*lead, columns) for v in values]
    flat_terms = [x.reshape(*lead, columns) for x in terms]
    products = lambda a, b: torch.stack([torch.stack([(u * v).sum(-1) for v in b], -1) for u in a], -2)  # noqa: E731
    return Combined(
        tuple(v if dtypes is None else v.to(dtypes[k]) for k, v in enumerate(values)),
        products(flat, flat) if gram else None,
        products(flat, flat_terms) if cross else None,
        torch.stack([v.sum(-1) for v in flat], -1) if sums else None,
    )


def attention(
    q: Tensor,  # (B, H, S, D)
    k: Tensor,  # (B, H_kv, T, D)
    v: Tensor,  # (B, H_kv, T, E)
    mask: Tensor | None = None,  # broadcasts against (B, H, S, T); bool: True is seen; else added
    lengths: Tensor | None = None,  # (B,): keys from there on are hidden
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # (B, H, S, E)
    """softmax(scale q k' + mask) v; a query that sees no key gives zero. The contract is csrc/attention/attention.h.

    Its tangent and its gradients are those of torch (`torch.func.jvp`, autograd).
    """
    dtype, shared = q.dtype, q.shape[1] // k.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-2, -1))
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden = hidden | (mask == -math.inf)
        scores = scores + torch.where(mask == -math.inf, 0, mask).to(scores.dtype)
    keys = torch.arange(k.shape[2], device=q.device)
    if lengths is not None:
        hidden = hidden | (keys >= lengths.view(-1, 1, 1, 1))
    if causal:
        hidden = hidden | (keys > torch.arange(q.shape[2], device=q.device)[:, None])
    blind = hidden.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(hidden & ~blind, -math.inf), -1)
    return (weights.masked_fill(hidden, 0) @ v).to(dtype)


def dual_linear(
    x: Tensor,  # (..., I)
    dx: Tensor | None,  # as x
    weight: Tensor,  # (O, I)
    bias: Tensor | None = None,  # (O,)
) -> tuple[Tensor, Tensor | None]:
    """y = x W' + b, dy = dx W'."""
    y = x @ weight.mT
    return y if bias is None else y + bias, None if dx is None else dx @ weight.mT


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps modulo 2^64: the bits are those of the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def normal(noise: Noise, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The field `noise` as float64 numbers of `shape`: exact Box-Muller of the words in csrc/common/philox.h.

    normal[4i + 0, 1] = sqrt(-2 ln u(w0)) (cos, sin)(2 pi w1 / 2^32), likewise [4i + 2, 3] from w2 and w3,
    u(w) = (w >> 1) 2^-31 + 2^-32 rounded to float32 (near u = 1 the radius
    feels it). Kernels agree to about 1e-6 (float32 arithmetic) and with one another in bits.
    """
    low = 0xFFFFFFFF
    samples = math.prod(shape[: noise.sample_dims])
    elements = math.prod(shape[noise.sample_dims :])
    whole = lambda value: (  # noqa: E731
        value.to(device=device, dtype=torch.int64).reshape(())
        if isinstance(value, Tensor)
        else torch.tensor((int(value) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    )
    seed, stream = whole(noise.seed), whole(noise.stream)
    ids = torch.arange(samples, device=device) if noise.sample_ids is None else noise.sample_ids.reshape(-1).to(device)
    block = torch.arange((elements + 3) // 4, device=device)
    ids, block = ids[:, None], block[None, :]
    zeros = torch.zeros_like(ids + block)
    words = philox(
        [block + zeros, (ids & low) + zeros, ((ids >> 32) & low) + zeros, (stream & low) + zeros],
        (seed & low, (seed >> 32) & low),
    )
    normals = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        u = ((a >> 1).float() * 2.0**-31 + 2.0**-32).double()
        radius = (-2.0 * u.clamp(max=1.0).log()).sqrt()
        turn = 2.0 * math.pi * (b.double() / 2.0**32)
        normals += [radius * turn.cos(), radius * turn.sin()]
    return torch.stack(normals, -1).flatten(1)[:, :elements].reshape(tuple(shape))


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, layer: bool, eps: float) -> Tensor:
    """n(x) (1 + scale) + shift; scale and shift broadcast against x. Contract: csrc/norm_modulate/norm_modulate.h.

    Written out: backward through torch's forward derivative of layer_norm is wrong in silence (2.13).
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), shift.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    n = x.to(wide)
    if layer:
        n = n - n.mean(-1, keepdim=True)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    return torch.addcmul(shift.to(wide), n, 1.0 + scale.to(wide)).to(dtype)


def gated_residual(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate h; gate broadcasts against x. Contract: csrc/gated_residual/gated_residual.h."""
    return x + gate * h


def activation(x: Tensor, kind: str) -> Tensor:
    """f(x) of csrc/activation/activation.h, in what torch differentiates as often as asked and without cancellation in
    the tails; half precision by way of float32."""
    return _ACTIVATIONS[kind](x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def gated_unit(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """f(a) b. Contract: csrc/activation/activation.h."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (_ACTIVATIONS[kind](a.to(wide)) * b.to(wide)).to(dtype)


_ACTIVATIONS = {  # in the order of ActivationKind
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.erfc(-math.sqrt(0.5) * x),
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8.0 / math.pi) * (x + 0.044715 * x**3)),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """The RMS norm of each row, rotated. Contract: csrc/norm_rope/norm_rope.h."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide)
    n = weight.to(wide) * (n * (n.square().mean(-1, keepdim=True) + eps).rsqrt())
    if cos is not None and sin is not None:
        a, b = n.chunk(2, -1)
        n = torch.cat([cos * a - sin * b, cos * b + sin * a], -1)
    return n.to(x.dtype)


def time_embedding(s: Tensor, t: Tensor, frequencies: Tensor, span: bool) -> Tensor:
    """[cos(w a), sin(w a), cos(w b), sin(w b)], a = s, b = t - s or t. See csrc/time_embedding/time_embedding.h."""
    a, b = s.to(frequencies.dtype), t.to(frequencies.dtype)
    angles = [each[:, None] * frequencies for each in (a, b - a if span else b)]
    return torch.cat([f(angle) for angle in angles for f in (torch.cos, torch.sin)], 1)


def error_norm(
    terms: Sequence[Tensor],  # tensors of one shape (B, ...)
    coefficients: Sequence[float],
    x: Tensor,
    y: Tensor,
    rtol: float,
    atol: float,
    factor: Tensor | None = None,  # (B,)
) -> Tensor:  # (B,)
    """Per row, the sum of squares of f sum_j c_j K_j / (atol + rtol max(|x|, |y|)); 0 where f is 0, whatever the
    operands hold. Contract: csrc/error_norm/error_norm.h."""
    wide = torch.float64 if any(each.dtype == torch.float64 for each in (x, y, *terms)) else torch.float32
    error = torch.zeros(x.shape, dtype=wide, device=x.device)
    for c, term in zip(coefficients, terms, strict=True):
        error = error + c * term.to(wide)
    ratio = error / (atol + rtol * torch.maximum(x.to(wide).abs(), y.to(wide).abs()))
    sums = ratio.square().reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)
    if factor is None:
        return sums
    return torch.where(factor == 0, torch.zeros_like(sums), sums * factor.to(wide).square())
