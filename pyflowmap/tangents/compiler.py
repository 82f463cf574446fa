"""What torch.compile does not know of objects with `__torch_function__`, though Python and torch's C++ code do:
`a @ b` of two of them, and that they stand in a tuple, `torch.cat((x, y))`.

Both are private places of the compiler (torch 2.10 to 2.13). Where a torch has none such, nothing is taught, and such
code fails to compile, with an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from .registry import _WRITTEN_IN_PYTHON, Kind, Rule

__all__ = ["teach_compiler"]


def teach_compiler() -> None:
    for lesson in (_matmul, _matmul_of_a_tensor, _tuples):
        try:
            lesson()
        except (ImportError, AttributeError):
            continue


def _matmul() -> None:
    """Adds to the compiler's table what Python does, a.__matmul__(b)."""
    from torch._dynamo.variables.builtin import BuiltinVariable
    from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

    def matmul(tx: Any, a: Any, b: Any) -> Any:
        return a.call_method(tx, "__matmul__", [b], {})

    table = BuiltinVariable._binop_handlers()
    table.setdefault(operator.matmul, []).append(((UserDefinedObjectVariable, UserDefinedObjectVariable), matmul))


def _matmul_of_a_tensor() -> None:
    """Of an object and a tensor it takes the reflected method, or, where it knows none, the method itself with the
    operands exchanged: a @ b became b @ a."""
    from torch import Tensor
    from torch._dynamo.variables import builtin

    builtin.populate_builtin_to_tensor_fn_map()
    reflected = builtin.BUILTIN_TO_TENSOR_RFN_MAP
    for function in (operator.matmul, operator.imatmul):
        reflected.setdefault(function, Tensor.__rmatmul__)
    for function, swapped in _IN_PLACE.items():  # x += tensor became x = x + tensor, which other names of x do not see
        if function in reflected:
            reflected[function] = swapped
            _WRITTEN_IN_PYTHON[swapped.__name__] = Rule(Kind.COMPOSITE, swapped)


def _iadd(tensor: Any, x: Any) -> Any:
    return x.__iadd__(tensor)


def _isub(tensor: Any, x: Any) -> Any:
    return x.__isub__(tensor)


def _imul(tensor: Any, x: Any) -> Any:
    return x.__imul__(tensor)


def _itruediv(tensor: Any, x: Any) -> Any:
    return x.__itruediv__(tensor)


def _imod(tensor: Any, x: Any) -> Any:
    return x.__imod__(tensor)


def _ifloordiv(tensor: Any, x: Any) -> Any:
    return x.__ifloordiv__(tensor)


_IN_PLACE = {
    operator.iadd: _iadd, operator.isub: _isub, operator.imul: _imul, operator.itruediv: _itruediv,
    operator.imod: _imod, operator.ifloordiv: _ifloordiv,
}  # fmt: skip


def _tuples() -> None:
    """The search for `__torch_function__` among arguments looks into lists and dicts: into tuples, too."""
    from torch._dynamo.variables import TupleVariable, torch_function

    search = torch_function._flatten_vts

    def flatten(variables: Iterable[Any]) -> list[Any]:
        found: list[Any] = []
        for variable in search(variables):
            known = variable.realize() if variable.is_realized() else variable
            found.extend(flatten(known.items) if isinstance(known, TupleVariable) else [variable])
        return found

    torch_function._flatten_vts = flatten  # type: ignore[assignment]
