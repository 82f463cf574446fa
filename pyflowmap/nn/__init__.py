"""Networks: small, readable, and rebuilt from their config when a file is loaded."""

from .dit import DiT, DiTBlock, DiTConfig
from .mlp import MLP, MLPConfig
from .positions import rope_2d, sincos_2d
from .registry import build, describe, register
from .unet import UNet, UNetConfig

__all__ = [
    "MLP",
    "MLPConfig",
    "UNet",
    "UNetConfig",
    "DiT",
    "DiTBlock",
    "DiTConfig",
    "rope_2d",
    "sincos_2d",
    "build",
    "describe",
    "register",
]
