"""How a network takes its times: adapters between `FlowMap` and other people's signatures.

A call is an object with `__call__(network, x, s, t, condition)` returning the network's output tensor, s and t being
(B,) float32 tensors, float64 where x is, which it must not write to. `reverses_time` says that the network's own time
runs from data to noise, so that its velocities carry the opposite sign; `two_times` that it sees the end of the jump as
well. A call may have `check(prediction, interpolant)`, which raises where it does not go with them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interpolants import VariancePreserving
from .tangents.parts import is_dual

__all__ = [
    "Call",
    "single_time",
    "start_and_end",
    "start_and_span",
    "meanflow",
    "diffusers",
    "flux",
    "anyflow",
    "dit",
    "ready",
    "unwrap",
]


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


@dataclass(frozen=True)
class flux:
    """network(x, timestep=1 - s, guidance=..., img_ids=..., txt_ids=...).sample: diffusers' FluxTransformer2DModel.

    x holds packed latents (B, L, C). `img_ids` and `txt_ids` come in the condition, as (L, 3), or as (B, L, 3) where
    every condition has a row per sample (`pfm.sample`); the first row is used. `guidance` is the scale for networks
    distilled with an embedded one; the condition may give its own, (B,).
    """

    guidance: float | None = None
    name: str = "flux"
    reverses_time: bool = True
    two_times: bool = False

    def __call__(self, network: Callable, x: Tensor, s: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        arguments = dict(condition)
        for key in ("img_ids", "txt_ids"):
            if not isinstance(arguments.get(key), Tensor):
                raise ValueError(f"the condition has no {key}; Flux needs these positions, e.g. {key}=(L, 3) zeros")
            if arguments[key].dim() == 3:
                arguments[key] = arguments[key][0]
        embeds = getattr(getattr(network, "config", None), "guidance_embeds", None)
        if arguments.get("guidance") is None and self.guidance is not None:
            if embeds is False:
                raise ValueError(f"guidance = {self.guidance}, but this network embeds none; use pfm.guidance.cfg")
            arguments["guidance"] = torch.full((x.shape[0],), self.guidance, dtype=torch.float32, device=x.device)
        if embeds and arguments.get("guidance") is None:
            raise ValueError("this network embeds its guidance scale; give one, e.g. call=pfm.calls.flux(guidance=3.5)")
        return unwrap(network(x, timestep=1.0 - s, **arguments))


@dataclass(frozen=True)
class anyflow:
    """network(x, timestep=(1 - s) * 1000, r_timestep=(1 - t) * 1000, ...).sample: diffusers' AnyFlowTransformer3DModel.

    x is (B, F, C, H, W), frames before channels; both times go in as (B, F), so s and t may be (B,) or (B, F). It
    predicts a mean velocity, noise - data.
    """

    scale: float = 1000.0
    name: str = "anyflow"
    reverses_time: bool = True
    two_times: bool = True

    def __call__(self, network: Callable, x: Tensor, s: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        if x.dim() != 5:
            raise ValueError(f"x has shape {tuple(x.shape)}; AnyFlow takes (B, F, C, H, W), frames before channels")
        frames = lambda t: t if t.ndim == 2 else t.reshape(-1, 1).expand(-1, x.shape[1])  # noqa: E731
        timestep, r_timestep = ((1.0 - frames(each)) * self.scale for each in (s, t))
        return unwrap(network(x, timestep=timestep, r_timestep=r_timestep, **condition))


@dataclass(frozen=True)
class dit:
    """network(x, timestep=n, class_labels=...).sample[:, :C]: diffusers' DiTTransformer2DModel, a model of DDPM.

    It predicts noise at the step n = 0 (data) ... steps - 1 (noise) of a linear schedule of betas, and beside it a
    variance, which is cut off. Use it as

        pfm.FlowMap(network, prediction="noise", interpolant=pfm.calls.dit().interpolant, call="dit")

    The path is the continuous one; n is the place in the discrete schedule, between its steps where need be, that has
    the same alpha, so no approximation enters.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    name: str = "dit"
    reverses_time: bool = True
    two_times: bool = False

    @property
    def interpolant(self) -> VariancePreserving:
        """The path that goes with it: alpha and sigma as of the noised images that the network knows."""
        return VariancePreserving(self.steps * self.beta_start, self.steps * self.beta_end)

    def check(self, prediction: str, interpolant: Any) -> None:
        if interpolant != self.interpolant:
            raise ValueError(f"call {self.name} goes with interpolant={self.interpolant}, got {interpolant}")
        if prediction in ("velocity", "mean_velocity"):
            raise ValueError(f'prediction = {prediction!r}; a DiT of diffusers predicts "noise"')

    def step_of(self, s: Tensor) -> Tensor:
        """n with alpha_n = alpha(s): linear in log alpha between the steps. Clamped to 0 ... steps - 1."""
        decay = -self.interpolant.alpha(s).log()
        table = _decay(self.beta_start, self.beta_end, self.steps, decay.device, decay.dtype)
        above = torch.searchsorted(table, decay.contiguous()).clamp(1, self.steps - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (decay - low) / (high - low)).clamp(0.0, self.steps - 1.0)

    def __call__(self, network: Callable, x: Tensor, s: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return unwrap(network(x, timestep=self.step_of(s), **condition))[:, : x.shape[1]]


@functools.lru_cache
def _decay(beta_start: float, beta_end: float, steps: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """-log alpha_n of DDPM: alpha_n^2 = prod_{k <= n} (1 - beta_k). Ho et al. 2020, eq. 4."""
    with torch.inference_mode(False):  # it is kept, also for calls that record gradients
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
        return (-0.5 * torch.log1p(-betas).cumsum(0)).to(device, dtype)


ready: dict[str, Callable] = {
    "single_time": single_time,
    "start_and_end": start_and_end,
    "start_and_span": start_and_span,
    "meanflow": meanflow,
    "diffusers": diffusers(),
    "sd3": diffusers(name="sd3"),
    "wan": diffusers(name="wan"),
    "flux": flux(),
    "dit": dit(),
    "anyflow": anyflow(),
}
