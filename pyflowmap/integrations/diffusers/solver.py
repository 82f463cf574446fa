"""`SolverScheduler`: every solver of pyflowmap that takes velocities, in the pipelines of diffusers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ... import solvers
from ...algebra import lazy
from .replay import Replay, plan
from .schedule import Schedule, SchedulerOutput

__all__ = ["SolverScheduler"]


class SolverScheduler(Schedule):
    """The step functions of `pyflowmap.solvers`, bit for bit, driven by a pipeline's loop.

    solver            a name in `pyflowmap.solvers.named`, of those that take a velocity and a fixed grid
    solver_options    its keyword options, e.g. {"alpha": 0.5}. Multistep solvers start by default with start="low",
                      steps of lower order, so that n steps are n evaluations, as users of diffusers expect
    evaluate_at_data  whether the network may be asked at timestep 0. By default steps whose last evaluation lies there
                      do without, as FlowMatchHeunDiscreteScheduler does
    seed              of the noise that a stochastic solver draws; None: from the `generator` given to the first step
                      of a run, or else from torch's own
    The others: see `Schedule`.

    A solver that asks k times per step has k entries per step in `timesteps` (and `order` k), and in between hands out
    the points at which it asks, not states: a pipeline may change the state (inpainting) only between steps.

    >>> scheduler = SolverScheduler("heun")
    >>> scheduler.set_timesteps(2)
    >>> scheduler.timesteps
    tensor([1000.,  500.,  500.])
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        solver: str = "dpm_solver_pp_2m",
        solver_options: dict[str, Any] | None = None,
        evaluate_at_data: bool = False,
        seed: int | None = None,
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
        self._solver = _chosen(solver, solver_options)
        self._singular = frozenset() if evaluate_at_data else frozenset({1.0})
        self._run: Replay | None = None

    @property
    def order(self) -> int:  # type: ignore[override]
        """What diffusers calls so: entries of `timesteps` per step. The order of accuracy is the solver's."""
        return self._solver.nfe or 1

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,  # (n,) falling, before the shift; the final 0 is added
        mu: float | None = None,
        timesteps: Any = None,  # (n,) the same as sigma * num_train_timesteps
    ) -> None:
        """The levels to step along; `timesteps` are the times at which the solver asks the network, in order."""
        levels = self._make_levels(num_inference_steps, sigmas, mu, timesteps)
        self.num_inference_steps = len(levels) - 1
        self._times = [1.0 - level for level in levels]
        asked = plan(self._solver, self._times, self._singular)
        known = dict(zip(self._times, levels))
        self._asked = [time for each in asked for time in each]
        self._starts = {start: k for k, start in reversed([*enumerate(accumulate(map(len, asked), initial=0))])}
        self._publish([known.get(time, 1.0 - time) for time in self._asked], device, levels[-1])
        self._run = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Which entry of `timesteps` the first step will be given: one at which a step of the solver begins."""
        super().set_begin_index(begin_index)
        if self._levels:
            self._begin_index = None  # until it has been checked
            self._check_begin(begin_index)
            self._begin_index = begin_index

    def step(
        self,
        model_output: Tensor,  # (B, ...) the velocity, noise - data
        timestep: float | Tensor,  # the entry of `timesteps` at which it was evaluated
        sample: Tensor,  # (B, ...) the point at which it was evaluated
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The point at which to evaluate the network next; after the last entry of `timesteps`, the final state.

        Raises ValueError before `set_timesteps`, out of order, for a time that is not on the schedule, and where the
        state is changed inside a step. Adds no synchronisation with the device.
        """
        self._require_levels()
        place = self._place(timestep, rounded=True)
        if place is None and isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.device.type != "cpu":
            place = self._expected()  # a copy that only the device can read: the order is all there is
        if place is None:
            shown = tuple(timestep.shape) if isinstance(timestep, Tensor) and timestep.numel() != 1 else timestep
            raise ValueError(
                f"timestep {shown} is none of the {len(self._values)} of this schedule; hand back `timesteps` one "
                "by one, or set_begin_index where only the device can read them"
            )
        if self._run is None:
            place = self._begin(place if self._begin_index is None else self._in_order(place), sample, generator)
        else:
            self._in_order(place)
        run = self._run
        assert run is not None
        moved = run.advance(sample, -1.0 * lazy(model_output))
        self._step_index = place + 1
        due = self._asked[place + 1] if place + 1 < len(self._asked) else None
        if run.time != due:
            raise RuntimeError(
                f"{self._solver.name} asks at {run.time} after entry {place}, the schedule says {due}: it does not ask "
                "at times that the grid alone decides; use it with pfm.sample"
            )
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _check_begin(self, place: int) -> None:
        if place in self._starts:
            return
        near = [at for at in sorted(self._starts) if at < len(self._values)]
        low, high = max(at for at in near if at < place), next((at for at in near if at > place), None)
        uneven = any(at != k * self.order for k, at in enumerate(near))
        cure = (
            f"; image-to-image pipelines begin at a multiple of {self.order}, but not all of its steps take that many "
            'evaluations: use one whose steps do, e.g. "heun", there'
        )
        raise ValueError(
            f"timestep {self._values[place]:g}, entry {place}, is inside a step of {self._solver.name}; begin at entry "
            f"{low}{'' if high is None else f' or {high}'}{cure if uneven else ''}"
        )

    def _begin(self, place: int, sample: Tensor, generator: Any) -> int:
        self._check_begin(place)
        self._run = Replay(
            self._solver,
            self._times,
            sample,
            singular=self._singular,
            seed=_seed(self.config.seed, generator, sample) if self._solver.stochastic else None,
            first=self._starts[place],
        )
        return place


def _chosen(name: Any, options: dict[str, Any] | None) -> solvers.Solver:
    if isinstance(name, solvers.Solver):
        shown = ", ".join(f"{key!r}: {value!r}" for key, value in {**name.options, **(options or {})}.items())
        raise TypeError(
            f"solver is a Solver, which a saved scheduler cannot hold; pass solver={name.name!r}"
            + (f", solver_options={{{shown}}}" if shown else "")
        )
    if not isinstance(name, str):
        raise TypeError(f"solver is {type(name).__name__}; pass a name in pyflowmap.solvers.named, e.g. 'heun'")
    if name not in solvers.named:
        raise ValueError(f"solver = {name!r}; named ones are {', '.join(solvers.named)}")
    chosen = solvers.named[name]
    if chosen.takes != "velocity":
        raise ValueError(f"solver = {name!r} takes jumps, which need a network of two times; use FlowMapScheduler")
    if chosen.loop is not None:
        raise ValueError(f"solver = {name!r} chooses its own steps, a pipeline wants them beforehand; use pfm.sample")
    given = dict(options or {})
    if "start" in chosen.options:
        given.setdefault("start", "low")
    return chosen.using(**given) if given else chosen


def _seed(seed: int | None, generator: Any, sample: Tensor) -> int | Tensor | None:
    if seed is not None or generator is None:
        return seed
    if isinstance(generator, (list, tuple)):
        raise ValueError(f"{len(generator)} generators for one run of a stochastic solver; give one, or seed=")
    if generator.device.type == "cpu":
        return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator))
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=sample.device)
