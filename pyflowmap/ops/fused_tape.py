"""The tape of a fused function: its node under autograd, torch.func and the compiler, and the node of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .combine_roads import is_watched
from .forward_levels import outer_levels, without_tangents
from .fused_formula import Maybe, directional

__all__ = ["KERNELS", "Call", "opaque"]

KERNELS: dict[str, Any] = {}  # name -> Fused: nodes and compiled graphs hold names


@torch.compiler.allow_in_graph
def opaque(*args: Any) -> tuple[Tensor, ...]:
    return Call.apply(*args)


def _traced(tensors: Sequence[Maybe]) -> bool:
    """Whether a tracer wants to see the operator rather than its effect."""
    return is_watched() or not all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


class Call(torch.autograd.Function):
    """(name, options, tracked, pair, *operands, *tangents) -> (y, dy if pair, what backward needs ...)"""

    @staticmethod
    def forward(name, options, tracked, pair, *tensors):
        kernel = KERNELS[name]
        n = kernel.count_of(tensors, pair)
        run = kernel.operator if _traced(tensors) else kernel.run
        return tuple(run(list(tensors[:n]), list(tensors[n:]), list(options), pair))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        name, options, tracked, pair, *tensors = inputs
        kernel = KERNELS[name]
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
        kernel = KERNELS[ctx.name]
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
            found = kernel.run_backward(operands, tangents, ctx.options, results, gy, gdy, needs)
        else:
            found = _Gradient.apply(*arguments, *operands, *tangents, *results)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (None,) * 4 + tuple(grads) + (None,) * (inputs - 4 - len(grads))

    @staticmethod
    def jvp(ctx, *changes):
        kernel = KERNELS[ctx.name]
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
        flat = opaque(ctx.name, ctx.options, True, True, *operands, *moved)
        # A tangent per result of the call, whose other results are constants.
        return (flat[1], *(None,) * (ctx.results - 1))

    @staticmethod
    def vmap(info, in_dims, name, options, tracked, pair, *tensors):
        kernel = KERNELS[name]
        dims = in_dims[4:]
        places = [i for i, x in enumerate(tensors) if x is not None]

        def one(*xs: Tensor) -> Any:
            full: list[Maybe] = [None] * len(tensors)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            found = kernel.reference(options, pair, *full)
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
        kernel = KERNELS[name]
        parts = list(tensors[:n]), list(tensors[n : n + tangents]), list(options), list(tensors[n + tangents :])
        run = kernel.operator_backward if _traced((*tensors, gy, gdy)) else kernel.run_backward
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
    def _function(ctx, in_jvp: bool = False) -> tuple[Callable, list[Tensor], list[int]]:
        """The needed gradients as a function of those of (gy, gdy, operands, tangents) that are tensors."""
        saved: list[Any] = without_tangents(ctx.saved_tensors) if in_jvp else list(ctx.saved_tensors)
        kernel = KERNELS[ctx.name]
        places = [i for i, x in enumerate(saved) if x is not None and x.is_floating_point()]
        wanted = [i for i, need in enumerate(ctx.needs) if need]

        def gradients(*xs: Tensor) -> tuple[Tensor, ...]:
            full = list(saved)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            gy, gdy, *tensors = full
            found = kernel.gradients(ctx.options, tensors[: ctx.n], tensors[ctx.n :], gy, gdy)
            return tuple(found[i] for i in wanted)

        return gradients, [saved[i] for i in places], places

    @staticmethod
    def backward(ctx, *grads):
        function, inputs, places = _Gradient._function(ctx)
        wanted = [i for i, need in enumerate(ctx.needs) if need]
        values, pull = torch.func.vjp(function, *inputs)  # type: ignore[misc]
        cotangents = tuple(
            torch.zeros_like(v) if grads[i] is None else grads[i] for i, v in zip(wanted, values, strict=True)
        )
        result: list[Maybe] = [None] * (2 + ctx.n + ctx.tangents)
        for i, g in zip(places, pull(cotangents), strict=True):
            result[i] = g
        return (None,) * 6 + tuple(result) + (None,) * ctx.results

    @staticmethod
    def jvp(ctx, *changes):
        moved = changes[6 : 6 + 2 + ctx.n + ctx.tangents]
        with outer_levels():
            function, inputs, places = _Gradient._function(ctx, in_jvp=True)
            directions = tuple(
                torch.zeros_like(x) if moved[i] is None else moved[i] for i, x in zip(places, inputs, strict=True)
            )
            _, derivative = directional(function, inputs, directions)
        rest = iter(derivative)
        zero = inputs[0]
        return tuple(next(rest) if need else zero.new_zeros(0) for need in ctx.needs)

    @staticmethod
    def vmap(info, in_dims, name, options, needs, n, tangents, results, gy, gdy, *tensors):
        kernel = KERNELS[name]
        inputs = (gy, gdy, *tensors[: n + tangents])
        dims = in_dims[6 : 6 + len(inputs)]
        places = [i for i, x in enumerate(inputs) if x is not None]

        def one(*xs: Tensor) -> tuple[Tensor, ...]:
            full: list[Maybe] = [None] * len(inputs)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            found = kernel.gradients(options, full[2 : 2 + n], full[2 + n :], full[0], full[1])
            return tuple(
                g if need and g is not None else xs[0].new_zeros(0)
                for g, need in zip(found[: n + tangents], needs, strict=True)
            )

        given: Any = [inputs[i] for i in places]
        flat = torch.func.vmap(one, in_dims=tuple(dims[i] for i in places))(*given)
        return flat, (0,) * len(flat)
