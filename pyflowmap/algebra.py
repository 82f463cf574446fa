"""Lazy linear combinations of tensors: written as in the paper, run as one kernel.

    >>> x, v, h = pfm.lazy(torch.zeros(2, 3)), pfm.lazy(torch.ones(2, 3)), torch.tensor([0.5, 2.0])
    >>> pfm.evaluate(x + h * v)
    tensor([[0.5000, 0.5000, 0.5000],
            [2.0000, 2.0000, 2.0000]])

A coefficient is a number, a 0-d tensor, or a tensor of the *leading* dimensions of its operand: (B,), or (B, F) for
per-frame times. It is never broadcast over the last ones, as torch's own `h * x` would do in silence.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowmap.combination import Lazy, NoiseField, Versions, promoted, shapes_differ, weighted
from pyflowmap.ops.backend import direct
from pyflowmap.ops.combine import combine as combine_op
from pyflowmap.ops.combine_run import noise_tuple
from pyflowmap.ops.squared_norm import squared_norm
from pyflowmap.reference import Noise, per_row

__all__ = ["Lazy", "NoiseField", "evaluate", "inner", "lazy", "noise", "per_sample", "weighted"]

_is_tracing = torch.compiler.is_dynamo_compiling
_empty_like = torch.empty_like


def lazy(x: Tensor | Lazy) -> Lazy:
    """Wraps a tensor (*leading, *event) so that + - * build a combination instead of computing.

    The combination remembers the tensor's version, and those of tensors that it is multiplied by: evaluating it after
    one was overwritten raises.
    """
    if type(x) is Lazy:
        return x
    return Lazy((x,), (1.0,), (direct.version_of(x),))


def noise(
    like: Tensor | Lazy,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    stream: int | Tensor = 0,
) -> Lazy:
    """A field of standard normal numbers with the shape, dtype and device of `like`, drawn inside the kernel.

    The number at a place depends on (seed, sample id, stream, element) only: not on the batch it is in, the number of
    threads, the instruction set or the device (Philox4x32-10, Box-Muller). `sample_ids` (B,), int64, default 0..B-1;
    `seed` and `stream` may be int64 tensors of one element on the device, so that replays of a CUDA graph differ.
    Without a seed one is drawn from torch's generator. To store the field: `evaluate(noise(...))`.
    """
    first = like._like if type(like) is Lazy else like
    if not isinstance(first, Tensor):
        raise TypeError(f"noise takes its shape from a tensor, got {type(like).__name__}; pass torch.empty(shape)")
    if seed is None:
        if _is_tracing() or first.device.type != "cpu":
            seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=first.device)
        else:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    elif not isinstance(seed, (int, Tensor, torch.SymInt)):
        seed = operator.index(seed)  # numpy's integers
    field = NoiseField(first.detach(), Noise(seed, stream, sample_ids, min(1, first.ndim)))
    return Lazy((field,), (1.0,), (None,))


def evaluate(*combinations: Lazy | Tensor, out: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Computes one combination (returns a tensor) or several (a tuple) in one launch, one pass over memory.

    Args:
        combinations: of one shape and device. More than 8 operands or 8 combinations take several launches.
        out: a tensor, or a tuple with one per combination; may be one of the operands, not overlap one in part.
        dtype: of the results; default: torch's promotion of the operands.

    Differentiable in operands and coefficients; right under torch.func.jvp, vmap and torch.compile(fullgraph=True).
    """
    if out is not None and dtype is None and direct.update(combinations, out):
        return out
    if not combinations:
        raise ValueError("evaluate needs at least one combination")
    terms = [c if type(c) is Lazy else lazy(c) for c in combinations]
    single = len(terms) == 1
    if out is not None and isinstance(out, Tensor):
        if not single:
            raise ValueError(
                f"evaluate: out must be a tuple of {len(terms)} tensors, one per combination, got one tensor"
            )
        out = (out,)
    if dtype is not None and out is not None:
        raise ValueError("evaluate: out says already which dtype the result has; leave dtype= away")
    operands, matrix, field, leading = union(terms)
    if not _is_tracing():
        target = out
        if target is None and operands and all([type(x) is Tensor for x in operands]):  # noqa: C419
            kind = dtype or promoted([x for t in terms for x in t.operands])
            if not (torch.is_grad_enabled() and any([x.requires_grad for x in operands])):  # noqa: C419
                target = tuple([_empty_like(operands[0], dtype=kind) for _ in terms])
        if type(target) is tuple and dtype is None:
            options = () if field is None else (noise_tuple(field.noise),)
            if direct.combine(operands, matrix, target, leading, False, *options):
                return target[0] if single else target
    result = combine_op(
        operands,
        matrix,
        out=out,
        leading=leading,
        noise=None if field is None else field.noise,
        dtype=None if out is not None else dtype or promoted([x for t in terms for x in t.operands]),
        like=terms[0]._like,
    )
    return result[0] if single else result


