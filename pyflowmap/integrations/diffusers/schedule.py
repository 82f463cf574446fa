"""`Schedule`: what both schedulers share: noise levels, timesteps, where a timestep stands among them, added noise.

A noise level sigma runs from 1 = noise to 0 = data, a timestep is sigma * num_train_timesteps; the solvers' time is
1 - sigma. The levels are floats on the host, so a step knows its coefficients without asking the device. An entry of
`timesteps` that a pipeline hands back is recognised by its place in memory, again without reading it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ...algebra import lazy
from .replay import settle

__all__ = ["NEAR", "Schedule", "SchedulerOutput", "host"]

_RESHAPED = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
NEAR = 1e-6  # levels closer than this are one: rounded to float32, one must still find itself
_FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_TRAILING = ("FlowMapEulerDiscreteScheduler", "FlowMapScheduler", "SolverScheduler")
_FOREIGN_BUT_IDLE = ("scale_factors", "upscale_mode")  # FlowMatchLCMScheduler's, of resolutions


class Schedule(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Noise levels as those of diffusers' FlowMatchEulerDiscreteScheduler and FlowMapEulerDiscreteScheduler.

    num_train_timesteps  the length of the training schedule: timestep = sigma * num_train_timesteps
    shift                sigma <- shift sigma / (1 + (shift - 1) sigma), logit sigma + log shift
    use_dynamic_shifting shift by exp(mu), or by mu for time_shift_type="linear", with mu given to `set_timesteps`
    base_shift, max_shift, base_image_seq_len, max_image_seq_len   from which pipelines compute mu
    shift_terminal       stretch the levels so that the last one before 0 is this
    timestep_spacing     "trailing": 1 - k/n. "linspace": from 1 to the least level of training, both included
    """

    order = 1
    init_noise_sigma = 1.0
    timesteps: Tensor
    sigmas: Tensor
    config: Any

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As everywhere in diffusers; of a config that belongs to another class, what cannot be kept raises."""
        if isinstance(config, dict):
            config = _translated(cls, dict(config), kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _setup(self) -> None:
        """The schedule of training, to read; `set_timesteps` makes the one to step along."""
        c = self.config
        if c.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f'time_shift_type = {c.time_shift_type!r}; it is "exponential" or "linear"')
        if c.timestep_spacing not in ("trailing", "linspace"):
            raise ValueError(f'timestep_spacing = {c.timestep_spacing!r}; it is "trailing" or "linspace"')
        if not c.shift > 0.0:
            raise ValueError(f"shift = {c.shift}; it is positive, and 1.0 leaves the levels as they are")
        self._shift = c.shift
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        training = np.arange(c.num_train_timesteps, 0, -1, dtype=np.float32) / np.float32(c.num_train_timesteps)
        if not c.use_dynamic_shifting:
            training = c.shift * training / (1 + (c.shift - 1) * training)
        self.sigmas = torch.from_numpy(training.astype(np.float32))
        self.timesteps = self.sigmas * c.num_train_timesteps
        self.sigma_max, self.sigma_min = float(training[0]), float(training[-1])
        self._levels: list[float] = []

    # ---- levels ----------------------------------------------------------------------------------------------------

    def _make_levels(self, steps: Any, sigmas: Any, mu: float | None, timesteps: Any) -> list[float]:
        """n + 1 falling levels that end in 0. float32 values, so that host and device speak of the same ones."""
        c = self.config
        given = sigmas if sigmas is not None else timesteps
        if steps is None and given is None:
            raise ValueError("set_timesteps got neither num_inference_steps nor sigmas nor timesteps; give one of them")
        if given is not None and steps is not None and len(given) != steps:
            raise ValueError(f"num_inference_steps = {steps} but {len(given)} levels are given; leave one of them out")
        steps = len(given) if given is not None else steps
        if isinstance(steps, bool) or int(steps) != steps or steps < 1:
            raise ValueError(f"num_inference_steps = {steps!r}; it is a whole number, at least 1")
        values: Any
        if given is not None:
            values = np.asarray(_host(given)).astype(np.float32)
            if sigmas is None:
                values = values / np.float32(c.num_train_timesteps)
            elif timesteps is not None:
                other = np.asarray(_host(timesteps), dtype=np.float64) / c.num_train_timesteps
                if len(other) != len(values) or np.abs(other - values).max() > 1e-6:
                    raise ValueError(
                        "sigmas and timesteps are both given and differ, but the network's time and the step's "
                        "are one here; give sigmas only"
                    )
        elif c.timestep_spacing == "trailing":
            values = np.linspace(1.0, 0.0, int(steps) + 1)[:-1]
        else:
            values = np.linspace(self.sigma_max, self.sigma_min, int(steps))
        if c.use_dynamic_shifting:
            if mu is None:
                raise ValueError("use_dynamic_shifting = True needs mu: set_timesteps(..., mu=...)")
            factor = math.exp(mu) if c.time_shift_type == "exponential" else mu
            values = factor / (factor + (1 / values - 1))
        else:  # mu has no meaning here, but Flux's pipelines pass it whatever the scheduler
            values = self._shift * values / (1 + (self._shift - 1) * values)
        if c.shift_terminal:
            far = 1 - values
            values = 1 - far * ((1 - c.shift_terminal) / far[-1]) if far[-1] != 0 else values
        levels = [*map(float, values.astype(np.float32)), 0.0]
        if levels[0] > 1.0 or any(not a > b for a, b in pairwise(levels)):
            raise ValueError(
                f"the noise levels {[round(v, 6) for v in levels[:8]]} do not fall strictly from at most 1 to 0; "
                "give them from noise to data, without the final 0, which is added"
            )
        return levels

    def _publish(self, levels: Sequence[float], device: Any, final: float = 0.0) -> None:
        """`levels` of the network's calls, in order, as timesteps and sigmas on the device; the run starts over."""
        self._levels = [*levels, final]
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._values = [float(np.float32(v) * np.float32(self.config.num_train_timesteps)) for v in levels]
        self._step_index = self._begin_index = None

    def _require_levels(self) -> None:
        if not self._levels:
            raise ValueError("step before set_timesteps; call scheduler.set_timesteps(num_inference_steps) first")

    @property
    def shift(self) -> float:
        """The static shift now in force."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Another static shift, for the next `set_timesteps`."""
        if not shift > 0.0:
            raise ValueError(f"shift = {shift}; it is positive, and 1.0 leaves the levels as they are")
        self._shift = shift

    # ---- where a timestep stands -------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """Which entry of `timesteps` comes next; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Which entry of `timesteps` the first step will be given, for pipelines that start in the middle."""
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(f"begin_index = {begin_index}; the schedule has {len(self.timesteps)} timesteps")
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of `timestep` in the schedule; of two equal ones the second. Reads tensors: not for inside a loop.

        ValueError where it is none of the schedule's.
        """
        values = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        found = _second_nearest(values, float(timestep), NEAR * self.config.num_train_timesteps)
        if found is None:
            raise ValueError(f"timestep {float(timestep):g} is not in the schedule {[round(v, 3) for v in values[:8]]}")
        return found

    def _place(self, timestep: Any, rounded: bool = False) -> int | None:
        """Which entry of `timesteps` this is, without a word to the device; None: not one of them, or unreadable.

        `rounded`: also where it was rounded to the dtype of `timestep`, a tensor."""
        near = NEAR * self.config.num_train_timesteps
        if isinstance(timestep, Tensor):
            table = self.timesteps
            if timestep.dtype == table.dtype and timestep.device == table.device and timestep.numel() == 1:
                inside = timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
                offset = int(timestep.storage_offset() - table.storage_offset())
                if inside and 0 <= offset < len(self._values):
                    return offset
            if timestep.device.type != "cpu" or timestep.numel() != 1:
                return None
            if rounded:
                relative, absolute = self._rounding(timestep.dtype)
                near = max(near, relative * float(timestep), absolute)
        found = _second_nearest([*self._values, 0.0], float(timestep), near, self._expected())
        return None if found == len(self._values) else found

    def _rounding(self, dtype: torch.dtype) -> tuple[float, float]:
        """By how much a timestep of the schedule moves when it becomes a `dtype`: relative, absolute.

        ValueError where two of them can then no longer be told apart.
        """
        whole = not dtype.is_floating_point
        if whole and all(abs(v - round(v)) <= 1e-6 * v for v in self._values):
            return 0.0, 0.0
        relative, absolute = (0.0, 1.0) if whole else (torch.finfo(dtype).eps, 0.0)  # whole: may be cut off
        for above, below in pairwise([*dict.fromkeys(self._values), 0.0]):
            apart = absolute * (2 if below else 1) + relative * 0.5 * (above + below)
            if above - below < apart:
                raise ValueError(
                    f"timesteps {above:g} and {below:g} of the schedule cannot be told apart in {dtype}, so where to "
                    "go is unknown; hand back `timesteps` in float32, or give r_timestep"
                )
        return relative, absolute

    def _expected(self) -> int | None:
        return self._begin_index if self._step_index is None else self._step_index

    def _in_order(self, place: int) -> int:
        expected = self._expected()
        if expected is not None and place != expected:
            of = len(self._values)
            due = f"entry {expected} is due" if expected < of else f"all {of} have been taken"
            raise ValueError(
                f"timestep {self._values[place]:g} is entry {place} of the schedule, but {due}; hand back `timesteps` "
                "in order, and call set_timesteps before another run"
            )
        return place

    def _level(self, timestep: Any, sample: Tensor, name: str = "timestep") -> float | Tensor:
        """The noise level of any timestep: a float, or a tensor of leading dimensions of `sample`, on its device."""
        steps = self.config.num_train_timesteps
        if not isinstance(timestep, Tensor) or (timestep.numel() == 1 and timestep.device.type == "cpu"):
            return self._in_range([float(timestep)], name)[0] / steps
        if timestep.numel() == 1:
            timestep = timestep.reshape(())
        shape = tuple(timestep.shape)
        if shape != tuple(sample.shape[: timestep.dim()]) or timestep.dim() >= sample.dim() > 1:
            raise ValueError(
                f"{name} has shape {shape} but the sample has shape {tuple(sample.shape)}; give one number, or the "
                "sample's leading dimensions: (B,), or (B, F) where frames come second"
            )
        self._in_range(host(timestep) or [], name)
        kind = torch.float64 if timestep.dtype == sample.dtype == torch.float64 else torch.float32
        return timestep.to(device=sample.device, dtype=kind) / steps

    def _in_range(self, values: list[float], name: str) -> list[float]:
        steps = self.config.num_train_timesteps
        for value in values:
            if not -NEAR * steps <= value <= (1 + NEAR) * steps:  # NaN fails too
                raise ValueError(f"{name} = {value:g}; timesteps lie between {steps:g} = noise and 0 = data")
        return values

    # ---- noise -------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """`sample` itself: flow models take the state as it is."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise, in one launch. timestep: a number, (B,), or (B, F) for frames."""
        place = self._place(timestep) if self._levels else None
        sigma = self._levels[place] if place is not None else self._level(timestep, sample)
        one = 1.0 - sigma
        (noised,) = settle((one * lazy(sample) + sigma * lazy(noise),), sample)
        return noised

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """`scale_noise` under the name and order that older pipelines call."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _second_nearest(values: Sequence[float], value: float, near: float, expected: int | None = None) -> int | None:
    """Where `value` is; of equal ones the one expected, or else the second, at which a step begins where the one before
    it ended with the first. None: nowhere."""
    nearest = min(values, key=lambda each: abs(each - value))
    if not abs(nearest - value) <= near:
        return None
    equal = [i for i, each in enumerate(values) if each == nearest]
    if expected in equal:
        return expected
    return equal[1] if len(equal) > 1 else equal[0]


def host(times: Tensor) -> list[float] | None:
    """The numbers in a tensor that lies on the host; None where reading it would wait for a device or is impossible."""
    if type(times) is not Tensor or times.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(times):
        return None
    return times.detach().flatten().tolist()


def _host(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _translated(cls: type, config: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Another scheduler's config in the words of this one. (A config in memory, unlike a saved one, has no class.)"""
    origin = config.get("_class_name")
    if origin == cls.__name__:
        return config
    shown = origin or "the config"
    asked = {key: kwargs.get(key, config.get(key)) for key in _RESHAPED}
    on = next((key for key, value in asked.items() if value), None)
    if on is not None:
        raise ValueError(f"{shown} has {on} = True, which {cls.__name__} does not do; set it False, or give sigmas")
    own = cls._get_init_keys(cls) - {"self"}  # type: ignore[attr-defined]
    predicts = config.get("prediction_type", "flow_prediction")
    diffusion = "beta_schedule" in config and not config.get("use_flow_sigmas")
    if diffusion or predicts != "flow_prediction":
        schedule = f"beta_schedule = {config['beta_schedule']!r}, " if "beta_schedule" in config else ""
        raise ValueError(
            f"{shown} belongs to a diffusion model ({schedule}prediction_type = {config.get('prediction_type')!r}); "
            f"{cls.__name__} is for flow models. For such a network use "
            'pfm.FlowMap(network, prediction="noise", ...) and pfm.sample'
        )
    if "beta_schedule" in config:  # a multistep scheduler that was told to do flow matching, as Wan's
        kept = own - {"timestep_spacing"}
        return {key: value for key, value in config.items() if key in kept} | {"shift": config["flow_shift"]}
    if origin not in (*_FLOW_MATCHING, *_TRAILING):
        known = {*own, *_RESHAPED, *_FOREIGN_BUT_IDLE}
        strange = next((key for key in config if key not in known and not key.startswith("_")), None)
        if strange is not None:
            raise ValueError(
                f"{shown} has {strange} = {config[strange]!r}, which a flow-matching schedule does not have; "
                f"{cls.__name__} would step otherwise, so make it by its own arguments, e.g. {cls.__name__}(shift=3.0)"
            )
    if "invert_sigmas" in config or origin in _FLOW_MATCHING:
        config.setdefault("timestep_spacing", "linspace")
    elif origin is None and "_use_default_values" in config and "timestep_spacing" not in {*config, *kwargs}:
        raise ValueError(
            "a config in memory of shift alone is FlowMapEulerDiscreteScheduler's or FlowMatchHeunDiscreteScheduler's"
            ', whose levels differ; pass timestep_spacing="trailing" (the former) or "linspace" (the latter)'
        )
    return config
