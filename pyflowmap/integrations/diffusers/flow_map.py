"""`FlowMapScheduler`: the jumps of a flow map, in the pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...algebra import lazy
from .replay import settle
from .schedule import NEAR, Schedule, SchedulerOutput, host

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
        time goes to any later one (r <= t), and every row or frame may have its own.

        Without `r_timestep`, times that were rounded to half precision or to whole numbers are the entries they were
        made from. `generator` is taken because pipelines pass one; a jump draws nothing. Raises ValueError before
        `set_timesteps`, out of order, where a time is not on the schedule and `r_timestep` is missing, and for times
        outside of 0 to num_train_timesteps or r > t (of tensors on the host: others are not waited for).
        """
        self._require_levels()
        place = self._place(timestep, rounded=r_timestep is None)
        here: Any = self._levels[place] if place is not None else self._level(timestep, sample)
        there: Any
        if r_timestep is not None:
            target = self._place(r_timestep)
            there = self._levels[target] if target is not None else self._level(r_timestep, sample, "r_timestep")
        elif place is not None:
            there = self._levels[self._in_order(place) + 1]
        elif isinstance(here, Tensor):
            here, there = self._below(here, timestep.dtype)  # type: ignore[union-attr]
        else:
            raise ValueError(
                f"timestep {float(timestep):g} is not on the schedule, so where to go is unknown; give r_timestep"
            )
        size = _difference(there, here)
        back = max([size] if isinstance(size, float) else host(size) or [0.0])
        if back > NEAR:
            raise ValueError(
                f"r_timestep lies {back * self.config.num_train_timesteps:g} above timestep; a jump goes from noise to "
                "data, so r_timestep <= timestep"
            )
        (moved,) = settle((lazy(sample) + size * lazy(model_output),), sample)
        at = place if place is not None else (self._expected() or 0)
        self._step_index = at + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _below(self, levels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`levels`, those of the schedule that were rounded to `dtype` restored, and the next of the schedule below
        each, found on the device. 0 stays 0: a clean frame."""
        relative, absolute = self._rounding(dtype)
        ascending = self.sigmas.flip(0).to(levels)
        nearest = (levels[..., None] - ascending).abs().argmin(-1)
        known = ascending[nearest]
        reach = (relative * known).clamp_min(max(absolute / self.config.num_train_timesteps, NEAR))
        on = (levels - known).abs() <= reach
        below = torch.where(on, nearest, torch.searchsorted(ascending, levels.contiguous())) - 1
        return torch.where(on, known, levels), ascending[below.clamp_min(0)]


def _difference(there: Any, here: Any) -> Any:
    """there - here, of which one may be per sample and the other per frame."""
    if isinstance(there, Tensor) and isinstance(here, Tensor) and there.dim() and here.dim():
        rank = max(there.dim(), here.dim())
        there, here = (each.reshape(*each.shape, *(1,) * (rank - each.dim())) for each in (there, here))
    return there - here
