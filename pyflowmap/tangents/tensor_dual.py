"""`TensorDual`: a Dual that is an instance of torch.Tensor, for code that asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .call import call
from .dual import REFUSED, Dual, refuse
from .parts import DUALS

__all__ = ["TensorDual", "refused_where_sharded"]


class TensorDual(Tensor):
    """A `Dual` that passes isinstance(x, torch.Tensor) and torch.is_tensor(x). Same fields, same rules.

    A tensor subclass has no data of its own here; what does not go through `__torch_function__` raises. DDP and FSDP2
    would drop gradients of one in silence, so it is refused there.
    """

    primal: Tensor
    tangent: Tensor | None
    tracked: bool
    fallback: str | None
    generation = 0
    owner = None
    is_view = False
    detached = None

    @staticmethod
    def __new__(
        cls: type, primal: Tensor, tangent: Tensor | None = None, tracked: bool = False, fallback: str | None = None
    ) -> Any:
        x: Any = Tensor._make_wrapper_subclass(
            cls,
            primal.shape,
            strides=primal.stride(),
            storage_offset=primal.storage_offset(),
            dtype=primal.dtype,
            layout=primal.layout,
            device=primal.device,
            requires_grad=False,
        )
        x.primal, x.tangent, x.tracked, x.fallback = primal, tangent, tracked, fallback
        return x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} reached a TensorDual below torch's functions, where its tangent would be lost")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TensorDual(primal={self.primal!r}, tangent={self.tangent!r})"


def _refusing(name: str) -> Any:
    return lambda self, *args, **kwargs: refuse(f"x.{name}()")


def _give_as_dual() -> None:
    """What a Dual answers without a rule, and what it refuses: torch's own methods would lose the tangent."""
    for name, value in vars(Dual).items():
        if isinstance(value, property):
            setattr(TensorDual, name, value)
    for name in _AS_DUAL:
        setattr(TensorDual, name, vars(Dual)[name])
    for name in REFUSED:
        setattr(TensorDual, name, _refusing(name))


_AS_DUAL = (
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__",
    "__len__", "__iter__", "__contains__", "size", "stride", "dim", "numel",
)  # fmt: skip
_give_as_dual()
DUALS.append(TensorDual)


def refused_where_sharded() -> AbstractContextManager:
    """Within it, a call of a module wrapped by DDP or FSDP raises: its hooks know tensors and trees of tensors."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return nullcontext()
    return _refused_where_sharded()


@contextmanager
def _refused_where_sharded() -> Iterator[None]:
    handle = register_module_forward_pre_hook(_refuse_wrapped)
    try:
        yield
    finally:
        handle.remove()


def _refuse_wrapped(module: nn.Module, args: Any) -> None:
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}:
        raise TypeError(
            f"as_tensor=True does not work under DDP or FSDP ({type(module).__name__} is called), where gradients of a "
            "tensor subclass are lost in silence; use plain Duals (as_tensor=False)"
        )
