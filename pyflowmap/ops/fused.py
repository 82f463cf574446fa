"""A fused function of tensors that may have tangents: its roads, its gradient and its forward derivative.

A kernel y = f(x_1, ..., x_n) comes in four parts, each one pass over memory:

    forward      y, and with tangents dy = sum_i f_i dx_i           backward      g_i = f_i' gy
    both         the gradients of y *and* dy with respect to x_i and dx_i

`Fused` makes of them one function that is right in eager mode, under autograd (twice), torch.func and torch.compile. As
in `combine`, the call is opaque to the compiler, which would drop the forward derivative without a word; what no kernel
computes (second gradients, vmap) is differentiated from the formula in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import module_for
from .combine_roads import is_watched
from .fused_formula import Maybe, above_autograd, directional
from .fused_tape import KERNELS, Call, opaque

__all__ = ["Fused", "check"]

_library = torch.library.Library("pyflowmap", "FRAGMENT")


class Fused:
    """One kernel with its torch operators `pyflowmap::<name>` and `pyflowmap::<name>_backward`.

    A subclass gives `value`, `empty`, `forward` and `backward`. `options` are the constants of a call, numbers.
    """

    name: str
    value: Callable[..., Tensor]  # value(options, *operands): f in plain differentiable torch, the specification
    operands: tuple[str, ...]  # whose tangents and gradients exist; others (masks, angles) come after, as `fixed`
    saves_results = False  # whether backward asks for what forward returned
    sums = 0  # results after y (and dy) that backward through y asks for; those after them are for dy

    def empty(self, options: tuple, operands: Sequence[Maybe], pair: bool) -> list[Tensor]:
        """What forward returns, not filled: y, dy if `pair`, and what else backward needs."""
        raise NotImplementedError

    def forward(
        self, module: Any, options: tuple, operands: Sequence[Maybe], tangents: Sequence[Maybe], results: list[Tensor]
    ) -> None:
        """Runs the compiled kernel into `results`."""
        raise NotImplementedError

    def backward(
        self,
        module: Any,
        options: tuple,
        operands: Sequence[Maybe],
        tangents: Sequence[Maybe],
        results: Sequence[Tensor],
        gy: Maybe,
        gdy: Maybe,
        needs: Sequence[bool],
    ) -> list[Maybe]:
        """Gradients of the operands, then, where there are `tangents`, of those; at least where `needs`."""
        raise NotImplementedError

    def __init__(self) -> None:
        self.count = len(self.operands)
        KERNELS[self.name] = self
        lists = "Tensor?[] operands, Tensor?[] tangents, float[] options"
        backward = f"{lists}, Tensor[] results, Tensor? gy, Tensor? gdy, bool[] needs"
        _library.define(f"{self.name}({lists}, bool pair) -> Tensor[]")
        _library.define(f"{self.name}_backward({backward}) -> Tensor[]")
        forward_op, backward_op = (getattr(torch.ops.pyflowmap, self.name + end) for end in ("", "_backward"))
        self.operator, self.operator_backward = forward_op, backward_op
        _library.impl(self.name, self.run, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}_backward", self._apart, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyflowmap::{self.name}", self._fake, lib=_library)
        torch.library.register_fake(f"pyflowmap::{self.name}_backward", self._fake_backward, lib=_library)

    # ---- the door ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        options: tuple,
        operands: Sequence[Maybe],
        tangents: Sequence[Maybe] | None = None,
        tracked: bool = False,
    ) -> Any:
        """y; with `tangents` (None is zero) the pair (y, dy), where dy is recorded for backward only if `tracked`."""
        given = [x for x in (*operands, *(tangents or ())) if x is not None]
        exact = all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in given)
        pair = tangents is not None
        if torch.compiler.is_compiling() or not exact or is_watched():
            flat = opaque(self.name, options, tracked, pair, *operands, *(tangents or ()))
        elif torch.is_grad_enabled() and any(x.requires_grad for x in given):
            flat = Call.apply(self.name, options, tracked, pair, *operands, *(tangents or ()))
        else:
            flat = self.run(operands, tangents or (), options, pair)
        return (flat[0], flat[1]) if pair else flat[0]

    # ---- the operators ----------------------------------------------------------------------------------------------

    def run(
        self, operands: Sequence[Maybe], tangents: Sequence[Maybe], options: Sequence[float], pair: bool
    ) -> list[Tensor]:
        options = tuple(options)
        first = next(x for x in operands if x is not None)
        module = module_for(first.device, first.dtype == torch.float64)
        results = self.empty(options, operands, pair)
        if module is not None and results[0].numel() > 0:
            self.forward(module, options, operands, tangents, results)
        elif results[0].numel() > 0:
            with above_autograd():
                values = self.reference(options, pair, *operands, *tangents)
            for result, value in zip(results, values if pair else (values,), strict=False):
                result.copy_(value)
        return results

    def run_backward(
        self,
        operands: Sequence[Maybe],
        tangents: Sequence[Maybe],
        options: Sequence[float],
        results: Sequence[Tensor],
        gy: Maybe,
        gdy: Maybe,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        options = tuple(options)
        first = next(x for x in operands if x is not None)
        module = module_for(first.device, first.dtype == torch.float64)
        size = sum(x.numel() for x in (gy, gdy) if x is not None)
        if module is not None and size > 0:
            found = self.backward(module, options, operands, tangents, results, gy, gdy, needs)
        else:
            with above_autograd():
                found = self.gradients(options, operands, tangents, gy, gdy)
        inputs = (*operands, *tangents)
        # Nobody looks at what was not needed; an operator returns tensors all the same.
        return [
            x.new_empty(0) if x is not None and (g is None or not n) else g if g is not None else _nothing(inputs)
            for x, g, n in zip(inputs, found, needs, strict=True)
        ]

    def _apart(self, operands, tangents, options, results, gy, gdy, needs):
        """The same for an operator, which must not return what it was given, and returns what its fake promised."""
        found = self.run_backward(operands, tangents, options, results, gy, gdy, needs)
        given = [x for x in (gy, gdy, *operands, *tangents) if x is not None]
        for i, (x, need) in enumerate(zip((*operands, *tangents), needs, strict=True)):
            if x is None or not need:
                continue
            promised, g = torch.empty_like(x), found[i]
            if g.stride() != promised.stride() or any(torch._C._is_alias_of(g, x) for x in given):  # type: ignore[attr-defined]
                found[i] = promised.copy_(g)
        return found

    def _fake(self, operands, tangents, options, pair):
        return self.empty(tuple(options), operands, pair)

    def _fake_backward(self, operands, tangents, options, results, gy, gdy, needs):
        inputs = (*operands, *tangents)
        return [
            _nothing(inputs) if x is None else torch.empty_like(x) if n else x.new_empty(0)
            for x, n in zip(inputs, needs, strict=True)
        ]

    # ---- the formula, differentiated by torch -----------------------------------------------------------------------

    def reference(self, options: tuple, pair: bool, *inputs: Maybe) -> Any:
        """y, or (y, dy)."""
        operands, tangents = inputs[: self.count_of(inputs, pair)], inputs[self.count_of(inputs, pair) :]
        if not pair:
            return self.value(options, *operands)
        moving = [i for i, dx in enumerate(tangents) if dx is not None]

        def of_moving(*xs: Tensor) -> Tensor:
            full = list(operands)
            for i, x in zip(moving, xs, strict=True):
                full[i] = x
            return self.value(options, *full)

        return directional(of_moving, [operands[i] for i in moving], [tangents[i] for i in moving])

    def of_value(self, results: Sequence[Tensor], pair: bool) -> tuple[Tensor, ...]:
        """What backward through y alone asks for."""
        first = 2 if pair else 1
        return (results[0], *results[first : first + self.sums])

    def count_of(self, inputs: Sequence[Any], pair: bool) -> int:
        return len(inputs) - (self.count if pair else 0)

    def gradients(
        self, options: tuple, operands: Sequence[Maybe], tangents: Sequence[Maybe], gy: Maybe, gdy: Maybe
    ) -> list[Maybe]:
        """Gradients of all inputs, by torch; differentiable."""
        both = gdy is not None
        inputs = [*operands, *(tangents if both else ())]
        places = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]

        def of_some(*xs: Tensor) -> Any:
            full = list(inputs)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            return self.reference(options, both, *full)

        y, pull = torch.func.vjp(of_some, *(inputs[i] for i in places))  # type: ignore[misc]
        cotangent = (torch.zeros_like(y[0]) if gy is None else gy, gdy) if both else gy
        found: list[Maybe] = [None] * (len(operands) + len(tangents))
        for i, g in zip(places, pull(cotangent), strict=True):
            found[i] = g.view_as(g)  # never gy itself, which autograd would take for an input returned
        return found


def _nothing(inputs: Sequence[Maybe]) -> Tensor:
    return next(x for x in inputs if x is not None).new_empty(0)


def check(name: str, done: bool) -> None:
    """A kernel refused operands that Python had checked and laid out."""
    if not done:
        raise RuntimeError(f"{name}: the kernel refused its operands; this is a bug in pyflowmap, please report it")
