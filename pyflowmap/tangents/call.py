"""One torch function of Duals: its value, and its tangent by the rule in the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import inplace
from .differences import difference
from .parts import DUALS, any_tangent, check_fresh, first_dual, is_dual, tangent, tangents, unpack
from .registry import RULES, Kind, MissingRule, Rule, find, name_of

__all__ = ["call"]


def call(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """`function(*args, **kwargs)` where an argument may be a Dual: value and tangent of the result, as a Dual.

    torch calls this for its own functions. For one's own function, wrapped in `call` and given a rule by
    `pfm.tangents.rule`, the rule is used instead of tracing into it.

    Raises MissingRule for a torch function without a rule.
    """
    if args and not torch.compiler.is_compiling():  # which would trace both ways and gain from neither
        rule = RULES.get(function) or find(function)  # the table alone knows most
        if rule is not None:
            result = _simple(rule, function, args, kwargs)
            if result is not None:
                return result
    dual, values = unpack(args)
    options = kwargs or {}
    if options:
        other, parts = unpack(options.values())
        options = dict(zip(options, parts, strict=True))
        if other is not None and (dual is None or (other.tracked and not dual.tracked)):
            dual = other
    kwargs = kwargs or {}
    if dual is None:
        return function(*args, **kwargs)
    rule = find(function)
    if rule is None:
        if dual.fallback == "finite_difference":
            return _pair(dual, *difference(function, args, kwargs, dual))
        raise MissingRule(_how_to_add(function))
    if "axis" in kwargs or "keepdims" in kwargs:
        kwargs, options = _as_torch(kwargs), _as_torch(options)
    if not args:
        args, kwargs = _positional(kwargs)
        values, options = _positional(options)
    kind = rule.kind
    if kind is _WRITE:
        return inplace.write(call, rule, function, args, kwargs)
    if rule.inplace >= 0:
        asked, without_flag, others = _without_flag(rule, args, kwargs)
        if asked:
            return inplace.rebind(args[0], call(function, without_flag, others))
    if kwargs and kwargs.get("out") is not None:
        raise TypeError(f"{name_of(function)}(out=...) of a Dual: write x = f(...) instead of f(..., out=x)")
    if dual.tangent is None and kind in _OF_TANGENTS and not any_tangent((args, kwargs)):
        value = function(*values, **options)
        if args and is_dual(args[0]) and value is args[0].primal:
            return args[0]
        return value if rule.view == "no" else inplace.note_view(_zero(dual, value), args, rule.view)
    if kind is _COMPOSITE:
        return rule.function(*args, **kwargs)  # type: ignore[misc]
    if kind is _JOINT:
        value, derivative = rule.function(*args, **kwargs)  # type: ignore[misc]
        # dropout in evaluation gives back its argument, which later writes go to
        same = args and is_dual(args[0]) and value is args[0].primal
        return args[0] if same else _pair(dual, value, derivative)
    value = function(*values, **options)
    if kind is _CONSTANT:
        if rule.function is not None:
            rule.function(*args, **kwargs)
        return value
    if kind is _FRESH:
        if first_dual((args[1:], kwargs)) is not None:
            raise TypeError(
                f"{name_of(function)} of a number with a tangent would lose it; write x.expand(shape) * 1.0"
            )
        return type(dual)(value, None, dual.tracked, dual.fallback) if value.is_floating_point() else value
    if dual.tracked or not torch.is_grad_enabled():
        derivative = _tangent(rule, function, value, args, kwargs, values, options)
    else:
        _set_grad_enabled(False)  # torch.no_grad() costs two microseconds more
        try:
            derivative = _tangent(rule, function, value, args, kwargs, values, options)
        finally:
            _set_grad_enabled(True)
    result = _pair(dual, value, derivative)
    return result if rule.view == "no" else inplace.note_view(result, args, rule.view)


def _simple(rule: Rule, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """The commonest call, a function of one Dual, with fewer questions; None where it is not that."""
    x, *rest = args
    if (
        type(x) not in DUALS
        or rule.kind is not _TANGENT
        or x.tangent is None
        or not _LEAVES.issuperset(map(type, rest))
    ):
        return None
    if kwargs:
        if (
            not _OPTIONS.issuperset(map(type, kwargs.values()))
            or kwargs.get("inplace")
            or not _RENAMED.isdisjoint(kwargs)
        ):
            return None
    else:
        kwargs = {}
    if rule.inplace > 0 and len(args) > rule.inplace and args[rule.inplace]:
        return None
    if x.owner is not None:
        check_fresh(x)
    if rule.pair is not None:
        both = rule.pair(*args, **kwargs)
        if both is not None:
            return type(x)(*both, x.tracked, x.fallback)
    value = function(x.primal, *rest, **kwargs)
    if x.tracked or not torch.is_grad_enabled():
        derivative = rule.function(value, *args, **kwargs)  # type: ignore[misc]
    else:
        _set_grad_enabled(False)
        try:
            derivative = rule.function(value, *args, **kwargs)  # type: ignore[misc]
        finally:
            _set_grad_enabled(True)
    result = _pair(x, value, derivative)
    return result if rule.view == "no" else inplace.note_view(result, args, rule.view)


# Members of an Enum are looked up slowly, and this is asked of every function.
_WRITE, _COMPOSITE, _JOINT, _CONSTANT, _FRESH, _LINEAR, _TANGENT = (
    Kind.WRITE, Kind.COMPOSITE, Kind.JOINT, Kind.CONSTANT, Kind.FRESH, Kind.LINEAR, Kind.TANGENT,
)  # fmt: skip
# Types that neither are Duals nor hold any; options are numbers and words, and two of numpy's names are translated.
_OPTIONS = frozenset((type(None), bool, int, float, str, torch.dtype))
_LEAVES = _OPTIONS | {Tensor, torch.nn.Parameter}
_RENAMED = frozenset(("axis", "keepdims", "out"))
_set_grad_enabled = torch._C._set_grad_enabled
_OF_TANGENTS = (Kind.TANGENT, Kind.JOINT, Kind.LINEAR)


def _as_torch(kwargs: dict[str, Any]) -> dict[str, Any]:
    """numpy's names of two parameters, which torch takes, too, in the names that rules have."""
    names = {"axis": "dim", "keepdims": "keepdim"}
    return {names.get(key, key): value for key, value in kwargs.items()}


