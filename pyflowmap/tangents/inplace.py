"""Writing to a Dual: it is rebound to the new value and tangent. What cannot be right is refused.

A Dual that owns its data can be rebound, and everyone who holds it sees the new pair. A view cannot: the owner would
not see the write. A view taken before its owner was written to is stale, and using it raises. What x.detach() gave out
is a plain tensor, which cannot raise: it is written to as well, as torch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parts import any_tangent, is_dual, primals, tangent
from .registry import RULES, Kind, Rule, name_of, spellings
from .registry import write as enter

__all__ = ["note_view", "rebind", "write"]


def write(call: Any, rule: Rule, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An in-place function of which some argument is a Dual; `call` is `call.call`."""
    target = args[0]
    if not is_dual(target):
        raise RuntimeError(  # a TypeError would make Python try x = x + y, which leaves other names of x behind
            f"{name_of(function)} would write a tangent into a plain tensor {tuple(target.shape)}, which cannot hold "
            "one; make the target from a Dual (torch.empty_like(x), x.new_zeros(...)), or build it with torch.cat or "
            "torch.stack"
        )
    if target.is_view and target.tangent is None and not any_tangent((args, kwargs)) and is_dual(target.owner[0]):
        function(*primals(args), **primals(kwargs))  # no tangent to lose: into the memory that is the owner's, too
        return target
    _refuse_view(target, function)
    function = rule.function
    return rebind(target, function(*args, **kwargs) if function in _SPECIAL else call(function, args, kwargs))


def rebind(target: Any, result: Any) -> Any:
    """`target` becomes `result`, cast to the dtype of `target`; returns `target`."""
    if result is target:
        return target
    _refuse_view(target, None)
    value, derivative = (result.primal, result.tangent) if is_dual(result) else (result, None)
    if value.shape != target.primal.shape:
        raise RuntimeError(
            f"an in-place result of shape {tuple(value.shape)} does not fit the Dual of shape "
            f"{tuple(target.primal.shape)}"
        )
    dtype = target.primal.dtype
    value, derivative = value.to(dtype), None if derivative is None else derivative.to(dtype)
    if target.detached is not None:
        value = _written(target, value, derivative)
    target.primal, target.tangent = value, derivative
    target.generation += 1
    return target


# ---- x.detach(): plain tensors in the memory of a Dual -----------------------------------------------------------


class _Detached:
    """Stands for the owner of a Dual whose new value could not stay in the memory that detached tensors have: a write
    to one of these, which the Dual does not show, makes it stale."""

    is_detached = True

    def __init__(self, memories: list[Tensor], primal: Tensor, tangent: Tensor | None) -> None:
        self.detached, self.primal, self.tangent = memories, primal, tangent

    @property
    def generation(self) -> int:
        return sum(x._version for x in self.detached)


def _note_detached(x: Any) -> None:
    """The plain value of x is given out. Its owner remembers in which memory: a later write must reach it."""
    owner = x if x.owner is None else x.owner[0]
    if owner.detached is None:
        owner.detached = [owner.primal]
    elif not any(memory is owner.primal for memory in owner.detached):
        owner.detached.append(owner.primal)
        if not is_dual(owner):
            x.owner = (owner, owner.generation)


def _written(target: Any, value: Tensor, derivative: Tensor | None) -> Tensor:
    """The new value, written to the memory of detached tensors, too, and in that memory where autograd lets it be."""
    compiling = torch.compiler.is_compiling()
    memories = target.detached
    for memory in memories:
        if memory.is_leaf and memory.requires_grad:
            raise RuntimeError(
                f"an in-place function writes to a Dual {tuple(value.shape)} whose value requires a gradient and was "
                "detached before, so that x.detach() would have to show the write; use the out-of-place form, x = x + y"
            )
        if compiling or not torch._C._is_alias_of(value, memory):  # type: ignore[attr-defined]
            memory.detach().copy_(value.detach())
    if len(memories) == 1 and not value.requires_grad:
        target.detached = [memories[0].detach()]
        return target.detached[0]
    if not compiling:
        owner = _Detached(memories, value, derivative)
        target.owner = (owner, owner.generation)
    return value


for _spelling in spellings("detach"):
    RULES[_spelling] = Rule(Kind.CONSTANT, _note_detached)


