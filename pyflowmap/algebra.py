"""Lazy linear combinations of tensors: written as in the paper, run as one kernel.

    >>> x, v, h = pfm.lazy(torch.zeros(2, 3)), pfm.lazy(torch.ones(2, 3)), torch.tensor([0.5, 2.0])
    >>> pfm.evaluate(x + h * v)
    tensor([[0.5000, 0.5000, 0.5000],
            [2.0000, 2.0000, 2.0000]])

A coefficient is a number, a 0-d tensor, or a tensor of the *leading* dimensions of its operand: (B,), or (B, F) for
per-frame times. It is never broadcast over the last ones, as torch's own `h * x` would do in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyflowmap.ops.backend import direct
from pyflowmap.ops.combine import combine as combine_op
from pyflowmap.ops.combine_run import _noise_tuple
from pyflowmap.reference import Noise, per_row

Scalar = Any  # float, 0-d tensor, tensor of leading dimensions

_is_tracing = torch.compiler.is_dynamo_compiling
_empty_like = torch.empty_like


class NoiseField:
    """The operand that stands for a normal field: a name and a shape, no memory."""

    __slots__ = ("like", "noise")

    def __init__(self, like: Tensor, noise: Noise) -> None:
        self.like, self.noise = like, noise

    def same_as(self, other: NoiseField) -> bool:
        a, b = self.noise, other.noise
        if self is other:
            return True
        same = lambda x, y: x is y or (isinstance(x, int) and isinstance(y, int) and x == y)  # noqa: E731
        return (
            same(a.seed, b.seed)
            and same(a.stream, b.stream)
            and a.sample_ids is b.sample_ids
            and self.like.shape == other.like.shape
        )


class Lazy:
    """A linear combination sum_j c_j X_j that has not been computed. `evaluate` computes it."""

    __slots__ = ("coefficients", "operands", "versions")
    __array_ufunc__ = None  # numpy scalars on the left defer to __rmul__

    def __init__(
        self, operands: tuple[Any, ...], coefficients: tuple[Any, ...], versions: tuple[int | None, ...]
    ) -> None:
        self.operands = operands
        self.coefficients = coefficients
        self.versions = versions

    # ---- what it looks like ----

    @property
    def _like(self) -> Tensor:
        first = self.operands[0]
        return first.like if type(first) is NoiseField else first

    @property
    def shape(self) -> torch.Size:
        return self._like.shape

    @property
    def ndim(self) -> int:
        return self._like.ndim

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        return _promoted(self.operands)

    @property
    def requires_grad(self) -> bool:
        tensors = [x for x in self.operands if type(x) is not NoiseField]
        tensors += [c[1] for c in self.coefficients if type(c) is tuple]
        return any(x.requires_grad for x in tensors)

    def detach(self) -> Lazy:
        """The same combination, cut off from autograd: operands and coefficients."""
        return Lazy(
            tuple([x if type(x) is NoiseField else x.detach() for x in self.operands]),
            tuple([(c[0], c[1].detach()) if type(c) is tuple else c for c in self.coefficients]),
            self.versions,
        )

    def __repr__(self) -> str:
        parts: list[str] = []
        for x, c in zip(self.operands, self.coefficients, strict=True):
            number = (
                f"{c:.6g}"
                if isinstance(c, float)
                else f"{c[0]:.6g} * {tuple(c[1].shape)}"
                if type(c) is tuple
                else str(c)
            )
            parts.append(f"{number} * {'noise' if type(x) is NoiseField else 'X'}{len(parts)}")
        return f"Lazy({' + '.join(parts)}; {tuple(self.shape)}, {self.dtype})"

    def __bool__(self) -> NoReturn:
        raise TypeError("a lazy combination has no truth value; pfm.evaluate(...) it first")

    # ---- the algebra ----

    def __add__(self, other: Any) -> Lazy:
        if type(other) is not Lazy:
            if not isinstance(other, Tensor):
                return NotImplemented
            other = lazy(other)
        mine, theirs = self.operands, other.operands
        if len(mine) == 1 and len(theirs) == 1 and mine[0] is not theirs[0] and type(theirs[0]) is not NoiseField:
            return Lazy(mine + theirs, self.coefficients + other.coefficients, self.versions + other.versions)
        return Lazy(*_merge(self, other))

    __radd__ = __add__

    def __neg__(self) -> Lazy:
        return self * -1.0

    def __sub__(self, other: Any) -> Lazy:
        if type(other) is not Lazy:
            if not isinstance(other, Tensor):
                return NotImplemented
            other = lazy(other)
        return self + other * -1.0

    def __rsub__(self, other: Any) -> Lazy:
        return (self * -1.0) + other

    def __mul__(self, h: Scalar) -> Lazy:
        if type(h) is float:
            c = self.coefficients
            if len(c) == 1 and type(c[0]) is float:
                return Lazy(self.operands, (c[0] * h,), self.versions)
            return Lazy(self.operands, tuple([x * h if type(x) is float else _times(x, h) for x in c]), self.versions)
        if isinstance(h, Lazy):
            raise TypeError(
                "the product of two lazy combinations is not linear; pfm.evaluate one of them, or use pfm.inner"
            )
        if isinstance(h, Tensor):
            _check_coefficient(h, self)
        elif not isinstance(h, (int, float, torch.SymFloat, torch.SymInt)):
            try:
                h = float(h)
            except (TypeError, ValueError):
                return NotImplemented
        return Lazy(self.operands, tuple([_times(x, h) for x in self.coefficients]), self.versions)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`tensor * lazy` and friends: torch asks here at once, instead of failing first, ten times slower."""
        method = _REFLECTED.get(func)
        if method is None or kwargs or len(args) != 2:
            name = getattr(func, "__name__", str(func))
            raise TypeError(f"torch.{name} of a lazy combination: pfm.evaluate(...) it first (+ - * / stay lazy)")
        a, b = args
        return method(a, b) if type(a) is Lazy else method(b, a, True)

    def __truediv__(self, h: Scalar) -> Lazy:
        if isinstance(h, Lazy):
            raise TypeError("the quotient of two lazy combinations is not linear; pfm.evaluate one of them")
        return self * (1.0 / h)


