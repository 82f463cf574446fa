"""A diffusion transformer u(x, s, t, label) for latents or pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import activation
from ..ops.attention import attention
from ..ops.gated_residual import gated_residual
from ..ops.norm_modulate import norm_modulate
from ..ops.norm_rope import norm_rope
from .embedding import Embedding, zero
from .positions import rope_2d, sincos_2d
from .registry import check_range, register

__all__ = ["DiT", "DiTBlock", "DiTConfig"]

SIZES = {  # depth, width, heads: Peebles & Xie 2023, table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclass(frozen=True)
class DiTConfig:
    image: tuple[int, int, int] = (4, 32, 32)  # channels, height, width; of latents or pixels
    patch: int = 2  # patch x patch pixels are one token
    depth: int = 12
    width: int = 384
    heads: int = 6
    mlp: int = 4  # hidden width of the MLPs over `width`
    positions: str = "rope"  # "rope", "learned" or "sincos"
    labels: int = 1000

    def __post_init__(self):
        check_range(
            self, image=(1, 8192), patch=(1, 1024), depth=(1, 256), width=(4, 65536), heads=(1, 1024), mlp=(1, 64),
            labels=(0, 65536),
        )  # fmt: skip
        if len(self.image) != 3 or self.image[1] % self.patch or self.image[2] % self.patch:
            raise ValueError(
                f"DiTConfig.image = {self.image}, patch = {self.patch}; (C, H, W) with H and W multiples of the patch"
            )
        if self.width % self.heads or (self.width // self.heads) % 4 or self.width % 4:
            raise ValueError(
                f"DiTConfig.width = {self.width}, heads = {self.heads}; channels per head are a multiple of 4, e.g. 64"
            )
        if self.positions not in ("rope", "learned", "sincos"):
            raise ValueError(f'DiTConfig.positions = {self.positions!r}; it is "rope", "learned" or "sincos"')

    @classmethod
    def size(cls, name: str, **options: Any) -> DiTConfig:
        """A size of the literature, S 12 x 384, B 12 x 768, L 24 x 1024 or XL 28 x 1152 (depth x width).

        >>> DiTConfig.size("S", patch=2, image=(4, 32, 32)).heads
        6
        """
        if name not in SIZES:
            raise ValueError(f"DiTConfig.size: name = {name!r}; it is one of {', '.join(SIZES)}")
        depth, width, heads = SIZES[name]
        return cls(**{"depth": depth, "width": width, "heads": heads, **options})


class DiTBlock(nn.Module):
    """Attention and an MLP, each entered by a modulated norm and left by a gate; it starts as the identity."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.Parameter(torch.ones(width // heads))
        self.key_norm = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, mlp * width)
        self.down = nn.Linear(mlp * width, width)

    def forward(self, x: Tensor, e: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        b, n, width = x.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(e).chunk(6, -1)
        qkv = self.qkv(norm_modulate(x, scale, shift))
        q, k, v = qkv.reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = norm_rope(q, self.query_norm, cos, sin), norm_rope(k, self.key_norm, cos, sin)
        attended = attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = gated_residual(x, gate, self.out(attended))
        h = self.up(norm_modulate(x, mlp_scale, mlp_shift))
        return gated_residual(x, mlp_gate, self.down(activation(h, "gelu_tanh")))


@register(DiTConfig)
class DiT(nn.Module):
    """Peebles & Xie 2023, adaLN-zero, with two times: u(x, s, t, label), tokens of patch x patch pixels.

    s and t - s are embedded with float32 angles, summed with the label (index `labels` means none), and modulate every
    block; queries and keys are normalised per head. The last layer starts at zero, so an untrained map is the identity.

        block(x):  x + a * attention(n(x) (1 + b) + c),  then  x + a' * mlp(n(x) (1 + b') + c'),   (a, b, c, ...) = W e

    Raises ValueError for pictures of another shape than the config's.

    >>> network = DiT(DiTConfig(image=(3, 8, 8), depth=1, width=32, heads=2, labels=10))
    >>> network(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.ones(2), torch.tensor([3, 10])).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, config: DiTConfig = DiTConfig()):
        super().__init__()
        self.config = config
        channels, height, width = config.image
        self.grid = (height // config.patch, width // config.patch)
        folded = channels * config.patch**2
        self.embedding = Embedding(config.width, config.labels)
        self.first = nn.Linear(folded, config.width)
        blocks = [DiTBlock(config.width, config.heads, config.mlp) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.modulate = nn.Linear(config.width, 2 * config.width)
        self.last = nn.Linear(config.width, folded)
        for module in (self.first, *self.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in blocks:
            zero(block.modulate)
        zero(self.modulate)
        zero(self.last)
        self.position: nn.Parameter | None = None
        if config.positions == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], config.width))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != tuple(self.config.image):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network is for (B, {', '.join(map(str, self.config.image))})"
            )
        e = self.embedding(s, t, label)
        h = self.first(self._tokens(x))
        cos = sin = None
        if self.config.positions == "rope":
            # Not a buffer: angles stay float32 when the network is cast.
            cos, sin = rope_2d(*self.grid, self.config.width // self.config.heads, device=x.device)
        elif self.position is not None:
            h = h + self.position
        else:
            h = h + sincos_2d(*self.grid, self.config.width, device=x.device).to(h.dtype)
        for block in self.blocks:
            h = block(h, e, cos, sin)
        shift, scale = self.modulate(e).chunk(2, -1)
        return self._picture(self.last(norm_modulate(h, scale, shift)))

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, tokens, C * patch * patch)."""
        (rows, columns), p = self.grid, self.config.patch
        b, c = x.shape[:2]
        return x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)

    def _picture(self, h: Tensor) -> Tensor:
        """The inverse of `_tokens`."""
        (rows, columns), p = self.grid, self.config.patch
        b, c = h.shape[0], self.config.image[0]
        return h.reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * p, columns * p)
