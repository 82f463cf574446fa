"""The module that DDP, FSDP2, torch.compile and GradScaler wrap."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flow_map import FlowMap
from ..interpolants import Linear
from ..tangents.parts import is_dual

__all__ = ["Step", "ramp"]


@dataclass(frozen=True)
class ramp:
    """A number that grows in a line from `start` to `stop` over the first `steps` steps, then stays: tangent warm-up.

    Given to `Step` as an option of the objective, it reaches the objective as a float, its value at the step that the
    Trainer has come to: `Step(network, objective, tangent_scale=ramp(0.0, 1.0, steps=10_000))`.

    >>> ramp(0.0, 1.0, steps=4).at(1), ramp(0.0, 1.0, steps=4).at(9)
    (0.25, 1.0)
    """

    start: float
    stop: float
    steps: int

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps = {self.steps!r}; a ramp takes a whole number of steps from 1, e.g. 10_000")

    def at(self, step: int) -> float:
        return self.start + (self.stop - self.start) * min(1.0, step / self.steps)


class Step(nn.Module):
    """Forward *is* the loss: `loss, parts = step(x1, label=y)`.

    A wrapper such as DDP hooks the forward of the module it wraps; an objective calls the network several times, and
    outside such a forward the hooks would fire in the wrong order or not at all.

    network     an nn.Module
    objective   e.g. pfm.objectives.progressive
    prediction, interpolant, call    how the network is seen; as for pfm.FlowMap
    tangents    "float32": under autocast the evaluations that carry a tangent run in the precision of the weights,
                since a tangent in half precision is noise near the ends of time. "autocast": they run as the others
    options     further keywords of the objective; a weight that is a Module is registered and trained too; a `ramp`
                arrives as its value at the current step

    Returns the scalar loss with gradient and the parts to log: the unweighted error and the objective's own. The
    keywords `seed` and `sample_ids` are handed to the objective where given; `row_weight` (B,) scales each sample's
    loss in the mean, 0 leaves it out even where it is not finite, and adds parts["per_sample"], the (B,) losses.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Callable,
        *,
        prediction: str = "mean_velocity",
        interpolant: Any = None,
        call: Any = None,
        tangents: str = "float32",
        **options: Any,
    ):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {type(network).__name__}; Step trains an nn.Module")
        if not callable(objective):
            raise TypeError(
                f"objective is {type(objective).__name__}; pass a function such as pfm.objectives.progressive"
            )
        if tangents not in ("float32", "autocast"):
            raise ValueError(f'tangents = {tangents!r}; it is "float32" or "autocast"')
        self.network, self.objective, self.options = network, objective, options
        self.weight = options["weight"] if isinstance(options.get("weight"), nn.Module) else None
        path = Linear() if interpolant is None else interpolant
        view = FlowMap(network, prediction, path, call)  # bad views fail here, not in the first step
        self.view: dict[str, Any] = {"prediction": prediction, "interpolant": path, "call": view.call}
        self._inside = self.view | {"call": _exact_tangents(view.call) if tangents == "float32" else view.call}
        self.now = 0  # the step a ramp is read at; the Trainer sets it

    def flow_map(self, network: nn.Module | None = None) -> FlowMap:
        """The network, or another one such as its average, seen as it is trained: to sample from, or to save."""
        return FlowMap(self.network if network is None else network, **self.view)

    def takes(self, name: str) -> bool:
        """Whether the objective has the keyword `name`."""
        found = inspect.signature(self.objective).parameters
        return name in found or any(p.kind is p.VAR_KEYWORD for p in found.values())

    def forward(
        self,
        x1: Tensor,
        *,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
        row_weight: Tensor | None = None,
        **condition: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = {k: v.at(self.now) if isinstance(v, ramp) else v for k, v in self.options.items()}
        options |= {} if seed is None else {"seed": seed}
        options |= {} if sample_ids is None else {"sample_ids": sample_ids}
        loss = self.objective(FlowMap(self.network, **self._inside), x1, condition=condition, **options)
        if row_weight is None:
            return loss.mean(), {"error": loss.raw_error.mean(), **loss.parts}
        rows = loss.per_sample.shape
        if row_weight.shape != rows:
            raise ValueError(
                f"row_weight has shape {tuple(row_weight.shape)} but the objective gave losses {tuple(rows)}"
            )
        weighted, error = (
            (torch.where(row_weight > 0, each, 0.0) * row_weight).mean() for each in (loss.per_sample, loss.raw_error)
        )
        return weighted, {"error": error, **loss.parts, "per_sample": loss.per_sample.detach()}


class _exact_tangents:
    """A call whose evaluations of a Dual are outside autocast."""

    def __init__(self, call: Callable):
        self.inner = call

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set, e.g. while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)  # two_times, reverses_time, check

    def __call__(self, network: Callable, x: Any, s: Any, t: Any, condition: Any) -> Any:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and any(is_dual(each) for each in (x, s, t)):
            with torch.autocast(kind, enabled=False):
                return self.inner(network, x, s, t, condition)
        return self.inner(network, x, s, t, condition)
