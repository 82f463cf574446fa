"""A fused function of tensors that may have tangents: its roads, its gradient and its forward derivative.

A kernel y = f(x_1, ..., x_n) comes in four parts, each one pass over memory:

    forward      y, and with tangents dy = sum_i f_i dx_i           backward      g_i = f_i' gy
    both         the gradients of y *and* dy with respect to x_i and dx_i

`Fused` makes of them one function that is right in eager mode, under autograd (twice), torch.func and torch.compile. As
in `combine`, the call is opaque to the compiler, which would drop the forward derivative without a word; what no kernel
computes (second gradients, vmap) is differentiated from the formula in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from pyflowmap.ops.backend import module_for
from pyflowmap.ops.combine_roads import is_watched

__all__ = ["Fused", "check"]

_library = torch.library.Library("pyflowmap", "FRAGMENT")
_KERNELS: dict[str, Fused] = {}

Maybe = Tensor | None

_USUALLY_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()  # autocast, where nobody asked for it


class Fused:
    """One kernel with its torch operators `pyflowmap::<name>` and `pyflowmap::<name>_backward`.

    A subclass gives `value`, `empty`, `forward` and `backward`. `options` are the constants of a call: hashable numbers,
    handed on as they are.
    """

    name: str
    operands: tuple[str, ...]  # whose tangents and gradients exist; others (masks, angles) come after, as `fixed`
    saves_results = False  # whether backward asks for what forward returned
    sums = 0  # results after y (and dy) that backward through y asks for; those after them are for dy

    def value(self, options: tuple, *operands: Maybe) -> Tensor:
        """f in plain differentiable torch: the specification."""
        raise NotImplementedError

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
        _KERNELS[self.name] = self
        lists = "Tensor?[] operands, Tensor?[] tangents, float[] options"
        backward = f"{lists}, Tensor[] results, Tensor? gy, Tensor? gdy, bool[] needs"
        _library.define(f"{self.name}({lists}, bool pair) -> Tensor[]")
        _library.define(f"{self.name}_backward({backward}) -> Tensor[]")
        forward_op, backward_op = (getattr(torch.ops.pyflowmap, self.name + end) for end in ("", "_backward"))
        self.operator, self.operator_backward = forward_op, backward_op
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}_backward", self._run_backward_apart, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyflowmap::{self.name}", self._fake, lib=_library)
        torch.library.register_fake(f"pyflowmap::{self.name}_backward", self._fake_backward, lib=_library)

    # ---- the door -----------------------------------------------------------------------------------------------------

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
            flat = _opaque(self.name, options, tracked, pair, *operands, *(tangents or ()))
        elif torch.is_grad_enabled() and any(x.requires_grad for x in given):
            flat = _Call.apply(self.name, options, tracked, pair, *operands, *(tangents or ()))
        else:
            flat = self._run(operands, tangents or (), options, pair)
        return (flat[0], flat[1]) if pair else flat[0]

    # ---- the operators --------------------------------------------------------------------------------------------------

    def _run(
        self, operands: Sequence[Maybe], tangents: Sequence[Maybe], options: Sequence[float], pair: bool
    ) -> list[Tensor]:
        options = tuple(options)
        first = next(x for x in operands if x is not None)
        module = module_for(first.device, first.dtype == torch.float64)
        results = self.empty(options, operands, pair)
        if module is not None and results[0].numel() > 0:
            self.forward(module, options, operands, tangents, results)
        elif results[0].numel() > 0:
            with _above_autograd():
                values = self._reference(options, pair, *operands, *tangents)
            for result, value in zip(results, values if pair else (values,), strict=False):
                result.copy_(value)
        return results

    def _run_backward(
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
            with _above_autograd():
                found = self._gradients(options, operands, tangents, gy, gdy)
        inputs = (*operands, *tangents)
        # Nobody looks at what was not needed; an operator returns tensors all the same.
        return [
            x.new_empty(0) if x is not None and (g is None or not n) else g if g is not None else _nothing(inputs)
            for x, g, n in zip(inputs, found, needs, strict=True)
        ]

    def _run_backward_apart(self, operands, tangents, options, results, gy, gdy, needs):
        """The same for an operator, which must not return what it was given."""
        found = self._run_backward(operands, tangents, options, results, gy, gdy, needs)
        given = [x for x in (gy, gdy, *operands, *tangents) if x is not None]
        return [g.clone() if any(torch._C._is_alias_of(g, x) for x in given) else g for g in found]

    def _fake(self, operands, tangents, options, pair):
        return self.empty(tuple(options), operands, pair)

    def _fake_backward(self, operands, tangents, options, results, gy, gdy, needs):
        inputs = (*operands, *tangents)
        return [
            _nothing(inputs) if x is None else torch.empty_like(x) if n else x.new_empty(0)
            for x, n in zip(inputs, needs, strict=True)
        ]

    # ---- the formula, differentiated by torch ----------------------------------------------------------------------------

    def _reference(self, options: tuple, pair: bool, *inputs: Maybe) -> Any:
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

        return _directional(of_moving, [operands[i] for i in moving], [tangents[i] for i in moving])

    def of_value(self, results: Sequence[Tensor], pair: bool) -> tuple[Tensor, ...]:
        """What backward through y alone asks for."""
        first = 2 if pair else 1
        return (results[0], *results[first : first + self.sums])

    def count_of(self, inputs: Sequence[Any], pair: bool) -> int:
        return len(inputs) - (self.count if pair else 0)

    def _gradients(
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
            return self._reference(options, both, *full)

        y, pull = torch.func.vjp(of_some, *(inputs[i] for i in places))  # type: ignore[misc]
        cotangent = (torch.zeros_like(y[0]) if gy is None else gy, gdy) if both else gy
        found: list[Maybe] = [None] * (len(operands) + len(tangents))
        for i, g in zip(places, pull(cotangent), strict=True):
            found[i] = g.view_as(g)  # never gy itself, which autograd would take for an input returned
        return found


def _directional(function: Callable, xs: Sequence[Any], dxs: Sequence[Any]) -> tuple[Any, Any]:
    """function(*xs) and its derivative along dxs: the transpose of its transpose, which is linear.

    torch.func.jvp would do, but not inside another one.
    """
    value, pull = torch.func.vjp(function, *xs)
    zero = pytree.tree_map(torch.zeros_like, value)
    _, push = torch.func.vjp(pull, zero)
    return value, push(tuple(dxs))[0]


@contextmanager
def _above_autograd() -> Iterator[None]:
    """An operator runs below autograd, where nothing can be differentiated, and under the hooks of a checkpoint, which
    would take the formula's own tensors for the model's; here it runs above the one and without the other."""
    hooks = []
    while (hook := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(hook)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _USUALLY_EXCLUDED):
            yield
    finally:
        for hook in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*hook)


def _nothing(inputs: Sequence[Maybe]) -> Tensor:
    return next(x for x in inputs if x is not None).new_empty(0)


# ---- the tape -------------------------------------------------------------------------------------------------------


@torch.compiler.allow_in_graph
def _opaque(*args: Any) -> tuple[Tensor, ...]:
    return _Call.apply(*args)


def _traced(tensors: Sequence[Maybe]) -> bool:
    """Whether a tracer wants to see the operator rather than its effect."""
    return is_watched() or not all(
        x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors
    )


class _Call(torch.autograd.Function):
    """(name, options, tracked, pair, *operands, *tangents) -> (y, dy if pair, what backward needs ...)"""

    @staticmethod
    def forward(name, options, tracked, pair, *tensors):
        kernel = _KERNELS[name]
        n = kernel.count_of(tensors, pair)
        run = kernel.operator if _traced(tensors) else kernel._run
        return tuple(run(list(tensors[:n]), list(tensors[n:]), list(options), pair))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        name, options, tracked, pair, *tensors = inputs
        kernel = _KERNELS[name]
        n = kernel.count_of(tensors, pair)
        ctx.mark_non_differentiable(*output[2 if tracked and pair else 1 :])
        ctx.set_materialize_grads(False)
        ctx.name, ctx.options, ctx.pair, ctx.tracked = name, tuple(options), pair, tracked and pair
        ctx.n, ctx.results = n, len(output)
        kept = output if kernel.saves_results else ()
        if kept and not ctx.tracked:
            kept = kernel.of_value(output, pair)
        ctx.save_for_backward(*tensors[:n], *(tensors[n:] if ctx.tracked else ()), *kept)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gy, *rest):
        kernel = _KERNELS[ctx.name]
        gdy = rest[0] if ctx.tracked else None
        inputs = 4 + ctx.n + (kernel.count if ctx.pair else 0)
        if gy is None and gdy is None:
            return (None,) * inputs
        saved = ctx.saved_tensors
        operands = saved[: ctx.n]
        tangents = saved[ctx.n : ctx.n + kernel.count] if ctx.tracked else ()
        results = saved[ctx.n + len(tangents) :]
        if gdy is None:  # the tangent was recorded, and the loss does not depend on it
            if tangents and results:
                results = kernel.of_value(results, True)
            tangents = ()
        needs = ctx.needs_input_grad[4 : 4 + ctx.n + len(tangents)]
        arguments = (ctx.name, ctx.options, tuple(needs), ctx.n, len(tangents), len(results), gy, gdy)
        if not torch.is_grad_enabled() and not _traced((*operands, gy, gdy)):
            found = kernel._run_backward(operands, tangents, ctx.options, results, gy, gdy, needs)
        else:
            found = _Gradient.apply(*arguments, *operands, *tangents, *results)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (None,) * 4 + tuple(grads) + (None,) * (inputs - 4 - len(grads))

    @staticmethod
    def jvp(ctx, *changes):
        kernel = _KERNELS[ctx.name]
        saved = ctx.saved_tensors
        d_tensors = changes[4:]
        if ctx.pair:
            raise NotImplementedError(
                f"{ctx.name} of a Dual inside torch.func.jvp: derivatives of derivatives are not supported; use "
                "torch.func.jvp for both"
            )
        operands = saved[: ctx.n]
        moved = d_tensors[: kernel.count]
        for x, dx in zip(operands[kernel.count :], d_tensors[kernel.count :], strict=True):
            if dx is not None and x is not None and x.is_floating_point():
                raise NotImplementedError(f"{ctx.name}: its constant operands have no tangent; detach them")
        flat = _opaque(ctx.name, ctx.options, True, True, *operands, *moved)
        # A tangent per result of the call, whose other results are constants.
        return (flat[1], *(None,) * (ctx.results - 1))

    @staticmethod
    def vmap(info, in_dims, name, options, tracked, pair, *tensors):
        kernel = _KERNELS[name]
        dims = in_dims[4:]
        places = [i for i, x in enumerate(tensors) if x is not None]

        def one(*xs: Tensor) -> Any:
            full: list[Maybe] = [None] * len(tensors)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            found = kernel._reference(options, pair, *full)
            n = kernel.count_of(full, pair)
            shapes = kernel.empty(options, full[:n], pair)
            values = found if pair else (found,)
            # views: dy may be dx itself, which autograd would take for an input returned
            return (*(v.to(s.dtype).view_as(v) for v, s in zip(values, shapes, strict=False)), *shapes[len(values) :])

        flat = torch.func.vmap(one, in_dims=tuple(dims[i] for i in places))(*(tensors[i] for i in places))
        return flat, (0,) * len(flat)


class _Gradient(torch.autograd.Function):
    """The gradients of a call, differentiable once more by its formula."""

    @staticmethod
    def forward(name, options, needs, n, tangents, results, gy, gdy, *tensors):
        kernel = _KERNELS[name]
        parts = list(tensors[:n]), list(tensors[n : n + tangents]), list(options), list(tensors[n + tangents :])
        run = kernel.operator_backward if _traced((*tensors, gy, gdy)) else kernel._run_backward
        given = [x for x in (gy, gdy, *tensors) if x is not None]
        found = run(*parts, gy, gdy, list(needs))
        return tuple(g.view_as(g) if any(g is x for x in given) else g for g in found)  # autograd wants them new

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        name, options, needs, n, tangents, results, gy, gdy, *tensors = inputs
        ctx.name, ctx.options, ctx.needs = name, options, needs
        ctx.n, ctx.tangents, ctx.results = n, tangents, results
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, gdy, *tensors[: n + tangents])
        ctx.save_for_forward(gy, gdy, *tensors[: n + tangents])

    @staticmethod
    def _function(ctx) -> tuple[Callable, list[Tensor], list[int]]:
        """The needed gradients as a function of those of (gy, gdy, operands, tangents) that are tensors."""
        saved = list(ctx.saved_tensors)
        kernel = _KERNELS[ctx.name]
        places = [i for i, x in enumerate(saved) if x is not None and x.is_floating_point()]
        wanted = [i for i, need in enumerate(ctx.needs) if need]

        def gradients(*xs: Tensor) -> tuple[Tensor, ...]:
            full = list(saved)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            gy, gdy, *tensors = full
            found = kernel._gradients(ctx.options, tensors[: ctx.n], tensors[ctx.n :], gy, gdy)
            return tuple(found[i] for i in wanted)  # type: ignore[misc]

        return gradients, [saved[i] for i in places], places

    @staticmethod
    def backward(ctx, *grads):
        function, inputs, places = _Gradient._function(ctx)
        wanted = [i for i, need in enumerate(ctx.needs) if need]
        values, pull = torch.func.vjp(function, *inputs)
        cotangents = tuple(
            torch.zeros_like(v) if grads[i] is None else grads[i] for i, v in zip(wanted, values, strict=True)
        )
        result: list[Maybe] = [None] * (2 + ctx.n + ctx.tangents)
        for i, g in zip(places, pull(cotangents), strict=True):
            result[i] = g
        return (None,) * 6 + tuple(result) + (None,) * ctx.results

    @staticmethod
    def jvp(ctx, *changes):
        function, inputs, places = _Gradient._function(ctx)
        moved = changes[6 : 6 + 2 + ctx.n + ctx.tangents]
        directions = tuple(
            torch.zeros_like(x) if moved[i] is None else moved[i] for i, x in zip(places, inputs, strict=True)
        )
        _, derivative = _directional(function, inputs, directions)
        rest = iter(derivative)
        zero = inputs[0]
        return tuple(next(rest) if need else zero.new_zeros(0) for need in ctx.needs)

    @staticmethod
    def vmap(info, in_dims, name, options, needs, n, tangents, results, gy, gdy, *tensors):
        kernel = _KERNELS[name]
        inputs = (gy, gdy, *tensors[: n + tangents])
        dims = in_dims[6 : 6 + len(inputs)]
        places = [i for i, x in enumerate(inputs) if x is not None]

        def one(*xs: Tensor) -> tuple[Tensor, ...]:
            full: list[Maybe] = [None] * len(inputs)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            found = kernel._gradients(options, full[2 : 2 + n], full[2 + n :], full[0], full[1])
            return tuple(
                g if need and g is not None else xs[0].new_zeros(0)
                for g, need in zip(found[: n + tangents], needs, strict=True)
            )

        flat = torch.func.vmap(one, in_dims=tuple(dims[i] for i in places))(*(inputs[i] for i in places))  # type: ignore[arg-type]
        return flat, (0,) * len(flat)


def check(name: str, done: bool) -> None:
    """A kernel refused operands that Python had checked and laid out."""
    if not done:
        raise RuntimeError(f"{name}: the kernel refused its operands; this is a bug in pyflowmap, please report it")