def _refuse_view(target: Any, function: Any) -> None:
    if target.is_view:
        name = "an in-place function" if function is None else name_of(function)
        raise RuntimeError(
            f"{name} writes to a view of a Dual {tuple(target.primal.shape)}, which its owner would not see; write "
            "owner[...] = value, or use the out-of-place form, x = x + y"
        )


def note_view(result: Any, args: Any, view: str) -> Any:
    """Marks the Duals of `result` as views of the first argument, or of "each" of them, where they are.

    Decided by strides and indices, not by Tensor._is_view, which knows nothing in inference mode or while compiling.
    """
    if isinstance(result, (tuple, list)):
        sources: Any = [args[0]] * len(result)
        if view == "each":
            sources = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return type(result)([_noted(y, x, args, view) for y, x in zip(result, sources, strict=True)])
    return _noted(result, args[0], args, view)


def _noted(result: Any, source: Any, args: Any, view: str) -> Any:
    if not is_dual(result) or not is_dual(source):
        return result
    if result.primal is source.primal:
        return source  # x.contiguous(), x.to(...): torch, too, gives back x itself
    if view == "reshape":
        result.is_view = source.primal.is_contiguous() or not result.primal.is_contiguous()  # else it is a copy
    elif view == "index":
        result.is_view = _is_basic(args[1])
    else:
        result.is_view = view != "self"
    if result.is_view:
        owner = source.owner[0] if source.owner is not None else source
        result.owner = (owner, owner.generation)
    return result


def _is_basic(index: Any) -> bool:
    """Whether x[index] is a view: of numbers, slices, None and ...; lists and tensors copy."""
    if isinstance(index, tuple):
        return all(map(_is_basic, index))
    if isinstance(index, (bool, list, range)):
        return False
    if isinstance(index, Tensor):
        return index.ndim == 0 and index.dtype != torch.bool
    return getattr(index, "ndim", 0) == 0


# ---- in-place functions that have no out-of-place twin -----------------------------------------------------------


def _setitem(x: Any, index: Any, value: Any) -> Any:
    new = x.primal.clone()
    new[primals(index)] = primals(value)
    dx, dvalue = tangent(x), tangent(value)
    if dx is None and dvalue is None:
        return new
    with _grad_of(x, value):
        dnew = torch.zeros_like(x.primal) if dx is None else dx.clone()
        dnew[primals(index)] = 0.0 if dvalue is None else dvalue.to(dnew.dtype)
    return type(x)(new, dnew, x.tracked, x.fallback)


def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    value = primals(source)
    new = value.to(x.primal.device, x.primal.dtype).expand(x.primal.shape).clone()
    dsource = tangent(source)
    if dsource is None:
        return new
    with _grad_of(x, source):
        dnew = dsource.to(x.primal.device, x.primal.dtype).expand(x.primal.shape).clone()
    return type(x)(new, dnew, x.tracked, x.fallback)


def _zero(x: Any) -> Any:
    return torch.zeros_like(x.primal)


def _fill(x: Any, value: Any) -> Any:
    if is_dual(value):
        return _copy(x, value)
    return torch.full_like(x.primal, value)


def _grad_of(*xs: Any) -> Any:
    tracked = any(x.tracked for x in xs if is_dual(x))
    return torch.set_grad_enabled(tracked and torch.is_grad_enabled())


_SPECIAL = (_setitem, _copy, _zero, _fill)
_AUGMENTED = {
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div", "__ipow__": "pow",
    "__imod__": "remainder", "__ifloordiv__": "floor_divide",
}  # fmt: skip


def _enter_all() -> None:
    for name in dir(Tensor):
        plain = _AUGMENTED.get(name) or (name[:-1] if name.endswith("_") and not name.startswith("_") else None)
        if plain is not None and callable(getattr(Tensor, plain, None)):
            enter([getattr(Tensor, name)], getattr(Tensor, plain))
            if not name.startswith("_") and hasattr(torch, name):
                enter([getattr(torch, name)], getattr(Tensor, plain))
    for special, name in zip(_SPECIAL, ("__setitem__", "copy_", "zero_", "fill_"), strict=True):
        enter([getattr(Tensor, name)], special)  # type: ignore[arg-type]
    for name in ("relu_", "leaky_relu_", "elu_", "selu_", "celu_", "hardtanh_", "threshold_", "rrelu_"):
        enter([getattr(torch.nn.functional, name)], getattr(torch.nn.functional, name[:-1]))


_enter_all()
