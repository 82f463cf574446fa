"""The table of tangent rules: one per function of torch, and one for each function that a user adds.

A rule is written against the function that it is for, with the same parameters behind the value:

    @rule("silu")
    def _silu(y, x, inplace=False):                # y = silu(x), computed already, on the primals
        return aten.silu_backward(tangent(x), primal(x))

The arguments are as the caller wrote them: some are `Dual`. The rule returns the tangent of the value, or None where
that is zero. It runs without autograd unless the tangent is tracked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import Enum
from types import FunctionType
from typing import Any, NamedTuple

import torch

__all__ = [
    "RULES",
    "Kind",
    "MissingRule",
    "Rule",
    "composite",
    "constant",
    "find",
    "fresh",
    "key_of",
    "linear",
    "name_of",
    "pair",
    "rule",
    "spellings",
    "write",
]


class MissingRule(NotImplementedError):
    """A Dual met a function without a tangent rule."""


class Kind(Enum):
    TANGENT = "the rule gives the tangent of a value that is computed already"
    JOINT = "the rule computes value and tangent together: they share work, or random numbers"
    LINEAR = "the function itself, applied to the tangents"
    CONSTANT = "the value does not depend smoothly on anything: it has no tangent"
    WRITE = "writes to its first argument; the function gives the new value out of place"
    COMPOSITE = "torch functions that have rules, called with the Duals themselves"
    FRESH = "a new tensor of the same kind, to be written to: a Dual with tangent zero"


class Rule(NamedTuple):
    kind: Kind
    function: Callable | None = None  # of TANGENT, JOINT, COMPOSITE and WRITE; of CONSTANT, what takes note of the call
    # Whether the value shares memory with the first argument: "no"; "yes"; "self", if it is the argument; "reshape", if
    # strides allow; "index", if the index has no tensor; "each", every one of the values with its own argument.
    view: str = "no"
    inplace: int = -1  # position of a parameter `inplace`, which asks to write into the first argument
    # Given the arguments, value and tangent by one fused kernel; None where it does not take them. Eager only.
    pair: Callable | None = None


RULES: dict[Any, Rule] = {}
# The compiler turns Dual - Tensor into Tensor.__rsub__, and does not find that function among the keys of RULES.
_WRITTEN_IN_PYTHON: dict[str, Rule] = {}

_BY_NAME = ("torch._tensor", "pyflowmap.tangents.compiler")

_HOMES = (torch, torch.nn.functional, torch._C._nn, torch.special, torch.linalg, torch._VF)
_GETTER = type(torch.Tensor.T)  # of the attributes written in C
_no_value = object()


def spellings(name: str) -> list[Any]:
    """All that torch calls by this name: `torch.add`, `Tensor.add`, `Tensor.__add__`; `F.silu`; `Tensor.T`."""
    found = [getattr(home, name) for home in _HOMES if callable(getattr(home, name, None))]
    for spelling in (name, f"__{name}__", f"__r{name}__"):
        value = inspect.getattr_static(torch.Tensor, spelling, _no_value)
        if isinstance(value, (_GETTER, property)):
            found.append(value.__get__)  # type: ignore[union-attr]  # what __torch_function__ is told for an attribute
        elif value is not _no_value and callable(getattr(torch.Tensor, spelling)):
            found.append(getattr(torch.Tensor, spelling))
    return found


def key_of(function: Any) -> Any:
    """What stands in the table for a callable: a `torch.autograd.Function` for its `apply`, an operator for its
    overloads."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner
    return function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function


def name_of(function: Any) -> str:
    """`torch.silu`, `Tensor.view`, `mylib.rotate`: for messages."""
    if isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
        return f"torch.ops.{function}"
    home = getattr(function, "__self__", None) or getattr(function, "__objclass__", None)
    if isinstance(home, (_GETTER, property)):
        return f"Tensor.{getattr(home, '__name__', home)}"
    name = getattr(function, "__qualname__", None) or str(function)
    if "TensorBase." in name:
        return "Tensor." + name.rpartition(".")[2]
    if "_VariableFunctionsClass." in name:
        return "torch." + name.rpartition(".")[2]
    module = (getattr(function, "__module__", None) or "torch").replace("torch._C._nn", "torch.nn.functional")
    return name if name.startswith("Tensor.") else f"{module}.{name}"


