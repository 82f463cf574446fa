"""Exponential moving averages of a network's weights, several decays in one pass each."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributed import full, local

__all__ = ["EMA"]


class EMA:
    """shadow <- d shadow + (1 - d) weight,   d = min(decay, n r / (n r + 1)) at the n-th update, n from 0, r = `ramp`.

    The first update copies, and early weights are forgotten quickly. A shadow is float32 where the weights are of half
    precision: 1 - 0.9999 is below the resolution of bfloat16, in which the average would never move. float64 weights
    have float64 shadows. Weights without gradient are not averaged; buffers are those of the network.
    """

    def __init__(self, network: nn.Module, decays: Sequence[float] = (0.999, 0.9999), ramp: float = 0.1):
        for decay in decays:
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"ema = {decay}; a decay lies in [0, 1), e.g. 0.999")
        if len(set(decays)) < len(decays):
            raise ValueError(f"ema = {tuple(decays)}; each decay once")
        self.network, self.ramp, self.updates = network, ramp, 0
        self.weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shadows = {
            float(decay): {
                name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in self.weights.items()
            }
            for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        rate = self.updates * self.ramp
        rate = rate / (rate + 1.0)
        current = [local(p) for p in self.weights.values()]
        for decay, shadow in self.shadows.items():
            averaged = [local(x) for x in shadow.values()]
            now = [x if x.dtype == y.dtype else x.to(y.dtype) for x, y in zip(current, averaged, strict=True)]
            if averaged:
                torch._foreach_lerp_(averaged, now, 1.0 - min(decay, rate))
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """Every shadow by name, "0.999/body.0.weight"; the tensors themselves, to save or to load into."""
        return {f"{decay!r}/{name}": x for decay, shadow in self.shadows.items() for name, x in shadow.items()}

    @torch.no_grad()
    def averaged(self, decay: float, template: nn.Module | None = None) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode.

        `template` is an unsharded network of the same kind, for a sharded one, whose processes all must call this.
        """
        network = copy.deepcopy(self.network if template is None else template)
        own = dict(network.named_parameters())
        for name, x in self.shadows[decay].items():
            own[name].copy_(full(x))
        if template is not None:
            for name, p in self.network.named_parameters():
                if name not in self.weights:
                    own[name].copy_(full(p))
            buffers = dict(network.named_buffers())
            for name, b in self.network.named_buffers():
                buffers[name].copy_(full(b))
        return network.eval()
