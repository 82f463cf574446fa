"""FlowMap: a network seen as the solution operator X_{s,t}(x) = x + (t-s) u_{s,t}(x) of a generative ODE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import calls
from .algebra import Lazy, evaluate, lazy
from .interpolants import Interpolant, Linear, check_time
from .predictions import PREDICTIONS, jump_coefficients, leading, mean_velocity_coefficients, velocity_coefficients
from .tangents.parts import is_dual

__all__ = ["FlowMap"]


_OF_MODULES = ("eval", "train", "to", "cuda", "half", "bfloat16", "float", "double", "parameters", "named_parameters",
               "state_dict", "load_state_dict", "requires_grad_", "modules", "compile")  # fmt: skip


@dataclass(frozen=True)
class FlowMap:
    """A stateless view of a network: not a Module, so DDP, FSDP and checkpoint keys are untouched.

        X_{s,t}(x) = x + (t-s) u_{s,t}(x),      u_{t,t}(x) = v_t(x)

    network     any callable; its parameters stay its own
    prediction  what it returns: "mean_velocity" u_{s,t}, "velocity" v_t, "data" x1, "noise" x0, "ddpm_v" or "score".
                The last five see one time; their jump is one DDIM (exponential Euler) step.
    interpolant the path it was trained on; used to convert those five
    call        how it takes its times: a name in `pyflowmap.calls.ready` or `call(network, x, s, t, condition)`.
                Default: both ends for a mean velocity, the single time else.

    s is the time of `x`, t the time to go to; each is a float or a tensor of leading dimensions of `x`. Conditions go
    to the network by keyword. Paper: Boffi, Albergo & Vanden-Eijnden 2025, eq. 5.

    >>> decay = FlowMap(lambda x, s: -x, prediction="velocity")
    >>> decay.jump(torch.ones(1, 2), 0.0, 0.5)
    tensor([[0.5000, 0.5000]])
    """

    network: Callable
    prediction: str = "mean_velocity"
    interpolant: Interpolant = field(default_factory=Linear)
    call: Any = None

    def __post_init__(self):
        if not callable(self.network):
            raise TypeError(
                f"network is {type(self.network).__name__}, which cannot be called; pass a module or function"
            )
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {self.prediction!r}; it is one of {', '.join(PREDICTIONS)}")
        if not isinstance(self.interpolant, Interpolant):
            raise TypeError(f"interpolant = {self.interpolant!r}; pass an object such as pfm.interpolants.Linear()")
        call = self.call
        if call is None:
            call = "start_and_end" if self.prediction == "mean_velocity" else "single_time"
        if isinstance(call, str):
            if call not in calls.ready:
                raise ValueError(f"call = {call!r}; ready ones are {', '.join(calls.ready)}, or pass a function")
            call = calls.ready[call]
        if self.prediction == "mean_velocity" and not getattr(call, "two_times", True):
            raise ValueError(
                'prediction="mean_velocity" needs a call that passes both times, e.g. call="start_and_end"; '
                'a single-time network predicts "velocity"'
            )
        if hasattr(call, "check"):
            call.check(self.prediction, self.interpolant)
        object.__setattr__(self, "call", call)

    def __repr__(self) -> str:
        call = getattr(self.call, "name", None) or getattr(self.call, "__name__", type(self.call).__name__)
        network = getattr(self.network, "__name__", type(self.network).__name__)
        return f"FlowMap({network}, prediction={self.prediction!r}, interpolant={self.interpolant!r}, call={call!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a FlowMap is a view of a network: ask .jump(x, s, t), .mean_velocity(x, s, t) or .velocity(x, t), or call "
            ".network"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name in _OF_MODULES:
            raise AttributeError(f"a FlowMap is a view of a network, not a Module; use flow_map.network.{name}")
        raise AttributeError(f"'FlowMap' object has no attribute {name!r}")

    # ---- what one asks of it: tensors ---------------------------------------------------------------------------

    def jump(self, x: Tensor, s: float | Tensor, t: float | Tensor, **condition) -> Tensor:
        """X_{s,t}(x): one network evaluation, one launch. Shape and dtype of `x`."""
        return evaluate(self.lazy_jump(x, s, t, condition))

    def mean_velocity(self, x: Tensor, s: float | Tensor, t: float | Tensor, **condition) -> Tensor:
        """u_{s,t}(x) = (X_{s,t}(x) - x)/(t-s), and v_t(x) where s = t. Shape (B, ...)."""
        s, t = check_time(s, x, "s"), check_time(t, x, "t")
        output = self.output(x, s, t, condition)
        if self._is_velocity and self.sign > 0:
            return output
        return evaluate(self.as_mean_velocity(output, x, s, t))

    def velocity(self, x: Tensor, t: float | Tensor, **condition) -> Tensor:
        """v_t(x), the velocity of the ODE: the diagonal u_{t,t}. Shape (B, ...)."""
        t = check_time(t, x)
        output = self.output(x, t, t, condition)
        if self._is_velocity and self.sign > 0:
            return output
        return evaluate(self.as_velocity(output, x, t))

    # ---- the same, unevaluated: what samplers, guidance and objectives compose -----------------------------------

    def lazy_jump(self, x: Tensor, s, t, condition: Mapping[str, Any] = {}) -> Lazy:
        """X_{s,t}(x) as a combination of x and the network's output; the network has been called."""
        s, t = check_time(s, x, "s"), check_time(t, x, "t")
        return self.as_jump(self.output(x, s, t, condition), x, s, t)

    def output(self, x: Tensor, s, t, condition: Mapping[str, Any] = {}) -> Tensor:
        """The network's own prediction at (x, s, t). Float times become (B,) float32 tensors, float64 where x is."""
        s, t = leading(_time_tensor(s, x), _time_tensor(t, x))
        output = self.call(self.network, x, s, t, condition)
        if output.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; "
                "they must agree (a learned variance is cut off in call=)"
            )
        return output

    def as_velocity(self, output: Tensor, x: Tensor | Lazy, t) -> Lazy:
        return self._combine(velocity_coefficients(self.prediction, self.interpolant, t), output, x)

    def as_mean_velocity(self, output: Tensor, x: Tensor | Lazy, s, t) -> Lazy:
        return self._combine(mean_velocity_coefficients(self.prediction, self.interpolant, s, t), output, x)

    def as_jump(self, output: Tensor, x: Tensor | Lazy, s, t) -> Lazy:
        return self._combine(jump_coefficients(self.prediction, self.interpolant, s, t), output, x)

    def _combine(self, coefficients, output: Tensor, x: Tensor | Lazy) -> Lazy:
        c_x, c_p = coefficients
        prediction = (self.sign * c_p) * lazy(output)
        # A velocity needs no x: leave it out rather than read it with coefficient 0.
        return prediction if not isinstance(c_x, Tensor) and c_x == 0.0 else c_x * lazy(x) + prediction

    @property
    def _is_velocity(self) -> bool:
        return self.prediction in ("mean_velocity", "velocity")

    @property
    def sign(self) -> float:
        """What turns the network's output to this library's direction of time: -1 for a velocity from data to noise."""
        # Data, noise and score are the same in either direction of time; a velocity is not.
        return -1.0 if self._is_velocity and getattr(self.call, "reverses_time", False) else 1.0

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(
        self, path: str | Path, *, dtype: torch.dtype | None = None, notes: Mapping[str, Any] | None = None
    ) -> Path:
        """Write network and description to one safetensors file; see `pyflowmap.checkpoint.save`."""
        from .checkpoint import save

        return save(self, path, dtype=dtype, notes=notes)


def _time_tensor(t: Any, x: Tensor) -> Tensor:
    if isinstance(t, Tensor) or is_dual(t):
        return t.expand(x.shape[0]) if t.dim() == 0 else t
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), t, dtype=wide, device=x.device)
