"""A folder of one's own pictures, class-conditional where it has sub-folders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import pyflowmap as pfm
from pyflowmap.recipes import Recipe


@dataclass
class ImageFolder(Recipe):
    """one's own pictures (--set path=...), classes from sub-folders, a U-Net or DiT on pixels

    path         the folder; pfm.data.image_folder says what it may hold
    size         pixels, height and width; a multiple of 8 for the U-Net, of `patch` for the DiT
    on_damaged   "raise" or "skip"
    backbone     "unet" (levels of `width`, 2 and 4 times as many channels) or "dit" (a size of the literature)
    """

    path: str = ""
    size: int = 64
    channels: int = 3
    on_damaged: str = "raise"
    method: str = "progressive"
    backbone: str = "unet"
    width: int = 64
    dit: str = "S"
    patch: int = 4
    label_dropout: float = 0.1
    steps: int = 200_000
    batch: int = 64
    lr: float = 2e-4
    warmup: int = 1000
    sample_every: int = 2000

    def data(self):
        if not self.path:
            raise ValueError("path is empty; name the folder of pictures: --set path=/where/they/are")
        return pfm.data.image_folder(self.path, self.size, channels=self.channels, on_damaged=self.on_damaged)

    def network(self, data):
        if self.backbone == "unet":
            config = pfm.nn.UNetConfig(
                image=data.shape,
                channels=self.width,
                multipliers=(1, 2, 4),
                embedding=4 * self.width,
                labels=data.labels,
            )
            return pfm.nn.UNet(config)
        if self.backbone == "dit":
            return pfm.nn.DiT(pfm.nn.DiTConfig.size(self.dit, image=data.shape, patch=self.patch, labels=data.labels))
        raise ValueError(f'backbone = {self.backbone!r}; it is "unet" or "dit"')

    def objective(self):
        return self.objective_named(self.method)

    def dropout(self, data):
        return {"label": (data.labels, self.label_dropout)} if data.labels and self.label_dropout else {}

    def prepare(self, network, data):
        if isinstance(network, pfm.nn.UNet):  # its mean and deviation, from up to 1,000 pictures spread over the set
            rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), 1000)).astype(np.int64))
            if len(rows) > 1:
                network.fit(data.batch(rows)[0].to(network.mean.device))

    def sample(self, flow_map, step):
        config = flow_map.network.config
        labels = config.labels
        condition = {"label": (torch.arange(16) % labels).to(self.place())} if labels else None
        return pfm.sample(flow_map, (16, *config.image), steps=2, condition=condition, seed=0)
