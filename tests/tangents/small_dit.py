"""A small diffusion transformer in plain torch: what tests of compile, checkpoints, autocast and sharding wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["DiTBlock", "SmallDiT"]


class DiTBlock(nn.Module):
    """Norm, modulation, attention, gate; norm, modulation, GELU network, gate. Its condition is one row per sample."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, N, C = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + gate1 * self.out(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class SmallDiT(nn.Module):
    """u(x, s, t) for tokens x (B, N, channels) and times (B,): every parameter has a gradient in every call.

    around   what runs a block: `block(x, c)` itself, or within a checkpoint
    """

    def __init__(self, channels: int = 4, width: int = 16, heads: int = 2, depth: int = 2):
        super().__init__()
        self.into, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.times = nn.Linear(4, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.around: Callable[..., Any] = _plain

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        angles = torch.stack([s, t, (t - s).sin(), (t + s).cos()], dim=-1)
        c = self.times(angles)
        x = self.into(x)
        for block in self.blocks:
            x = self.around(block, x, c)
        return self.out(x)


def _plain(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    return block(x, c)


def checkpointed(block: Any, *args: Tensor) -> Any:
    """Non-reentrant: the only kind that FSDP2 and `torch.func` know."""
    return checkpoint(block, *args, use_reentrant=False)
