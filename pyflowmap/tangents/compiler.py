"""What torch.compile does not know of objects with `__torch_function__`, though Python and torch's C++ code do:
`a @ b` of two of them, and that they stand in a tuple, `torch.cat((x, y))`.

Both are private places of the compiler (torch 2.10 to 2.13). Where a torch has none such, nothing is taught, and such
code fails to compile, with an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["teach_compiler"]


def teach_compiler() -> None:
    for lesson in (_matmul, _tuples):
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