def _reflected(name: str, reflected: str) -> Any:
    forward, backward = getattr(Lazy, name), getattr(Lazy, reflected)
    return lambda x, other, swapped=False: backward(x, other) if swapped else forward(x, other)


_ADD, _SUB, _MUL = (
    _reflected("__add__", "__radd__"),
    _reflected("__sub__", "__rsub__"),
    _reflected("__mul__", "__rmul__"),
)
_REFLECTED = {
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__), _ADD),
    **dict.fromkeys((Tensor.sub, Tensor.__sub__, Tensor.__rsub__), _SUB),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _MUL),
}


def _merge(a: Lazy, b: Lazy) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[int | None, ...]]:
    operands, coefficients, versions = list(a.operands), list(a.coefficients), list(a.versions)
    for x, c, version in zip(b.operands, b.coefficients, b.versions, strict=True):
        for i, y in enumerate(operands):
            both = type(x) is NoiseField and type(y) is NoiseField
            if x is y or (both and x.same_as(y)):
                if versions[i] != version:
                    raise RuntimeError(
                        f"operand {i} of a combination, {tuple(x.shape)}, was overwritten between two uses "
                        f"(version {versions[i]} and "
                        f"{version}); evaluate before writing, or use pfm.lazy(x.clone())"
                    )
                coefficients[i] = _plus(coefficients[i], c)
                break
            if both:
                raise ValueError(
                    "a combination can hold one noise field only (it is drawn inside the kernel); "
                    "evaluate one of the two first, or give both the same seed, stream and sample_ids"
                )
        else:
            operands.append(x)
            coefficients.append(c)
            versions.append(version)
    return tuple(operands), tuple(coefficients), tuple(versions)


def _pair(c: Any) -> tuple[Any, Tensor | None]:
    return c if type(c) is tuple else (c, None)


def _times(c: Any, h: Scalar) -> Any:
    scalar, vector = _pair(c)
    if isinstance(h, Tensor):
        return scalar, h if vector is None else _product(vector, h)
    return scalar * h if vector is None else (scalar * h, vector)


def _product(a: Tensor, b: Tensor) -> Tensor:
    low, high = (a, b) if a.ndim <= b.ndim else (b, a)
    return per_row(low, high.ndim) * high


def _plus(a: Any, b: Any) -> Any:
    (s, v), (r, w) = _pair(a), _pair(b)
    if v is None and w is None:
        return s + r
    if v is not None and w is not None:
        low, high = ((s, v), (r, w)) if v.ndim <= w.ndim else ((r, w), (s, v))
        return 1.0, low[0] * per_row(low[1], high[1].ndim) + high[0] * high[1]
    return (1.0, s * v + r) if v is not None else (1.0, r * w + s)


def _shapes_differ(a: torch.Size, b: torch.Size) -> NoReturn:
    raise ValueError(
        f"cannot combine operands of shapes {tuple(a)} and {tuple(b)}: nothing is broadcast here; expand one explicitly"
    )


def _check_coefficient(h: Tensor, x: Lazy) -> None:
    if h.ndim == 0 or (h.shape == x.shape[: h.ndim] and (h.ndim < x.ndim or x.ndim == 1)):
        return
    if h.shape == x.shape:
        raise ValueError(
            f"a coefficient of shape {tuple(h.shape)} has every dimension of its operand: that is an elementwise "
            "product, not a linear "
            "combination; use torch for it"
        )
    raise ValueError(
        f"a coefficient of shape {tuple(h.shape)} does not match the leading dimensions of its operand "
        f"{tuple(x.shape)}; give a number, "
        "a 0-d tensor, or one number per sample"
    )


