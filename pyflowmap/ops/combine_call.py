"""One call of `combine` in a normal form: checked in words, ready for any road."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pyflowmap.reference import Coefficient, Noise

MAX_INPUTS = 8
MAX_OUTPUTS = 8
STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # index = csrc/common/dtype.h's DType

# A factor known to the host (a float; while tracing, a float64 CPU tensor of no dimensions), and one per row or None.
Entry = tuple[float | Tensor, Tensor | None]
Matrix = tuple[tuple[Entry, ...], ...]


class Call(NamedTuple):
    inputs: tuple[Tensor, ...]
    matrix: Matrix  # K rows of J entries, one more with noise
    like: Tensor  # gives shape and device
    leading: int
    dtypes: tuple[torch.dtype, ...]  # of the K outputs
    store: tuple[bool, ...]
    noise: Noise | None = None
    mask: Tensor | None = None
    mask_matrix: Matrix | None = None
    clamp: tuple[tuple[float, float] | None, ...] | None = None
    gram: bool = False
    cross: bool = False
    sums: bool = False

    @property
    def wide(self) -> bool:
        return any(x.dtype == torch.float64 for x in self.inputs) or torch.float64 in self.dtypes

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32

    def vectors(self) -> list[Tensor]:
        """The per-row factors, each once."""
        found: dict[int, Tensor] = {}
        for matrix in (self.matrix, self.mask_matrix or ()):
            for row in matrix:
                for _, vector in row:
                    if vector is not None:
                        found.setdefault(id(vector), vector)
        return list(found.values())


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def check_tensor(name: str, x: object, like: Tensor | None, verb: str = "combine") -> None:
    """Raises unless x is a real floating tensor that fits `like` in shape and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{verb}: {name} must be a tensor, got {type(x).__name__}: {x!r:.60}")
    if x.dtype not in STORAGE:
        raise TypeError(
            f"{verb}: {name} is {x.dtype}; float32, bfloat16, float16 or float64 is needed, e.g. {name}.float()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{verb}: {name} has layout {x.layout}; a strided tensor is needed, e.g. {name}.to_dense()")
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        raise TypeError(f"{verb}: {name} is a FakeTensor, which has no memory; call inside its FakeTensorMode")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{verb}: {name} is a negative view of another tensor; call {name}.resolve_neg() first")
    if like is None:
        return
    if x.shape != like.shape:
        raise ValueError(
            f"{verb}: all operands must have one shape (nothing is broadcast), got {name} {tuple(x.shape)} and "
            f"{tuple(like.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{verb}: all operands must be on one device, got {name} on {x.device} and {like.device}")


def entry(name: str, c: Coefficient, like: Tensor, leading: int, verb: str = "combine") -> Entry:
    """A coefficient as (host factor, per-row factor or None), the latter of the leading shape or 0-d, float32 or
    float64."""
    scalar: float | Tensor = 1.0
    vector: Tensor | None = None
    if isinstance(c, tuple):
        if len(c) != 2:
            raise TypeError(f"{verb}: {name} must be a number, a tensor or (number, tensor), got a tuple of {len(c)}")
        scalar, vector = c
    elif isinstance(c, Tensor):
        vector = c
    else:
        scalar = c
    if not isinstance(scalar, (float, int)):
        if isinstance(scalar, Tensor):
            raise TypeError(
                f"{verb}: {name} is a pair of two tensors; the first must be a number: multiply the two instead"
            )
        try:
            scalar = float(scalar)
        except (TypeError, ValueError):
            raise TypeError(
                f"{verb}: {name} must be a number, a tensor or (number, tensor), got {type(scalar).__name__}"
            ) from None
    if vector is None:
        return scalar, None
    if not isinstance(vector, Tensor):
        raise TypeError(f"{verb}: the per-row factor of {name} must be a tensor, got {type(vector).__name__}")
    lead = like.shape[:leading]
    if vector.ndim != 0 and vector.shape != lead:
        raise ValueError(
            f"{verb}: {name} has shape {tuple(vector.shape)}, but the operands {tuple(like.shape)} have the "
            "leading dimensions "
            f"{tuple(lead)}; a coefficient is a number, a 0-d tensor, or one number per row"
        )
    if vector.is_complex():
        raise TypeError(f"{verb}: {name} is {vector.dtype}; a real coefficient is needed")
    if vector.dtype not in (torch.float32, torch.float64):
        vector = vector.to(torch.float32)
    if vector.device != like.device:
        if vector.ndim != 0:
            raise ValueError(
                f"{verb}: {name} is on {vector.device}, the operands are on {like.device}; move it with .to(...)"
            )
        vector = vector.to(like.device)
    return scalar, vector