def _positional(kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """torch.sin(input=x), torch.cat(tensors=[x, y]): the first argument by position, as rules have it."""
    for name in ("input", "tensors", "self"):
        if name in kwargs and "condition" not in kwargs:
            return (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
    return (), kwargs


def _tangent(rule: Rule, function: Any, value: Any, args: Any, kwargs: Any, values: Any, options: Any) -> Any:
    if rule.kind is not _LINEAR:
        return rule.function(value, *args, **kwargs)  # type: ignore[misc]
    first = args[0]
    dx = tangent(first) if is_dual(first) or isinstance(first, Tensor) else tangents(first)
    return None if dx is None else function(dx, *values[1:], **options)


def _pair(dual: Any, value: Any, derivative: Any) -> Any:
    """Value and tangent, which may be tuples of them, as Duals of the kind of `dual`."""
    if isinstance(value, (tuple, list)):
        parts = derivative if derivative is not None else [None] * len(value)
        duals = [_pair(dual, y, dy) for y, dy in zip(value, parts, strict=True)]
        return type(value)(*duals) if hasattr(value, "_fields") else type(value)(duals)
    if derivative is None or not (value.is_floating_point() or value.is_complex()):
        return value
    if derivative.shape != value.shape:
        derivative = derivative.expand(value.shape)
    if derivative.dtype != value.dtype:
        derivative = derivative.to(value.dtype)
    return type(dual)(value, derivative, dual.tracked, dual.fallback)


def _zero(dual: Any, value: Any) -> Any:
    """What shares memory with a Dual without a tangent: such a Dual again, or a write to either would pass unseen."""
    if isinstance(value, (tuple, list)):
        return type(value)([_zero(dual, y) for y in value])
    known = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return type(dual)(value, None, dual.tracked, dual.fallback) if known else value


def _without_flag(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any, Any]:
    """Whether `inplace` is on, and the arguments with it turned off."""
    if "inplace" in kwargs:
        return bool(kwargs["inplace"]), args, {**kwargs, "inplace": False}
    if len(args) > rule.inplace:
        return bool(args[rule.inplace]), (*args[: rule.inplace], False, *args[rule.inplace + 1 :]), kwargs
    return False, args, kwargs


def _how_to_add(function: Any) -> str:
    name = name_of(function)
    return (
        f"no tangent rule for {name}. To add one: (1) write f(out, *args) that returns the tangent of out from "
        f"pfm.tangents.primal(x) and pfm.tangents.tangent(x); (2) decorate it with @pfm.tangents.rule({name}); (3) "
        'import it before pfm.jvp. Or pass fallback="finite_difference" to pfm.jvp: this function alone is then '
        "differenced"
    )
