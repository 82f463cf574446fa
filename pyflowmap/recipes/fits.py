"""Do objective, network and data set go together? Asked once, before any data is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Call
from ..data.data_set import example
from ..flow_map import FlowMap
from ..training import Step

__all__ = ["check"]

# A third argument of such a name is a condition: handed a time, many networks would take it without a word.
_CONDITIONS = {"label", "labels", "class_labels", "y", "c", "cond", "condition", "context", "mask"}


def check(step: Step, data: Any, dropout: Mapping[str, tuple[Any, float]] | None = None) -> None:
    """Raise ValueError with a cure where the network lacks an input that objective or data set need.

    First by the signature of the network's forward, then by one evaluation of the objective on four rows of normal
    numbers of the set's shape, with its last class and the null conditions of `dropout`: shapes and class
    tables that do not agree show there. Nothing is read and no random number of the run is used up.
    """
    device = next((p.device for p in step.parameters()), torch.device("cpu"))
    x1, condition = example(data, 4)
    _check_classes(step.network, data, condition)
    for key, (null, _) in (dropout or {}).items():
        if key not in condition:
            raise ValueError(
                f"dropout names the condition {key!r}, which the data set does not give; it gives {_listed(condition)}"
            )
        condition[key][0] = null
    condition = {key: value.to(device) for key, value in condition.items()}
    _check_signature(FlowMap(step.network, **step.view), condition, step.objective)
    modules = [module for module in step.modules() if module.training]
    for module in modules:
        module.training = False  # no running mean learns from these numbers
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            step(x1.to(device), **condition)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{_name(step.objective)} cannot evaluate {type(step.network).__name__} on a batch of shape "
            f"{tuple(x1.shape)} with {_listed(condition)}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    finally:
        for module in modules:
            module.training = True


def _check_classes(network: nn.Module, data: Any, condition: Mapping[str, Tensor]) -> None:
    known = getattr(getattr(network, "config", None), "labels", None)
    given = int(getattr(data, "labels", 0)) if "label" in condition else 0
    name = type(network).__name__
    if known is None or known == given:
        return
    if known == 0:
        raise ValueError(
            f"the data set gives labels of {given} classes but {name} is built without a class input; "
            f"set labels={given} in its config, or take the labels out of the set"
        )
    if given == 0:
        raise ValueError(
            f"{name} is built for {known} classes but the data set gives no label; set labels=0 in its config"
        )
    if given > known:
        raise ValueError(f"the data set has {given} classes but {name} is built for {known}; set labels={given}")


def _check_signature(flow_map: FlowMap, condition: Mapping[str, Tensor], objective: Any) -> None:
    network, call = flow_map.network, flow_map.call
    call = getattr(call, "inner", call)  # what a Step has wrapped
    if not isinstance(call, Call):
        return  # an adapter of its own names what it misses
    try:
        signature = inspect.signature(getattr(network, "forward", network))
    except (TypeError, ValueError):
        return
    parameters = list(signature.parameters.values())
    shown = f"{type(network).__name__}.forward({', '.join(str(p).split(':')[0].split('=')[0] for p in parameters)})"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    taken = 1 + len(call.arguments(torch.zeros(1), torch.ones(1)))  # x and the times
    times = positional[1:taken]
    if not many and (len(positional) < taken or any(p.name in _CONDITIONS | set(condition) for p in times)):
        if call.two_times:
            raise ValueError(
                f"{shown} takes no second time, but {_name(objective)} hands it both ends of a jump; write "
                'forward(x, s, t, ...), or learn a velocity: flow_matching with prediction="velocity"'
            )
        raise ValueError(f"{shown} takes no time; write forward(x, t, ...)")
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for key in condition:
        if key not in named:
            raise ValueError(
                f"{shown} has no input {key!r}, which the data set gives; write forward(..., {key}=None), "
                f"or take the {key} out of the set"
            )


def _name(objective: Any) -> str:
    return getattr(getattr(objective, "func", objective), "__name__", type(objective).__name__)


def _listed(condition: Mapping[str, Any]) -> str:
    return f"the condition {', '.join(sorted(condition))}" if condition else "no condition"
