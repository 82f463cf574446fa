"""The checkerboard of "How to build a consistency model", with the paper's settings and each of its four objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyflowmap as pfm
from pyflowmap.recipes import Recipe

METHODS: dict[str, tuple[str, dict]] = {  # the paper's name -> (pyflowmap's objective, its options)
    "lsd": ("lagrangian", {}),
    "psd_m": ("progressive", {"split": "midpoint"}),
    "psd_u": ("progressive", {"split": "uniform"}),
    "esd": ("eulerian", {}),
}


@dataclass(frozen=True)
class PlainConfig:
    features: int = 2
    width: int = 512
    depth: int = 4  # square layers after the first

    def __post_init__(self):
        for name, top in (("features", 65536), ("width", 65536), ("depth", 256)):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= top:
                raise ValueError(f"PlainConfig.{name} = {getattr(self, name)!r}; a whole number from 1 to {top}")


@pfm.nn.register(PlainConfig)
class Plain(nn.Module):
    """u(x, s, t): a perceptron on [s, t, x]: a first layer, `depth` square ones, a last one; GELU (tanh form).

    Weights start as truncated normals of variance 1 / fan-in, biases at 0.
    """

    def __init__(self, config: PlainConfig = PlainConfig()):
        super().__init__()
        self.config = config
        widths = [config.features + 2, *[config.width] * (config.depth + 1)]
        layers: list[nn.Module] = []
        for inner, outer in zip(widths, widths[1:]):
            layers += [nn.Linear(inner, outer), nn.GELU("tanh")]
        self.layers = nn.Sequential(*layers, nn.Linear(config.width, config.features))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                # Cut off at two deviations a normal keeps 0.8796 of its own.
                std = layer.in_features**-0.5 / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=std, a=-2.0 * std, b=2.0 * std)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([s[:, None].to(x.dtype), t[:, None].to(x.dtype), x], 1))


@dataclass
class Checkerboard(Recipe):
    """2-D checkerboard by self-distillation: LSD, PSD-M, PSD-U or ESD, the settings of Boffi et al. 2025.

    3/4 of the rows are on the diagonal, sums of squares, no learned weight; RAdam with lr / sqrt(max(step / 35000, 1)),
    global norm clipped at 10, EMA .999 and .9999 (the paper evaluates the latter), 250,000 steps of 100,000 rows.

    The authors' network is sd F(s, t, x / sd) with base noise of deviation sd, the data's. Here the board is in
    units of its deviation (half = sqrt(3) instead of 1), which is the same after division by sd: noise and data have
    deviation 1 and the network is F itself. The loss is multiplied by sd^2 = 1/3 and thereby the paper's; the logged
    raw error is the mean square in these units. KL is the same in both. The paper stores 10^7 samples; here every
    sample is new.
    """

    method: str = "lsd"
    steps: int = 250_000
    batch: int = 100_000
    lr: float = 1e-3
    optimizer: str = "radam"
    betas: tuple[float, float] | None = (0.9, 0.999)
    schedule: str = "inverse_sqrt"
    decay_after: int = 35_000
    clip: float = 10.0
    ema: tuple[float, ...] = (0.999, 0.9999)
    diagonal: float = 0.75
    width: int = 512
    depth: int = 4
    save_every: int = 5_000

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}; it is one of {', '.join(METHODS)}")

    def title(self) -> str:
        return f"2-D checkerboard by {self.method.upper().replace('_', '-')}, the settings of Boffi et al. 2025"

    def data(self):
        return pfm.data.checkerboard(half=math.sqrt(3.0), seed=self.seed)

    def network(self, data):
        return Plain(PlainConfig(width=self.width, depth=self.depth))

    def objective(self):
        return self.objective_named(METHODS[self.method][0])

    def options(self):
        # Times sd^2 = 1/3, so that the loss, and with it the norm that is clipped, is the paper's.
        weight = pfm.weights.constant(1.0 / 3.0, norm="sum")
        return {"diagonal": self.diagonal, "weight": weight, **METHODS[self.method][1]}
