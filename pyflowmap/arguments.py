"""What a caller says to `sample` and to the editors, checked: solver, noise or shape, seeds, conditions."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .algebra import evaluate, noise
from .flow_map import FlowMap
from .tangents.parts import is_dual

__all__ = [
    "check_ids",
    "check_model",
    "check_seed",
    "condition_of",
    "like_of",
    "network_dtype",
    "solver_of",
    "start",
    "uniform",
    "warn_of_training",
]


def check_model(model: Any) -> None:
    if isinstance(model, FlowMap):
        return
    if isinstance(model, str):
        raise TypeError(f"model is the string {model!r}; load it first: pfm.load({model!r})")
    raise TypeError(
        f"model is {type(model).__name__}; wrap the network: pfm.FlowMap(network, prediction=..., call=...)"
    )


def warn_of_training(network: Any) -> None:
    """Where dropout would make samples differ, or batch statistics would be changed by them."""
    if not getattr(network, "training", False) or not isinstance(network, torch.nn.Module):
        return
    for name, module in network.named_modules():
        random = getattr(module, "p", 0.0) if isinstance(module, torch.nn.modules.dropout._DropoutNd) else 0.0
        if module.training and (random or isinstance(module, torch.nn.modules.batchnorm._BatchNorm)):
            kind = type(module).__name__
            warnings.warn(f"{name or kind} ({kind}) is in training mode; network.eval() first", RuntimeWarning, 3)
            return


def check_seed(seed: Any) -> None:
    """A whole number of 64 bits, or an integer tensor of one element on the device; None is drawn."""
    if seed is None or isinstance(seed, torch.SymInt):
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; a tensor seed is int64, one number")
        return
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"seed is {type(seed).__name__}; pass a whole number, e.g. 0")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed = {number} has more than 64 bits; others would draw the same noise")


def solver_of(solver: str | Callable) -> solvers.Solver:
    if isinstance(solver, str):
        if solver not in solvers.named:
            raise ValueError(f"solver = {solver!r}; named ones are {', '.join(solvers.named)}, or pass a step function")
        solver = solvers.named[solver]
    if isinstance(solver, solvers.Solver):
        return solver
    if not callable(solver):
        raise TypeError(f"solver is {type(solver).__name__}; pass a name or step(velocity, x, s, t, memory)")
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; pass a name or step(velocity, x, s, t, memory)")
    # A step of one's own may draw noise, so seeds are its own business; and nobody knows what it evaluates.
    return solvers.Solver(solver, getattr(solver, "__name__", "step"), None, None, stochastic=True)


def uniform(steps: int) -> list[float]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; it is a whole number, at least 1")
    return [k / steps for k in range(steps + 1)]


def like_of(model: FlowMap, noise_or_shape: Any) -> Tensor:
    """The noise, or where a shape is given a tensor of that shape, dtype and device that takes no memory."""
    if isinstance(noise_or_shape, Tensor):
        if not noise_or_shape.is_floating_point() or noise_or_shape.dim() == 0:
            raise TypeError(
                f"noise has dtype {noise_or_shape.dtype} and shape {tuple(noise_or_shape.shape)}; "
                "pass a floating-point tensor (B, ...)"
            )
        return noise_or_shape
    if is_dual(noise_or_shape):
        raise TypeError("the noise is a Dual, which sample does not carry; take its derivative by torch.func.jvp")
    if not isinstance(noise_or_shape, Sequence):
        cure = "torch.from_numpy(noise)" if hasattr(noise_or_shape, "__array__") else "e.g. (16, 1, 28, 28)"
        raise TypeError(f"noise_or_shape is {type(noise_or_shape).__name__}; pass a tensor or a shape, {cure}")
    shape = tuple(noise_or_shape)
    if not shape or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"shape = {shape}; pass the noise or a shape of whole numbers, e.g. (16, 1, 28, 28)")
    parameters = getattr(model.network, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    device = first.device if isinstance(first, Tensor) else None
    return torch.empty((), dtype=torch.float32, device=device).expand(shape)


def check_ids(sample_ids: Any, seed: Any, like: Tensor) -> None:
    if sample_ids is None:
        return
    if seed is None:
        raise ValueError("sample_ids without a seed: what is drawn depends on (seed, sample id); pass seed=")
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64:
        shown = sample_ids.dtype if isinstance(sample_ids, Tensor) else type(sample_ids).__name__
        raise TypeError(f"sample_ids is {shown}; pass an int64 tensor, e.g. torch.arange({like.shape[0]})")
    if sample_ids.shape != like.shape[:1] or sample_ids.device != like.device:
        raise ValueError(
            f"sample_ids has shape {tuple(sample_ids.shape)} on {sample_ids.device}; give one number per sample, "
            f"({like.shape[0]},) on {like.device}"
        )


def condition_of(condition: Mapping[str, Any] | None, x: Tensor, what: str = "noise") -> dict[str, Any]:
    if condition is not None and not isinstance(condition, Mapping):
        raise TypeError(f'condition is {type(condition).__name__}; pass keywords for the network, e.g. {{"label": y}}')
    condition = dict(condition or {})
    for key, value in condition.items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(
                f"condition {key!r} is on {value.device} but the {what} is on {x.device}; move one of them"
            )
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != x.shape[0]:
            raise ValueError(
                f"condition {key!r} has {value.shape[0]} rows but the {what} has {x.shape[0]}; give one row per sample"
            )
    return condition


def network_dtype(model: FlowMap, x: Tensor) -> torch.dtype | None:
    """That of the network's parameters where the state has another; None: as the state."""
    parameters = getattr(model.network, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    kind = first.dtype if isinstance(first, Tensor) else None
    plain = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return kind if kind in plain and kind != x.dtype else None


def start(model: FlowMap, noise_or_shape: Any, seed: int | Tensor | None, sample_ids: Tensor | None) -> Tensor:
    """The noise itself, or where a shape is given normal numbers of (seed, sample id)."""
    like = like_of(model, noise_or_shape)
    check_ids(sample_ids, seed, like)
    if isinstance(noise_or_shape, Tensor):
        return noise_or_shape
    x = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return evaluate(noise(x, seed=seed, sample_ids=sample_ids), out=x)
