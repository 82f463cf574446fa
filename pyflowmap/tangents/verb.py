"""`jvp`: a function's value and its derivative in one direction, of any torch model as it stands."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .dual import Dual
from .einops import introduce
from .parts import DUALS, check_fresh, first_dual, is_dual
from .tensor_dual import TensorDual, refused_where_sharded
from .untracked import end

__all__ = ["jvp", "seeded"]


def jvp(
    fn: Callable,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    has_aux: bool = False,
    track_tangent: bool = False,
    as_tensor: bool = False,
    fallback: str | None = None,
) -> Any:
    """y = fn(*primals) and dy = d/dh fn(*(primals + h tangents)) at h = 0, for two forward passes and no copies.

    fn             a module or function of torch operations; compiled, checkpointed and sharded ones are as good
    primals        its positional arguments; each a tensor or a tree (list, tuple, dict) of them, or anything else
    tangents       one per primal: a tensor of its shape, dtype and device, a number (that times ones), None or 0.0 for
                   zero, which is never computed with; or a tree as the primal's
    kwargs         keyword arguments of fn, without tangents: conditions, labels
    has_aux        fn returns (y, aux); aux is handed through, as values
    track_tangent  record the tangent for backward, for losses that are differentiated through it (LSD). If not, its
                   arithmetic leaves nothing behind, and a backward pass that reaches dy raises; dy.detach() says
                   that dy is meant as a constant
    as_tensor      the arguments are instances of torch.Tensor, for code that asks isinstance(x, torch.Tensor); not
                   under DDP or FSDP
    fallback       "finite_difference": functions without a tangent rule are differenced (float32: about 3 digits)

    `pfm.tangents.check` of the same arguments compares the result with plain calls of fn; once for a new network.

    Returns (y, dy), or (y, dy, aux): dy is a tree like y, with None for what is not a floating-point tensor.

    Raises MissingRule (a NotImplementedError) for a function without a tangent rule, TypeError and ValueError for
    tangents that do not fit.

    >>> y, dy = jvp(lambda x, t: t * torch.sin(x), (torch.zeros(3), torch.ones(())), (torch.ones(3), 1.0))
    >>> dy
    tensor([1., 1., 1.])
    """
    if fallback not in (None, "finite_difference"):
        raise ValueError(f'fallback = {fallback!r}; it is None or "finite_difference"')
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise TypeError(
            f"primals is a {type(primals).__name__}, tangents a {type(tangents).__name__}; both are tuples, e.g. (x, t)"
        )
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} primals but {len(tangents)} tangents; give one each, None for zero")
    if kwargs and first_dual(kwargs) is not None:
        raise TypeError("kwargs holds a Dual: tangents belong to primals, derivatives of derivatives are not supported")
    kind: Any = TensorDual if as_tensor else Dual
    args = seeded(primals, tangents, kind, track_tangent, fallback)
    running = _traced if torch.compiler.is_compiling() else _running
    if running.one:
        raise RuntimeError(
            "pfm.jvp inside a function that pfm.jvp differentiates: derivatives of derivatives are not supported; call "
            "it outside, or use torch.func.jvp for the inner one"
        )
    running.one = True
    try:
        result = fn(*args, **(kwargs or {})) if running is _traced else _run(fn, args, kwargs or {}, as_tensor)
    finally:
        running.one = False
    aux = None
    if has_aux:
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"has_aux=True, but fn returned a {type(result).__name__} instead of (output, aux)")
        result, aux = result
    if not torch.compiler.is_compiling():
        _refuse_stored(fn)
    seen = _seeds(args)
    value, derivative = _split(result, seen)
    return (value, derivative, _split(aux, seen)[0]) if has_aux else (value, derivative)


class _Running(threading.local):
    """Whether a jvp is under way in this thread. A Dual does not say which jvp it belongs to."""

    one = False


class _Traced:
    """The same while compiling, which one thread does at a time."""

    one = False


_running, _traced = _Running(), _Traced()
_traced.one = False  # its own from the start: guards of the first graph look whether it is there


def seeded(primals: Any, tangents: Any, kind: Any, tracked: bool = False, fallback: str | None = None) -> list[Any]:
    """The arguments that fn is given."""
    return [
        _seed(f"primals[{i}]", x, dx, kind, tracked, fallback)
        for i, (x, dx) in enumerate(zip(primals, tangents, strict=True))
    ]


def _seed(name: str, x: Any, dx: Any, kind: Any, tracked: bool, fallback: str | None) -> Any:
    """The argument that fn is given for x and its tangent."""
    if first_dual((x, dx)) is not None:
        raise TypeError(f"{name} is a Dual already; derivatives of derivatives are not supported, pass tensors")
    if dx is None:
        return x
    if isinstance(x, Tensor):
        return _seed_tensor(name, x, dx, kind, tracked, fallback)
    if isinstance(dx, (int, float)) and dx == 0:
        return x
    if isinstance(x, dict):
        if not isinstance(dx, dict) or x.keys() != dx.keys():
            raise ValueError(f"{name} is a dict with keys {list(x)}, its tangent is {_shown(dx)}; give one per key")
        return {k: _seed(f"{name}[{k!r}]", x[k], dx[k], kind, tracked, fallback) for k in x}
    if isinstance(x, (list, tuple)):
        if not isinstance(dx, (list, tuple)) or len(dx) != len(x):
            raise ValueError(f"{name} is a {type(x).__name__} of {len(x)}, its tangent is {_shown(dx)}; give one each")
        pairs = enumerate(zip(x, dx, strict=True))
        parts = [_seed(f"{name}[{i}]", a, b, kind, tracked, fallback) for i, (a, b) in pairs]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    raise TypeError(
        f"{name} is a {type(x).__name__} and its tangent is {_shown(dx)}; only tensors have tangents, e.g. "
        "torch.tensor(0.5), or None as the tangent"
    )


def _seed_tensor(name: str, x: Tensor, dx: Any, kind: Any, tracked: bool, fallback: str | None) -> Any:
    if isinstance(dx, bool) or not isinstance(dx, (Tensor, int, float)):
        raise TypeError(f"the tangent of {name} is {_shown(dx)}; it is a tensor, a number or None")
    if not isinstance(dx, Tensor) and dx == 0:
        return x
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}, which has no tangent; pass None for it, or {name}.float()")
    if not isinstance(dx, Tensor):
        return kind(x, torch.full_like(x, float(dx), requires_grad=False), tracked, fallback)
    if dx.shape != x.shape or dx.dtype != x.dtype or dx.device != x.device:
        raise ValueError(
            f"the tangent of {name} is {_shown(dx)}, the primal {_shown(x)}; shape, dtype and device must agree, e.g. "
            "tangent.expand_as(x).to(x)"
        )
    return kind(x, dx if tracked else dx.detach(), tracked, fallback)


def _run(fn: Callable, args: list[Any], kwargs: Mapping[str, Any], as_tensor: bool) -> Any:
    introduce()
    if as_tensor:
        with refused_where_sharded():
            return fn(*args, **kwargs)
    try:
        return fn(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        compiler = type(error).__module__.startswith("torch._dynamo")  # its errors show the code around
        if not compiler and any(sign in str(error) for sign in _NO_TENSOR):
            raise TypeError(
                f"{error}: fn does this to what is no torch.Tensor, and a Dual is none; pass as_tensor=True to pfm.jvp"
            ) from error
        raise


# How torch, numpy and others name the type of an argument that they do not take.
_NO_TENSOR = ("'Dual'", "not Dual", "got Dual", "dual.Dual'", "got <class 'pyflowmap")


_Pairs = list[tuple[Tensor, Tensor]]


def _seeds(tree: Any) -> _Pairs:
    """The values and tangents that fn was given."""
    if is_dual(tree):
        return [(tree.primal, tree.tangent)] if tree.tangent is not None else []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [pair for part in tree for pair in _seeds(part)]


def _own(leaf: Any, seen: _Pairs) -> Tensor:
    """The tangent, in memory of its own where the value has its own: that of x + 1 is that of x itself, and writing to
    one of the two would change the other."""
    owner = leaf if leaf.owner is None else leaf.owner[0]
    value, derivative = owner.primal, owner.tangent
    for other_value, other in seen:
        if _alias(derivative, other) and not _alias(value, other_value):
            seen.append((leaf.primal, leaf.tangent.clone()))
            return seen[-1][1]
    seen.append((value, derivative))
    return leaf.tangent


def _alias(a: Any, b: Tensor) -> bool:
    return a is b or (a is not None and not torch.compiler.is_compiling() and torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


def _split(result: Any, seen: _Pairs) -> tuple[Any, Any]:
    """A tree of Duals as the trees of values and tangents. `seen`: those that others have hold of."""
    if is_dual(result) or isinstance(result, Tensor):
        return _split_leaf(result, seen)
    leaves, spec = pytree.tree_flatten(result, is_leaf=is_dual)
    parts = [_split_leaf(leaf, seen) for leaf in leaves]
    return tuple(pytree.tree_unflatten([part[i] for part in parts], spec) for i in (0, 1))


def _split_leaf(leaf: Any, seen: _Pairs) -> tuple[Any, Any]:
    if not is_dual(leaf):
        if not isinstance(leaf, Tensor):
            _refuse_hidden(leaf)
            return leaf, None
        return leaf, torch.zeros_like(leaf, requires_grad=False) if leaf.is_floating_point() else None
    check_fresh(leaf)
    value, derivative = leaf.primal, leaf.tangent
    if derivative is None:
        return value, torch.zeros_like(value, requires_grad=False)
    derivative = _own(leaf, seen)
    return value, derivative if leaf.tracked else end(derivative, value)


def _refuse_hidden(leaf: Any) -> None:
    """A Dual inside of what is no tree would get out, and go on as if it were a tensor."""
    if torch.compiler.is_compiling():
        return
    held = list(leaf) if isinstance(leaf, (set, frozenset)) else list(getattr(leaf, "__dict__", {}).values())
    if first_dual(held) is not None:
        raise TypeError(
            f"fn returned a {type(leaf).__name__}, which holds a Dual and is no tree to torch; return tensors, tuples "
            "or dicts, or register the type by torch.utils._pytree.register_dataclass"
        )


def _modules_behind(fn: Any) -> Iterator[nn.Module]:
    """fn itself, or the modules of the object that it is a method of, those that it closes over."""
    if isinstance(fn, nn.Module):  # which is slow to say that it has no such attribute
        yield fn
        return
    held = [fn, getattr(fn, "__self__", None), getattr(fn, "func", None), *getattr(fn, "args", ())]
    for cell in getattr(fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is empty still
            held.append(cell.cell_contents)
    for each in held:
        if isinstance(each, nn.Module):
            yield each
        else:
            yield from (x for x in getattr(each, "__dict__", {}).values() if isinstance(x, nn.Module))


_OWN = len(vars(nn.Module()))  # what every module has comes first among its attributes: "training" and so on


_HOLDERS = frozenset((*DUALS, list, tuple, dict))


def _refuse_stored(fn: Any) -> None:
    """A Dual that a module keeps would be used later, with the tangent of another call."""
    waiting, seen = list(_modules_behind(fn)), set()
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        held = module.__dict__
        if held["_modules"]:
            waiting += held["_modules"].values()
        if held["_buffers"] and any(map(is_dual, held["_buffers"].values())):
            raise RuntimeError(f"{type(module).__name__} keeps a Dual as a buffer after its forward; store x.detach()")
        first = _OWN if next(iter(held)) == "training" else 0
        if _HOLDERS.isdisjoint(map(type, islice(held.values(), first, None))):
            continue
        for name, value in islice(held.items(), first, None):
            kind = type(value)
            if kind is list or kind is tuple or kind is dict:
                if not any(map(is_dual, value.values() if kind is dict else value)):
                    continue
            elif kind not in DUALS:
                continue
            raise RuntimeError(
                f"{type(module).__name__} keeps a Dual in self.{name} after its forward; store x.detach(), or turn the "
                "cache off while differentiating"
            )


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return repr(x) if isinstance(x, (int, float, str, type(None))) else f"a {type(x).__name__}"