# ---- the verbs ------------------------------------------------------------------------------------------------------


def lazy(x: Tensor | Lazy) -> Lazy:
    """Wraps a tensor (*leading, *event) so that + - * build a combination instead of computing.

    The combination remembers the tensor's version: evaluating it after the tensor was overwritten raises.
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
    if out is not None and len(combinations) == 1 and dtype is None:
        only = combinations[0]
        if type(only) is Lazy and direct.update(only.operands, only.coefficients, only.versions, out):
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
    operands, matrix, field, leading = _union(terms)
    if not _is_tracing():
        target = out
        if target is None and operands and all([type(x) is Tensor for x in operands]):  # noqa: C419
            kind = dtype or _promoted([x for t in terms for x in t.operands])
            if not (torch.is_grad_enabled() and any([x.requires_grad for x in operands])):  # noqa: C419
                target = tuple([_empty_like(operands[0], dtype=kind) for _ in terms])
        if type(target) is tuple and dtype is None:
            options = () if field is None else (_noise_tuple(field.noise),)
            if direct.combine(operands, matrix, target, leading, False, *options):
                return target[0] if single else target
    result = combine_op(
        operands,
        matrix,
        out=out,
        leading=leading,
        noise=None if field is None else field.noise,
        dtype=None if out is not None else dtype or _promoted([x for t in terms for x in t.operands]),
        like=terms[0]._like,
    )
    return result[0] if single else result


def inner(a: Lazy | Tensor, b: Lazy | Tensor | None = None) -> Tensor:
    """Per-sample inner products <a, b> = sum over all but the first dimension, (B,) float32 (float64 for float64).

    `inner(a)` is <a, a>, the squared norm. The combinations are formed and reduced in one launch and never stored; the
    gradient is one more launch. A loss is `weight(pfm.inner(r)).mean()`. Deterministic.
    """
    terms = [a if type(a) is Lazy else lazy(a)]
    if b is not None:
        terms.append(b if type(b) is Lazy else lazy(b))
    if terms[0].ndim == 0:
        raise ValueError("inner needs at least one dimension, the samples; got a 0-d combination")
    operands, matrix, field, leading = _union(terms)
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
    for x, version in zip(term.operands, term.versions, strict=True):
        if version is not None and x._version != version:
            raise RuntimeError(
                f"an operand {tuple(x.shape)} of this combination was overwritten after pfm.lazy(...) (version "
                f"{version}, now {x._version}); "
                "evaluate before writing, or use pfm.lazy(x.clone())"
            )


def _union(terms: Sequence[Lazy]) -> tuple[tuple[Tensor, ...], tuple[tuple[Any, ...], ...], NoiseField | None, int]:
    """Operands of all combinations, each once, and the matrix over them; the noise is its last column."""
    compiling = _is_tracing()
    operands: list[Tensor] = []
    field: NoiseField | None = None
    leading = 1
    shape = terms[0].shape
    for term in terms:
        if not compiling:
            _check_versions(term)
        for x, c in zip(term.operands, term.coefficients, strict=True):
            own = x.like.shape if type(x) is NoiseField else x.shape
            if own != shape:
                _shapes_differ(shape, own)
            if type(c) is tuple and c[1].ndim > leading:
                leading = c[1].ndim
            if type(x) is NoiseField:
                if field is not None and not field.same_as(x):
                    raise ValueError(
                        "combinations evaluated together can hold one noise field only; evaluate one of the two first"
                    )
                field = x
            elif not any([x is y for y in operands]):  # noqa: C419
                operands.append(x)
    leading = min(leading, terms[0].ndim)
    rows = []
    for term in terms:
        row: list[Any] = [0.0] * (len(operands) + (field is not None))
        for x, c in zip(term.operands, term.coefficients, strict=True):
            place = len(operands) if type(x) is NoiseField else next(i for i, y in enumerate(operands) if y is x)
            row[place] = _plus(row[place], c) if row[place] != 0.0 else c
        if leading > 1:  # a (B,) factor beside (B, F) ones
            row = [(c[0], _raised(c[1], term.shape[:leading])) if type(c) is tuple else c for c in row]
        rows.append(tuple(row))
    return tuple(operands), tuple(rows), field, leading


def _raised(vector: Tensor, lead: torch.Size) -> Tensor:
    return vector if vector.ndim in (0, len(lead)) else per_row(vector, len(lead)).expand(lead)


def _promoted(operands: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype | None = None
    for x in operands:
        own = x.like.dtype if type(x) is NoiseField else x.dtype
        dtype = own if dtype is None or dtype == own else torch.promote_types(dtype, own)
    return dtype  # type: ignore[return-value]
