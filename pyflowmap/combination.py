"""`Lazy`: a linear combination of tensors that has not been computed, and the arithmetic of its coefficients.

A coefficient is a float, or the pair (float, tensor of leading dimensions). What evaluates combinations is
`pyflowmap.algebra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyflowmap.ops.backend import direct
from pyflowmap.reference import Noise, per_row

Scalar = Any  # float, 0-d tensor, tensor of leading dimensions


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


class Versions:
    """The version of an operand that has a coefficient tensor, and that tensor's own.

    It stands where the operand's version would, and is asked for a number by C code that compares it with the operand's
    (`__index__`): none fits where the coefficient was overwritten. So a combination of floats costs nothing more.
    """

    __slots__ = ("coefficient", "operand", "recorded")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, operand: int | None, coefficient: Tensor, recorded: int) -> None:
        self.operand, self.coefficient, self.recorded = operand, coefficient, recorded

    def __index__(self) -> int:
        return self.operand if self.operand is not None and self.coefficient._version == self.recorded else -1

    def __eq__(self, other: object) -> bool:
        return self.operand == operand_version(other)

    def check(self) -> None:
        now = self.coefficient._version
        if now != self.recorded:
            raise RuntimeError(
                f"a coefficient {tuple(self.coefficient.shape)} of this combination was overwritten after it was "
                f"multiplied in (version {self.recorded}, now {now}); evaluate before writing, or multiply by h.clone()"
            )


def operand_version(version: Any) -> Any:
    return version.operand if type(version) is Versions else version


def _versions(operands: Sequence[Any], coefficients: Sequence[Any], versions: Sequence[Any]) -> tuple[Any, ...]:
    """What is recorded of operands, and of the tensors among the coefficients as they are now."""
    found = []
    for x, c, version in zip(operands, coefficients, versions, strict=True):
        version = operand_version(version)
        # Without a counter, as in inference mode, C code asks none of the operand either.
        if type(c) is tuple and (version is not None or type(x) is NoiseField):
            recorded = direct.version_of(c[1])
            if recorded is not None:
                version = Versions(version, c[1], recorded)
        found.append(version)
    return tuple(found)


class Lazy:
    """A linear combination sum_j c_j X_j that has not been computed. `evaluate` computes it."""

    __slots__ = ("coefficients", "operands", "versions")
    __array_ufunc__ = None  # numpy scalars on the left defer to __rmul__

    def __init__(
        self, operands: tuple[Any, ...], coefficients: tuple[Any, ...], versions: tuple[int | Versions | None, ...]
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
        return promoted(self.operands)

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

    def __pow__(self, other: Any) -> NoReturn:
        raise TypeError(
            "a power of a lazy combination is not linear; pfm.evaluate(...) it first, or use pfm.inner for a squared "
            "norm"
        )

    # ---- the algebra ----

    def __add__(self, other: Any) -> Lazy:
        if type(other) is not Lazy:
            if not isinstance(other, Tensor):
                return NotImplemented
            other = Lazy((other,), (1.0,), (direct.version_of(other),))
        return Lazy(*(direct.sum_of(1.0, self, 1.0, other) or _merge(self, other)))

    __radd__ = __add__

    def __neg__(self) -> Lazy:
        return self * -1.0

    def __sub__(self, other: Any) -> Lazy:
        if type(other) is not Lazy:
            if not isinstance(other, Tensor):
                return NotImplemented
            other = Lazy((other,), (1.0,), (direct.version_of(other),))
        return Lazy(*(direct.sum_of(1.0, self, -1.0, other) or _merge(self, other * -1.0)))

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
        if not isinstance(h, Tensor):
            return Lazy(self.operands, tuple([_times(x, h) for x in self.coefficients]), self.versions)
        if len(self.versions) == 1 and type(self.versions[0]) is int and type(self.coefficients[0]) is float:
            own, recorded = self.versions[0], direct.version_of(h)  # the commonest, a microsecond sooner
            both = own if recorded is None else Versions(own, h, recorded)
            return Lazy(self.operands, ((self.coefficients[0], h),), (both,))
        for version in self.versions:
            if type(version) is Versions:
                version.check()  # the product is of its numbers now
        coefficients = tuple([_times(x, h) for x in self.coefficients])
        return Lazy(self.operands, coefficients, _versions(self.operands, coefficients, self.versions))

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
        if isinstance(h, Tensor) and h.dtype != torch.float64:
            h = h.to(torch.float32)  # the reciprocal of a bfloat16 would be rounded once too often
        return self * (1.0 / h)


class _OfTensors:
    """What a tensor has and a lazy has not. Not `__getattr__`, which would make every attribute slower."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, x: Lazy | None, owner: type) -> NoReturn:
        raise AttributeError(
            f"x.{self.name} of a lazy combination: pfm.evaluate(...) it first (+ - * / stay lazy); it has shape, ndim, "
            "dtype, device, requires_grad and detach()"
        )


for _name in dir(Tensor):
    if not _name.startswith("_") and _name not in vars(Lazy):
        setattr(Lazy, _name, _OfTensors(_name))


def weighted(*terms: Any) -> Lazy:
    """weighted(a, x, b, y, ...) = a x + b y + ... of lazies: the same combination, built at once (a microsecond less).

    >>> import torch
    >>> x = Lazy((torch.ones(2),), (1.0,), (None,))
    >>> weighted(0.5, x, 2.0, x)
    Lazy(2.5 * X0; (2,), torch.float32)
    """
    found = direct.sum_of(*terms)
    if found is not None:
        return Lazy(*found)
    result = terms[0] * terms[1]
    for i in range(2, len(terms), 2):
        result = result + terms[i] * terms[i + 1]
    return result


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


def _merge(a: Lazy, b: Lazy) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    operands, coefficients, versions = list(a.operands), list(a.coefficients), list(a.versions)
    for x, c, version in zip(b.operands, b.coefficients, b.versions, strict=True):
        for i, y in enumerate(operands):
            both = type(x) is NoiseField and type(y) is NoiseField
            if x is y or (both and x.same_as(y)):
                before, after = operand_version(versions[i]), operand_version(version)
                if before != after:
                    raise RuntimeError(
                        f"operand {i} of a combination, {tuple(x.shape)}, was overwritten between two uses "
                        f"(version {before} and "
                        f"{after}); evaluate before writing, or use pfm.lazy(x.clone())"
                    )
                for each in (versions[i], version):
                    if type(each) is Versions:
                        each.check()  # the sum is of its numbers now
                coefficients[i] = plus(coefficients[i], c)
                versions[i] = _versions((x,), (coefficients[i],), (version,))[0]
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


def plus(a: Any, b: Any) -> Any:
    (s, v), (r, w) = _pair(a), _pair(b)
    if v is None and w is None:
        return s + r
    if v is not None and w is not None:
        low, high = ((s, v), (r, w)) if v.ndim <= w.ndim else ((r, w), (s, v))
        return 1.0, low[0] * per_row(low[1], high[1].ndim) + high[0] * high[1]
    return (1.0, s * v + r) if v is not None else (1.0, r * w + s)


def shapes_differ(a: torch.Size, b: torch.Size) -> NoReturn:
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


def promoted(operands: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype | None = None
    for x in operands:
        own = x.like.dtype if type(x) is NoiseField else x.dtype
        dtype = own if dtype is None or dtype == own else torch.promote_types(dtype, own)
    return dtype  # type: ignore[return-value]
