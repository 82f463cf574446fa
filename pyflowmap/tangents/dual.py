"""`Dual`: a value and its tangent, which every torch function carries along.

Duals are no tensors and not forward-mode AD: to autograd, checkpointing, torch.compile and FSDP a Dual is a pair of
ordinary tensors. `Dual` is a dataclass *and* a pytree node, because FSDP2 and DDP look for tensors in either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .call import call
from .parts import DUALS

__all__ = ["REFUSED", "Dual", "refuse"]


@dataclass(eq=False)
class Dual:
    """A primal x and its tangent dx, of one shape, dtype and device; every torch function of it gives f(x), f'(x) dx.

    primal    a floating-point tensor
    tangent   of the same shape, dtype and device; None is zero, and costs nothing
    tracked   whether autograd records the tangent's arithmetic, for a loss that is differentiated through it
    fallback  "finite_difference": a function without a rule is differenced instead of refused

    Comparisons act on the primal. In-place functions write to a Dual that owns its data; on a view of one they raise.
    `detach` drops the tangent, as in forward-mode AD. A function without a tangent rule raises `MissingRule`.

    >>> y = torch.sin(Dual(torch.zeros(2), torch.ones(2)))
    >>> y.primal, y.tangent
    (tensor([0., 0.]), tensor([1., 1.]))
    """

    primal: Tensor
    tangent: Tensor | None = None
    tracked: bool = False
    fallback: str | None = None

    # Not fields: what in-place functions must know. A rebound Dual is of a later generation than its views.
    generation = 0
    owner = None  # (the Dual that this one is a view of, its generation)
    is_view = False
    detached = None  # the values whose memory x.detach() gave out

    __array_ufunc__ = None  # numpy.float64(2) * x is left to x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    # ---- what it looks like: the primal ----

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        return self.primal.device

    @property
    def layout(self) -> torch.layout:
        return self.primal.layout

    @property
    def ndim(self) -> int:
        return self.primal.ndim

    @property
    def requires_grad(self) -> bool:
        return self.primal.requires_grad

    @property
    def grad_fn(self) -> Any:
        return self.primal.grad_fn

    @property
    def is_leaf(self) -> bool:
        return self.primal.is_leaf

    @property
    def is_cuda(self) -> bool:
        return self.primal.is_cuda

    @property
    def is_cpu(self) -> bool:
        return self.primal.is_cpu

    @property
    def is_nested(self) -> bool:
        return False

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def is_quantized(self) -> bool:
        return False

    @property
    def is_meta(self) -> bool:
        return self.primal.is_meta

    @property
    def is_mkldnn(self) -> bool:
        return False

    @property
    def is_mps(self) -> bool:
        return self.primal.is_mps

    @property
    def is_xpu(self) -> bool:
        return self.primal.is_xpu

    @property
    def names(self) -> Any:
        return self.primal.names  # type: ignore[attr-defined]

    @property
    def itemsize(self) -> int:
        return self.primal.itemsize

    @property
    def nbytes(self) -> int:
        return self.primal.nbytes

    def size(self, dim: int | None = None) -> Any:
        return self.primal.size() if dim is None else self.primal.size(dim)

    def stride(self, dim: int | None = None) -> Any:
        return self.primal.stride() if dim is None else self.primal.stride(dim)

    def dim(self) -> int:
        return self.primal.dim()

    def numel(self) -> int:
        return self.primal.numel()

    def __len__(self) -> int:
        if self.primal.ndim == 0:
            raise TypeError(
                "len() of a 0-d Dual; torch.tensor(x) asks for it where x is no torch.Tensor: pass as_tensor=True to "
                "pfm.jvp"
            )
        return self.primal.shape[0]

    def __iter__(self) -> Any:
        return iter(self.unbind(0))  # given below

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other

    def __contains__(self, value: Any) -> bool:
        return value in self.primal

    def __repr__(self) -> str:
        return f"Dual(primal={self.primal!r}, tangent={self.tangent!r})"

    # ---- what would lose the tangent in silence ----

    def __bool__(self) -> NoReturn:
        refuse("bool(x)")

    def __float__(self) -> NoReturn:
        refuse("float(x)")

    def __int__(self) -> NoReturn:
        refuse("int(x)")

    def __index__(self) -> NoReturn:
        refuse("operator.index(x)")

    def __complex__(self) -> NoReturn:
        refuse("complex(x)")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("numpy.asarray(x)")

    def __getattr__(self, name: str) -> NoReturn:
        if name in _TENSOR_NAMES:
            raise AttributeError(_LOST.format(f"x.{name}"))
        raise AttributeError(f"'Dual' object has no attribute {name!r}")

    __hash__ = object.__hash__


_TENSOR_NAMES = frozenset(name for name in dir(Tensor) if not name.startswith("__"))


_LOST = (
    "{} of a Dual would lose its tangent; use x.detach() where the value alone is meant (comparisons such as "
    "(x > 0).any() work as they are)"
)


def refuse(what: str) -> NoReturn:
    raise TypeError(_LOST.format(what))


def _method(function: Any) -> Any:
    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        return call(function, (self, *args), kwargs)

    method.__name__ = method.__qualname__ = function.__name__
    method.__doc__ = f"torch.Tensor.{function.__name__} of value and tangent."
    return method


def _method_in_python(name: str) -> Any:
    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        # The compiler knows it in the table by this path only.
        return call(getattr(Tensor, name), (self, *args), kwargs)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"torch.Tensor.{name} of value and tangent."
    return method


def _swapped(function: Any) -> Any:
    return lambda self, other: call(function, (other, self), {})


def _attribute(getter: Any) -> property:
    return property(lambda self: call(getter, (self,), {}))


# Methods that hand out the bare value, or hook autograd: they are refused by name (`__getattr__`).
REFUSED = {
    "apply_", "map_", "map2_", "item", "tolist", "numpy", "data_ptr", "storage", "untyped_storage", "retain_grad",
    "register_hook", "register_post_accumulate_grad_hook", "backward", "share_memory_", "pin_memory", "set_",
    "requires_grad_", "as_subclass", "module_load", "to_sparse", "to_dense", "record_stream", "dim_order", "reinforce",
}  # fmt: skip
# torch writes some operators in Python; the compiler knows the functions in C that they end in.
_OPERATORS = {
    "add": Tensor.add, "sub": Tensor.sub, "mul": Tensor.mul, "truediv": Tensor.div, "pow": Tensor.pow,
    "floordiv": Tensor.floor_divide, "mod": Tensor.remainder, "matmul": Tensor.matmul,
    "radd": Tensor.add, "rmul": Tensor.mul, "rsub": torch.rsub,
    "neg": Tensor.neg, "pos": Tensor.positive, "abs": Tensor.abs, "invert": Tensor.bitwise_not,
    "eq": Tensor.eq, "ne": Tensor.ne, "lt": Tensor.lt, "le": Tensor.le, "gt": Tensor.gt, "ge": Tensor.ge,
    "iadd": Tensor.add_, "isub": Tensor.sub_, "imul": Tensor.mul_, "itruediv": Tensor.div_, "ipow": Tensor.pow_,
    "imod": Tensor.remainder_, "ifloordiv": Tensor.floor_divide_,
    "getitem": Tensor.__getitem__, "setitem": Tensor.__setitem__,
}  # fmt: skip
_SWAPPED = {"rpow": torch.pow, "rfloordiv": torch.floor_divide, "rmod": torch.remainder, "rmatmul": torch.matmul}


def _give_methods() -> None:
    for name, function in _OPERATORS.items():
        setattr(Dual, f"__{name}__", _method(function))
    for name, function in _SWAPPED.items():
        setattr(Dual, f"__{name}__", _swapped(function))
    for name in sorted(_TENSOR_NAMES):
        if name in vars(Dual) or name in REFUSED or name.startswith("_"):
            continue
        value: Any = torch.unflatten if name == "unflatten" else getattr(Tensor, name, None)  # Tensor's calls super()
        if name in ("T", "mT", "H", "mH", "real", "imag"):
            setattr(Dual, name, _attribute(value.__get__))
        elif callable(value) and hasattr(value, "__name__") and not isinstance(value, type):
            setattr(Dual, name, _method_in_python(name) if isinstance(value, FunctionType) else _method(value))


_give_methods()
DUALS.append(Dual)

pytree.register_pytree_node(
    Dual,
    lambda x: ([x.primal, x.tangent], (x.tracked, x.fallback)),
    lambda parts, context: Dual(*parts, *context),
    serialized_type_name="pyflowmap.Dual",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
