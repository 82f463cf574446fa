"""The module that DDP, FSDP2, torch.compile and GradScaler wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..flow_map import FlowMap
from ..interpolants import Linear

__all__ = ["Step"]


class Step(nn.Module):
    """Forward *is* the loss: `loss, parts = step(x1, label=y)`.

    A wrapper such as DDP hooks the forward of the module it wraps; an objective calls the network several times, and
    outside such a forward the hooks would fire in the wrong order or not at all.

    network     an nn.Module
    objective   e.g. pfm.objectives.progressive
    prediction, interpolant, call    how the network is seen; as for pfm.FlowMap
    options     further keywords of the objective; a weight that is a Module is registered and trained too

    Returns the scalar loss with gradient and the parts to log: the unweighted error and the objective's own.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Callable,
        *,
        prediction: str = "mean_velocity",
        interpolant: Any = None,
        call: Any = None,
        **options: Any,
    ):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {type(network).__name__}; Step trains an nn.Module")
        if not callable(objective):
            raise TypeError(
                f"objective is {type(objective).__name__}; pass a function such as pfm.objectives.progressive"
            )
        self.network, self.objective, self.options = network, objective, options
        self.weight = options["weight"] if isinstance(options.get("weight"), nn.Module) else None
        view = {"prediction": prediction, "call": call}
        self.view = {**view, "interpolant": Linear() if interpolant is None else interpolant}
        FlowMap(network, **self.view)  # bad views fail here, not in the first step

    def forward(self, x1: Tensor, **condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.objective(FlowMap(self.network, **self.view), x1, condition=condition, **self.options)
        return loss.mean(), {"error": loss.raw_error.mean(), **loss.parts}
