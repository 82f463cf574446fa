"""The end of an untracked tangent: a backward pass that reaches it raises, where autograd would see a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["end"]

_MESSAGE = (
    "backward reached a tangent that was not tracked: its gradient would be lost in silence. Pass track_tangent=True "
    "to pfm.jvp to differentiate through it, or use d_out.detach() where the loss means it as a constant"
)


def end(derivative: Tensor, value: Tensor) -> Tensor:
    """`derivative` itself, as an output that refuses gradients where `value` would pass them on."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return derivative
    if torch.compiler.is_compiling():
        return torch.ops.pyflowmap.untracked(derivative, value)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return (_UntrackedInTransform if transformed else _Untracked).apply(derivative, value)


class _Untracked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derivative: Tensor, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            raise RuntimeError(_MESSAGE)
        return None, None


class _UntrackedInTransform(_Untracked):
    """The same in the form that torch.func asks for, which costs 40 microseconds a call more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return derivative.view_as(derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)


# While compiling, the node is an operator that the compiler does not look into; so is the refusal in its backward,
# which the compiler traces but must not run.
@torch.library.custom_op("pyflowmap::untracked", mutates_args=())
def _untracked(derivative: Tensor, value: Tensor) -> Tensor:
    return derivative.clone()


@_untracked.register_fake
def _(derivative: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(derivative)


@torch.library.custom_op("pyflowmap::refuse_gradient", mutates_args=())
def _refuse(grad: Tensor) -> Tensor:
    if grad.count_nonzero():  # compiled code fills in zeros for an output that nobody used
        raise RuntimeError(_MESSAGE)
    return grad.clone()


@_refuse.register_fake
def _(grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _backward(ctx: Any, grad: Tensor) -> Any:
    return None, torch.ops.pyflowmap.refuse_gradient(grad)


_untracked.register_autograd(_backward)
