"""Handwritten digits 28x28, class-conditional: minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pyflowmap as pfm
from pyflowmap.recipes import Recipe


@dataclass
class Digits(Recipe):
    """real digits 28x28 by class, a small U-Net or DiT, any from-scratch objective

    method         a name in pfm.objectives: progressive, lagrangian, mean_flow, flow_matching, ...
    backbone       "unet" starts from the exact flow map of a Gaussian with the data's mean and deviation; "dit" is a
                   transformer of 4x4 patches
    label_dropout  share of labels that are hidden in training, for classifier-free guidance
    """

    method: str = "progressive"
    backbone: str = "unet"
    channels: int = 16
    label_dropout: float = 0.1
    steps: int = 6000
    batch: int = 32
    lr: float = 2e-3
    betas: tuple[float, float] | None = (0.9, 0.99)
    warmup: int = 50
    ema: tuple[float, ...] = (0.999,)
    sample_every: int = 500

    def data(self):
        return pfm.data.digits()

    def network(self, data):
        if self.backbone == "unet":
            return pfm.nn.UNet(pfm.nn.UNetConfig(image=data.shape, channels=self.channels, labels=data.labels))
        if self.backbone == "dit":
            width = 8 * self.channels
            config = pfm.nn.DiTConfig(image=data.shape, patch=4, depth=6, width=width, heads=4, labels=data.labels)
            return pfm.nn.DiT(config)
        raise ValueError(f'backbone = {self.backbone!r}; it is "unet" or "dit"')

    def objective(self):
        return self.objective_named(self.method)

    def dropout(self, data):
        return {"label": (data.labels, self.label_dropout)} if self.label_dropout else {}

    def prepare(self, network, data):
        if isinstance(network, pfm.nn.UNet):
            network.fit(data.images.to(network.mean.device))

    def sample(self, flow_map, step):
        condition = {"label": (torch.arange(40) % 10).to(self.place())}
        return pfm.sample(flow_map, (40, *flow_map.network.config.image), steps=2, condition=condition, seed=0)