def rule(*functions: Any, kind: Kind = Kind.TANGENT, view: str = "no") -> Callable[[Callable], Callable]:
    """Decorator: the decorated function is the tangent rule of `functions`.

        @pfm.tangents.rule(torch.ops.mylib.rotate)
        def rotate(out, x, angle):
            return torch.ops.mylib.rotate(pfm.tangents.tangent(x), angle)

    functions   callables: a torch function or method, an operator (`torch.ops.lib.name`, all its overloads), a
                `torch.autograd.Function`, or one's own function that is called by `pfm.tangents.call`; or a name,
                which means everything that torch calls by it
    kind        TANGENT, or JOINT: such a rule is given the arguments alone and returns (value, tangent)

    The rule gets the value and the arguments. `primal(x)` and `tangent(x)` split an argument; `tangent` is None for
    what has none. It must be linear in the tangents. Raises ValueError for a name that torch does not know.
    """

    def add(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters)
        position = -1
        if "inplace" in parameters:
            position = parameters.index("inplace") - (0 if kind is Kind.JOINT else 1)
        _enter(functions, Rule(kind, function, view, position))
        return function

    return add


def pair(*functions: Any) -> Callable[[Callable], Callable]:
    """Decorator: of functions that have a rule, what is tried before it where nothing is being compiled.

    It is given the arguments, the first of which is a Dual with a tangent, and returns (value, tangent), or None where
    the rule shall serve. It must do so where autograd, or anyone else, would have to see the computation.
    """

    def add(function: Callable) -> Callable:
        for each in functions:
            for key in spellings(each) if isinstance(each, str) else [key_of(each)]:
                RULES[key] = RULES[key]._replace(pair=function)
        return function

    return add


def linear(*functions: Any, view: str = "no") -> None:
    """Functions that are linear in their first argument (a tensor or a list of them) and in no other."""
    _enter(functions, Rule(Kind.LINEAR, None, view))


def constant(*functions: Any) -> None:
    """Functions without a tangent: comparisons, indices, questions about shape and type."""
    _enter(functions, Rule(Kind.CONSTANT))


def fresh(*functions: Any) -> None:
    """Functions that make a new tensor after the pattern of a given one, such as empty_like."""
    _enter(functions, Rule(Kind.FRESH))


def composite(*functions: Any) -> None:
    """Functions that torch writes in Python, out of others that have rules: their own body runs on the Duals."""
    for each in functions:
        bodies = [f for f in (spellings(each) if isinstance(each, str) else [each]) if isinstance(f, FunctionType)]
        if not bodies:
            raise ValueError(f"torch has no function {each!r} that is written in Python")
        for body in bodies:
            _enter((body,), Rule(Kind.COMPOSITE, _undispatched(body)))


def _undispatched(function: FunctionType) -> FunctionType:
    """A twin of a function of torch that does not ask whether its arguments want to be handled otherwise."""
    names = dict(function.__globals__)
    for asks in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        if asks in names:
            names[asks] = _never
    del names["__name__"]  # or torch.compile takes these names for those of torch's module, from here on
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _never(*args: Any) -> bool:
    return False


def write(functions: Iterable[Any], out_of_place: Callable) -> None:
    """In-place functions, and the function that computes what they write."""
    _enter(tuple(functions), Rule(Kind.WRITE, out_of_place))


def _enter(functions: tuple[Any, ...], entry: Rule) -> None:
    for each in functions:
        found = spellings(each) if isinstance(each, str) else [key_of(each)]
        if not found:
            raise ValueError(f"torch has no function {each!r}")
        RULES.update(dict.fromkeys(found, entry))
        for key in found:
            if getattr(key, "__module__", None) == "torch._tensor":
                _WRITTEN_IN_PYTHON[key.__name__] = entry


def find(function: Any) -> Rule | None:
    """The rule of a callable, or None."""
    # First, because the compiler's lookup of such a function in RULES fails, and leaves a guard behind that fails, too.
    if torch.compiler.is_compiling() and getattr(function, "__module__", None) in _BY_NAME:
        return _WRITTEN_IN_PYTHON.get(function.__name__)
    found = RULES.get(function)
    if found is None:
        key = key_of(function)
        if isinstance(key, torch._ops.OpOverloadPacket) and str(key).startswith("aten."):
            key = getattr(torch, str(key).removeprefix("aten."), key)  # torch.ops.aten.add has add's parameters
        found = RULES.get(key)
    return found
