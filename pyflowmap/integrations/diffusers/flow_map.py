"""`FlowMapScheduler`: the jumps of a flow map, in the pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...algebra import lazy
from .replay import settle
from .schedule import Schedule, SchedulerOutput

__all__ = ["FlowMapScheduler"]


class FlowMapScheduler(Schedule):
    """z_r = z_t + (sigma_r - sigma_t) u: one launch, with u the network's mean velocity (noise - data) over [r, t].

    With a network that sees one time and predicts the velocity it is Euler's step. A drop-in for diffusers'
    FlowMapEulerDiscreteScheduler (AnyFlow) and for FlowMatchEulerDiscreteScheduler; take over their configuration with
    `FlowMapScheduler.from_config(pipe.scheduler.config)`. The state keeps the dtype of `sample` (theirs takes that of
    the network's output, so that half precision rounds the state at every step). Arguments: see `Schedule`.

    >>> scheduler = FlowMapScheduler()
    >>> scheduler.set_timesteps(2)
    >>> scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.zeros(1, 3)).prev_sample
    tensor([[-0.5000, -0.5000, -0.5000]])
    """

    _compatibles = ["FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        timestep_spacing: str = "trailing",
    ) -> None:
        self._setup()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,  # (n,) falling, before the shift; the final 0 is added
        mu: float | None = None,
        timesteps: Any = None,  # (n,) the same as sigma * num_train_timesteps
    ) -> None:
        """The levels to jump along: n of them given or evenly spaced, then shifted, then 0."""
        levels = self._make_levels(num_inference_steps, sigmas, mu, timesteps)
        self.num_inference_steps = len(levels) - 1
        self._publish(levels[:-1], device)

    def step(
        self,
        model_output: Tensor,  # (B, ...) u
        timestep: float | Tensor,  # one number, (B,) or (B, F)
        sample: Tensor,  # (B, ...) z_t
        r_timestep: float | Tensor | None = None,  # one number, (B,) or (B, F); None: the next of the schedule
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """z_r. An entry of `timesteps` without `r_timestep` goes to the next one, in order; with `r_timestep` any
        time goes to any other, and every row or frame may have its own.

        `generator` is taken because pipelines pass one; a jump draws nothing. Raises ValueError before
        `set_timesteps`, out of order, and where a time is not on the schedule and `r_timestep` is missing.
        """
        self._require_levels()
        place = self._place(timestep)
        if place is not None:
            here: float | Tensor = self._levels[place]
        else:
            here = self._level(timestep, sample)
        if r_timestep is None:
            if place is not None:
                there: float | Tensor = self._levels[self._in_order(place) + 1]
            elif isinstance(here, Tensor):
                there = self._below(here)
            else:
                raise ValueError(
                    f"timestep {float(timestep):g} is not on the schedule, so where to go is unknown; give r_timestep"
                )
        else:
            target = self._place(r_timestep)
            there = self._levels[target] if target is not None else self._level(r_timestep, sample, "r_timestep")
        (moved,) = settle((lazy(sample) + (there - here) * lazy(model_output),), sample)
        at = place if place is not None else (self._expected() or 0)
        self._step_index = at + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _below(self, levels: Tensor) -> Tensor:
        """The next level of the schedule below each of `levels`, found on the device. 0 stays 0: a clean frame."""
        ascending = self.sigmas.flip(0).to(levels)
        place = torch.searchsorted(ascending, (levels - 1e-6).contiguous())
        return ascending[(place - 1).clamp_min(0)]
