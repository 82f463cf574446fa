"""Rules of functions with one argument that may have a tangent; their numbers may not."""

from __future__ import annotations

import functools

from ..parts import is_dual
from ..registry import rule

__all__ = ["of_one", "refuse_duals"]


def of_one(*names):
    """`rule`, for a function whose other arguments are numbers: torch takes tensors there, whose tangents were lost."""

    def add(function):
        @functools.wraps(function)
        def checked(y, input, *rest, **options):
            refuse_duals(names[0], *rest, *options.values())
            return function(y, input, *rest, **options)

        rule(*names)(checked)
        return function

    return add


def refuse_duals(name, *numbers):
    for number in numbers:
        if is_dual(number):
            raise TypeError(
                f"a number given to {name} is a Dual {tuple(number.primal.shape)}, whose tangent would be lost; write "
                f"{name} out in arithmetic, or pass x.detach()"
            )
