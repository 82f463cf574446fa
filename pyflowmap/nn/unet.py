"""A small U-Net u(x, s, t, label) for images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

from .embedding import Embedding, zero
from .gaussian import gaussian_mean_velocity, spread
from .registry import check_range, register

__all__ = ["UNet", "UNetConfig"]


@dataclass(frozen=True)
class UNetConfig:
    image: tuple[int, int, int] = (1, 28, 28)  # channels, height, width
    channels: int = 16  # of the first level; a multiple of `groups`
    multipliers: tuple[int, ...] = (1, 2)  # of channels, per level; each further level halves the picture
    blocks: int = 2  # residual blocks per level
    patch: int = 2  # patch x patch pixels are folded into channels before the first level
    embedding: int = 128
    heads: int = 4  # of the attention at the coarsest level; 0: none
    groups: int = 8  # of the group norms
    labels: int = 10

    def __post_init__(self):
        check_range(
            self, image=(1, 8192), channels=(1, 4096), multipliers=(1, 64), blocks=(1, 64), patch=(1, 64),
            embedding=(1, 65536), heads=(0, 256), groups=(1, 256), labels=(0, 65536),
        )  # fmt: skip
        if len(self.image) != 3 or not 1 <= len(self.multipliers) <= 16:
            raise ValueError(
                f"UNetConfig.image = {self.image}, multipliers = {self.multipliers}; (C, H, W) and 1 to 16 levels"
            )
        fold = self.patch * 2 ** (len(self.multipliers) - 1)
        if self.image[1] % fold or self.image[2] % fold:
            raise ValueError(f"UNetConfig.image = {self.image}: height and width must be multiples of {fold} here")
        if self.channels % self.groups or (self.heads and self.channels * self.multipliers[-1] % self.heads):
            raise ValueError(
                f"UNetConfig.channels = {self.channels} must be a multiple of groups = {self.groups} and of heads"
            )


class _Block(nn.Module):
    """norm, silu, conv, norm, scale and shift by the embedding, silu, conv, added to the input."""

    def __init__(self, channels_in: int, channels: int, embedding: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        zero(self.conv2)  # every block starts as its skip

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(silu(self.norm1(x)))) * (1.0 + scale) + shift
        return self.skip(x) + self.conv2(silu(h))


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        attended = scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(attended)


@register(UNetConfig)
class UNet(nn.Module):
    """u(x, s, t) = Gaussian mean velocity + S * F(x / sd_s, s, t): the U-Net F learns what is not Gaussian.

    `fit(x1)` sets mean and deviation (per pixel) from the data; they are buffers and are saved with the weights.

    >>> UNet()(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.ones(2), torch.tensor([3, 10])).shape
    torch.Size([2, 1, 28, 28])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        c, e, g = config.channels, config.embedding, config.groups
        folded = config.image[0] * config.patch**2
        self.register_buffer("mean", torch.zeros(1, *config.image))
        self.register_buffer("std", torch.ones(1, *config.image))
        self.embedding = Embedding(e, config.labels)
        self.first = nn.Conv2d(folded, c * config.multipliers[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = [width := c * config.multipliers[0]]
        for level, multiplier in enumerate(config.multipliers):
            if level:
                self.down.append(nn.Conv2d(width, width := c * multiplier, 3, stride=2, padding=1))
                widths.append(width)
            for _ in range(config.blocks):
                self.down.append(_Block(width, width := c * multiplier, e, g))
                widths.append(width)
        self.middle1 = _Block(width, width, e, g)
        self.attention = _Attention(width, config.heads, g) if config.heads else nn.Identity()
        self.middle2 = _Block(width, width, e, g)
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.blocks + 1):
                self.up.append(_Block(width + widths.pop(), width := c * multiplier, e, g))
            if level:
                self.up.append(nn.Conv2d(width, width, 1))
        self.norm = nn.GroupNorm(g, width)
        self.last = nn.Conv2d(width, folded, 3, padding=1)
        zero(self.last)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions run about twice as fast so on CPUs

    def fit(self, x1: Tensor, floor: float = 0.1) -> UNet:
        """Set mean and deviation per pixel from data (N, C, H, W); deviations below `floor` are raised to it."""
        if tuple(x1.shape[1:]) != tuple(self.config.image):
            raise ValueError(
                f"x1 has shape {tuple(x1.shape)}; this network is for (N, {', '.join(map(str, self.config.image))})"
            )
        self.mean.copy_(x1.mean(0, keepdim=True))
        self.std.copy_(x1.std(0, keepdim=True).clamp(min=floor))
        return self

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != tuple(self.config.image):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network is for (B, {', '.join(map(str, self.config.image))})"
            )
        start, end = s[:, None, None, None], t[:, None, None, None]
        e = self.embedding(s, t, label)
        h = (x - start * self.mean) / spread(start, self.std.square().mean().sqrt())
        h = pixel_unshuffle(h, self.config.patch).contiguous(memory_format=torch.channels_last)
        h = self.first(h.to(self.first.weight.dtype))  # times are float32, so this may be wider than the network
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, _Block) else layer(h)
            skips.append(h)
        h = self.middle2(self.attention(self.middle1(h, e)), e)
        for layer in self.up:
            if isinstance(layer, _Block):
                h = layer(torch.cat([h, skips.pop()], 1), e)
            else:
                h = layer(interpolate(h, scale_factor=2.0, mode="nearest"))
        residual = pixel_shuffle(self.last(silu(self.norm(h))), self.config.patch).contiguous()
        result = gaussian_mean_velocity(x, start, end, self.mean, self.std) + self.std * residual
        return result.to(x.dtype)
