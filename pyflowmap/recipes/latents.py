"""Latents of any autoencoder, conditioned on classes, on masks, on both or on nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyflowmap as pfm
from pyflowmap.recipes import Recipe


@dataclass(frozen=True)
class MaskedDiTConfig(pfm.nn.DiTConfig):
    masks: int = 1  # channels of the mask


@pfm.nn.register(MaskedDiTConfig)
class MaskedDiT(nn.Module):
    """u(x, s, t, label, mask): a DiT sees the channels of x and of the mask, and x's of its output are kept.

    No mask is a mask of zeros.
    """

    def __init__(self, config: MaskedDiTConfig):
        super().__init__()
        self.config = config
        plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(pfm.nn.DiTConfig)}
        channels, height, width = config.image
        plain["image"] = (channels + config.masks, height, width)
        self.network = pfm.nn.DiT(pfm.nn.DiTConfig(**plain))

    def forward(
        self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        channels, height, width = self.config.image
        if mask is None:
            mask = torch.zeros(x.shape[0], self.config.masks, height, width, device=x.device)
        if tuple(mask.shape[1:]) != (self.config.masks, height, width):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; this network takes (B, {self.config.masks}, {height}, {width})"
            )
        return self.network(torch.cat([x, mask.to(x.dtype)], 1), s, t, label)[:, :channels]


@dataclass
class Latents(Recipe):
    """a latent store (--set path=...) of any autoencoder, by class and mask, a DiT with MeanFlow

    path     what pfm.data.write_latents wrote, or any store that pfm.data.latents reads
    scaled   True: by the store's own mean and deviation per channel; False: as stored
    dit      S, B, L or XL; tokens of patch x patch
    label_dropout, mask_dropout   shares that are hidden in training, for guidance; a hidden mask is 0

    Samples are latents: pfm.data.latents(path, ...).restore(x) is what the decoder takes.
    """

    path: str = ""
    scaled: bool = True
    method: str = "mean_flow"
    dit: str = "S"
    patch: int = 2
    label_dropout: float = 0.1
    mask_dropout: float = 0.1
    steps: int = 400_000
    batch: int = 256
    lr: float = 1e-4
    schedule: str = "constant"
    betas: tuple[float, float] | None = (0.9, 0.95)
    ema: tuple[float, ...] = (0.9999,)
    save_every: int = 5000

    def data(self):
        if not self.path:
            raise ValueError("path is empty; name the store that pfm.data.write_latents wrote: --set path=latents")
        how = "stored" if self.scaled else None
        return pfm.data.latents(self.path, mean=how or 0.0, std=how or 1.0)

    def network(self, data):
        if len(data.shape) != 3:
            raise ValueError(f"latents have shape {data.shape}; a DiT takes (C, H, W)")
        options = {"image": data.shape, "patch": self.patch, "labels": data.labels}
        if data.mask_shape is None:
            return pfm.nn.DiT(pfm.nn.DiTConfig.size(self.dit, **options))
        if len(data.mask_shape) != 3 or data.mask_shape[1:] != data.shape[1:]:
            raise ValueError(
                f"masks have shape {data.mask_shape} but latents {data.shape}; store masks (M, {data.shape[1]}, "
                f"{data.shape[2]}), or open the store with masks=False"
            )
        config = MaskedDiTConfig.size(self.dit, masks=data.mask_shape[0], **options)
        return MaskedDiT(config)  # type: ignore[arg-type]  # `size` is annotated with the plain config

    def objective(self):
        return self.objective_named(self.method)

    def dropout(self, data):
        null = {"label": (data.labels, self.label_dropout)} if data.labels and self.label_dropout else {}
        if data.mask_shape is not None and self.mask_dropout:
            null["mask"] = (0.0, self.mask_dropout)
        return null
