"""How a network takes its times: adapters between `FlowMap` and other people's signatures.

A call is an object with `__call__(network, x, s, t, condition)` returning the network's output tensor, s and t being
(B,) float32 tensors. `reverses_time` says that the network's own time runs from data to noise, so that its velocities
carry the opposite sign; `two_times` that it sees the end of the jump as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .tangents.parts import is_dual

__all__ = ["Call", "single_time", "start_and_end", "start_and_span", "meanflow", "diffusers", "ready", "unwrap"]


def unwrap(output: Any) -> Any:
    """The tensor, or Dual, in a network's output: itself, the first of a tuple, or the `sample` of a dataclass or
    mapping."""
    if _is_tensor(output):
        return output
    if isinstance(output, Mapping) and "sample" in output:
        return output["sample"]
    if hasattr(output, "sample") and _is_tensor(output.sample):
        return output.sample
    if isinstance(output, (tuple, list)) and output and _is_tensor(output[0]):
        return output[0]
    if dataclasses.is_dataclass(output) and dataclasses.fields(output):
        first = getattr(output, dataclasses.fields(output)[0].name)
        if _is_tensor(first):
            return first
    raise TypeError(
        f"the network returned {type(output).__name__}; expected a tensor, a tuple that starts with one, or an object "
        "with .sample; pass FlowMap a call= that takes the tensor out"
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or is_dual(x)  # a Dual is a dataclass, too: its first field is not what is meant


@dataclass(frozen=True)
class Call:
    """`arguments(s, t)` gives the positional arguments after x; the condition goes by keyword."""

    name: str
    arguments: Callable[[Tensor, Tensor], tuple]
    reverses_time: bool = False
    two_times: bool = True

    def __call__(self, network: Callable, x: Tensor, s: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return unwrap(network(x, *self.arguments(s, t), **condition))


single_time = Call("single_time", lambda s, t: (s,), two_times=False)
"""network(x, s): an ordinary velocity or diffusion network in this library's time."""

start_and_end = Call("start_and_end", lambda s, t: (s, t))
"""network(x, s, t): both ends of the jump; what the networks of `pyflowmap.nn` take."""

start_and_span = Call("start_and_span", lambda s, t: (s, t - s))
"""network(x, s, t - s): Shortcut models and flow maps that take the step size."""

meanflow = Call("meanflow", lambda s, t: (1.0 - s, 1.0 - t), reverses_time=True)
"""network(x, t', r') with MeanFlow's time 1 = noise, t' = 1 - s and r' = 1 - t; u = -network(...)."""


@dataclass(frozen=True)
class diffusers:
    """network(x, timestep=(1 - s) * scale, ...).sample: the flow-matching transformers of diffusers (SD3, FLUX, Wan).

    Their velocity is noise - data, so its sign is turned. `scale` is the length of their training schedule; models
    that are fed the bare fraction take `scale=1`.
    """

    scale: float = 1000.0
    name: str = "diffusers"
    reverses_time: bool = True
    two_times: bool = False

    def __post_init__(self):
        if not self.scale > 0.0:
            raise ValueError(f"scale = {self.scale}; it must be positive, e.g. 1000 or 1")

    def __call__(self, network: Callable, x: Tensor, s: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return unwrap(network(x, timestep=(1.0 - s) * self.scale, **condition))


ready: dict[str, Callable] = {
    "single_time": single_time,
    "start_and_end": start_and_end,
    "start_and_span": start_and_span,
    "meanflow": meanflow,
    "diffusers": diffusers(),
}