def matrix_of(
    name: str, rows: Sequence[Sequence[Coefficient]], terms: int, like: Tensor, leading: int, verb: str = "combine"
) -> Matrix:
    """A matrix of entries from the rows that a caller wrote."""
    result = []
    for k, row in enumerate(rows):
        if isinstance(row, (Tensor, float, int)) or len(row) != terms:
            size = "a single value" if isinstance(row, (Tensor, float, int)) else f"{len(row)} coefficients"
            raise ValueError(
                f"{verb}: row {k} of {name} has {size}, expected {terms} (one per input, and one for the noise if any)"
            )
        result.append(tuple(entry(f"{name}[{k}][{j}]", c, like, leading, verb) for j, c in enumerate(row)))
    return tuple(result)


def check_noise(noise: Noise, like: Tensor, leading: int, verb: str = "combine") -> Noise:
    """Raises unless the noise fits the operands."""
    if not 0 <= noise.sample_dims <= leading:
        raise ValueError(f"{verb}: a sample spans {noise.sample_dims} leading dimensions, but leading={leading}")
    samples = 1
    for size in like.shape[: noise.sample_dims]:
        samples *= size
    for name, value in (("seed", noise.seed), ("stream", noise.stream)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.numel() != 1 or value.device != like.device:
                raise ValueError(
                    f"{verb}: noise {name} must be an int or an int64 tensor of one element on {like.device}, got "
                    f"{_describe(value)}"
                )
        elif isinstance(value, float) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{verb}: noise {name} must be an int or an int64 tensor, got {type(value).__name__}")
    ids = noise.sample_ids
    if ids is not None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(
                f"{verb}: sample_ids must be an int64 tensor, got "
                f"{_describe(ids) if isinstance(ids, Tensor) else type(ids).__name__}"
            )
        if ids.ndim != 1 or ids.shape[0] != samples or ids.device != like.device:
            raise ValueError(f"{verb}: sample_ids must hold {samples} numbers on {like.device}, got {_describe(ids)}")
        noise = noise._replace(sample_ids=ids.contiguous())
    return noise


# ---- layouts and aliasing (eager calls only) ------------------------------------------------------------------------


def has_dense_rows(x: Tensor, leading: int) -> bool:
    """Each row is one run of memory, and rows step evenly."""
    inner = sorted(((x.stride(d), x.size(d)) for d in range(leading, x.ndim) if x.size(d) != 1), reverse=True)
    expected = 1
    for stride, size in reversed(inner):
        if stride != expected:
            return False
        expected *= size
    outer = [(x.stride(d), x.size(d)) for d in range(leading) if x.size(d) != 1]
    return all(a[0] == b[0] * b[1] for a, b in zip(outer, outer[1:], strict=False))


def same_inner_order(x: Tensor, y: Tensor, leading: int) -> bool:
    return all(x.size(d) == 1 or x.stride(d) == y.stride(d) for d in range(leading, x.ndim))


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _touch(a: Tensor, b: Tensor, leading: int) -> bool:
    """Whether two tensors may share an element; the rows of two may interleave without touching."""
    (a0, a1), (b0, b1) = _span(a), _span(b)
    if a1 <= b0 or b1 <= a0:
        return False
    if leading == 0 or not (has_dense_rows(a, leading) and has_dense_rows(b, leading)):
        return True
    steps = [
        next((x.stride(d) * x.element_size() for d in reversed(range(leading)) if x.size(d) != 1), 0) for x in (a, b)
    ]
    if steps[0] != steps[1] or steps[0] == 0:
        return True
    widths = [x[(0,) * leading].numel() * x.element_size() for x in (a, b)]
    offset = (b0 - a0) % steps[0]
    return offset < widths[0] or steps[0] - offset < widths[1]


def _may_overlap_itself(x: Tensor) -> bool:
    """Unless each dimension steps over all that the faster ones reach."""
    reach = 0
    for stride, size in sorted((x.stride(d), x.size(d)) for d in range(x.ndim) if x.size(d) > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_aliasing(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], leading: int, verb: str = "combine"
) -> None:
    """Raises for an output that is expanded, partly overlaps an operand, or shares memory with another output."""
    for k, y in enumerate(outputs):
        if y is None or y.numel() == 0 or y.is_meta:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(y.shape, y.stride(), strict=True)):
            raise ValueError(
                f"{verb}: out[{k}] is expanded (stride {y.stride()}): many elements share one place; pass a tensor "
                "that owns its elements"
            )
        if _may_overlap_itself(y):
            raise ValueError(
                f"{verb}: out[{k}] overlaps itself (shape {tuple(y.shape)}, stride {y.stride()}); pass a tensor "
                "that owns its elements"
            )
        for j, x in enumerate(inputs):
            same = x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype
            if x.numel() and not same and _touch(x, y, leading):
                raise ValueError(
                    f"{verb}: out[{k}] partly overlaps inputs[{j}]; it may be exactly that tensor or share nothing "
                    "with it"
                )
        for other in range(k):
            z = outputs[other]
            if z is not None and _touch(z, y, leading):
                raise ValueError(f"{verb}: out[{k}] and out[{other}] share memory; pass separate tensors")
