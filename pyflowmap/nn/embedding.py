"""Two times and a class label as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.time_embedding import time_embedding
from ..tangents.parts import is_dual

__all__ = ["Embedding", "sinusoidal", "zero"]


def sinusoidal(t: Tensor, channels: int, highest: float = 100.0, lowest: float = 0.1) -> Tensor:
    """[cos(w t), sin(w t)] with frequencies w from `highest` to `lowest`, geometric. (B,) -> (B, channels), float32.

    The angles are float32 whatever the network's dtype: in bfloat16 w t is off by up to 0.4 radians at w = 100. The
    highest frequency also scales every time derivative of the network, so it is kept small: 1000 ruins JVP objectives.
    """
    angle = t.float()[:, None] * _frequencies(channels // 2, t.device, highest, lowest)
    return torch.cat([angle.cos(), angle.sin()], 1)


def _frequencies(count: int, device: torch.device, highest: float = 100.0, lowest: float = 0.1) -> Tensor:
    exponent = torch.arange(count, device=device, dtype=torch.float32) / max(count - 1, 1)
    return highest * torch.exp(exponent * math.log(lowest / highest))


def zero(layer: nn.Module) -> nn.Module:
    """Set every parameter of `layer` to 0: a residual branch that ends in it starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Embedding(nn.Module):
    """e = W silu(W_s f(s) + W_d f(t - s) + E[label]), then silu: (B, channels).

    The network sees s and the span t - s (Boffi et al. 2025): on the diagonal the second is a constant.
    `labels` classes, and one more, index `labels`, that means "no label".
    """

    def __init__(self, channels: int, labels: int, time_channels: int = 64):
        super().__init__()
        self.labels, self.time_channels = labels, time_channels
        self.start = nn.Linear(time_channels, channels)
        self.span = nn.Linear(time_channels, channels, bias=False)
        self.label = nn.Embedding(labels + 1, channels) if labels else None
        self.mix = nn.Linear(channels, channels)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.5)

    def forward(self, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        for name, time in (("s", s), ("t", t)):
            if not (isinstance(time, Tensor) or is_dual(time)) or time.dim() != 1:
                shown = f"has shape {tuple(time.shape)}" if hasattr(time, "shape") else f"is {time!r}"
                raise ValueError(
                    f"the time {name} {shown}; a network takes one time per sample, (B,), e.g. torch.full((B,), 0.5); "
                    "pfm.FlowMap(network) takes numbers"
                )
        dtype = self.start.weight.dtype
        # Not a buffer: frequencies stay float32 when the network is cast.
        times = time_embedding(s, t, _frequencies(self.time_channels // 2, s.device), dtype=dtype)
        start, span = times.chunk(2, 1)  # each as `sinusoidal` makes it
        e = self.start(start) + self.span(span)
        if self.label is not None:
            if label is None:
                label = torch.full(s.shape, self.labels, device=s.device)
            e = e + self.label(label)
        elif label is not None:
            raise ValueError("label given to a network built without labels; set labels= in its config")
        silu = torch.nn.functional.silu
        return silu(self.mix(silu(e)))