def inner(a: Lazy | Tensor, b: Lazy | Tensor | None = None) -> Tensor:
    """Per-sample inner products <a, b> = sum over all but the first dimension, (B,) float32 (float64 for float64).

    `inner(a)` is <a, a>, the squared norm. The combinations are formed and reduced in one launch and never stored; the
    gradient is one more launch. A loss is `weight(pfm.inner(r)).mean()`. Deterministic.
    """
    terms = [a if type(a) is Lazy else lazy(a)]
    if b is None and not _is_tracing():
        only = terms[0]
        _check_versions(only)
        value = squared_norm(only.operands, only.coefficients)
        if value is not None:
            return value
    if b is not None:
        terms.append(b if type(b) is Lazy else lazy(b))
    if terms[0].ndim == 0:
        raise ValueError("inner needs at least one dimension, the samples; got a 0-d combination")
    operands, matrix, field, leading = union(terms)
    result = combine_op(
        operands,
        matrix,
        leading=leading,
        noise=None if field is None else field.noise,
        store=(False,) * len(terms),
        gram=True,
        dtype=torch.float64 if terms[0].dtype == torch.float64 else torch.float32,
        like=terms[0]._like,
    )
    gram = result.gram[..., 0, -1]
    return gram if leading == 1 else gram.flatten(1).sum(1)


def per_sample(h: Tensor, x: Tensor | Lazy) -> Tensor:
    """`h` (B,) or (B, F), or 0-d, reshaped to (B, 1, ..., 1): for plain torch, `per_sample(h, x) * x`.

    Torch's own `h * x` aligns h with the *last* dimension of x and is silently wrong when the sizes happen to agree.
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"per_sample: h must be a tensor, got {type(h).__name__}")
    if h.shape != x.shape[: h.ndim]:
        raise ValueError(f"per_sample: h {tuple(h.shape)} does not match the leading dimensions of x {tuple(x.shape)}")
    return per_row(h, x.ndim)


# ---- from combinations to one call of the kernel --------------------------------------------------------------------


def _check_versions(term: Lazy) -> None:
    for x, version in zip(term.operands, term.versions):
        if type(version) is Versions:
            version.check()
            version = version.operand
        if version is not None and x._version != version:
            raise RuntimeError(
                f"an operand {tuple(x.shape)} of this combination was overwritten after pfm.lazy(...) (version "
                f"{version}, now {x._version}); "
                "evaluate before writing, or use pfm.lazy(x.clone())"
            )


def union(terms: Sequence[Lazy]) -> tuple[tuple[Tensor, ...], tuple[tuple[Any, ...], ...], NoiseField | None, int]:
    """Operands of all combinations, each once, and the matrix over them; the noise is its last column."""
    tracing = _is_tracing()
    columns: dict[int, int] = {}
    operands: list[Tensor] = []
    field: NoiseField | None = None
    leading = 1
    shape = terms[0].shape
    for term in terms:
        if not tracing:
            _check_versions(term)
        for c in term.coefficients:
            if type(c) is tuple and c[1].ndim > leading:
                leading = c[1].ndim
        for x in term.operands:
            if type(x) is NoiseField:
                if x.like.shape != shape:
                    shapes_differ(shape, x.like.shape)
                if field is not None and not field.same_as(x):
                    raise ValueError(
                        "combinations evaluated together can hold one noise field only; evaluate one of the two first"
                    )
                field = x
            elif id(x) not in columns:
                if x.shape != shape:
                    shapes_differ(shape, x.shape)
                columns[id(x)] = len(operands)
                operands.append(x)
    leading = min(leading, len(shape))
    count = len(operands)
    rows = []
    for term in terms:
        row: list[Any] = [0.0] * (count + 1 if field is not None else count)
        for x, c in zip(term.operands, term.coefficients):
            row[count if type(x) is NoiseField else columns[id(x)]] = c
        if leading > 1:  # a (B,) factor beside (B, F) ones
            row = [(c[0], _raised(c[1], shape[:leading])) if type(c) is tuple else c for c in row]
        rows.append(tuple(row))
    return tuple(operands), tuple(rows), field, leading


def _raised(vector: Tensor, lead: torch.Size) -> Tensor:
    return vector if vector.ndim in (0, len(lead)) else per_row(vector, len(lead)).expand(lead)
