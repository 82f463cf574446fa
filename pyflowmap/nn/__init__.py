"""Networks: small, readable, and rebuilt from their config when a file is loaded."""

from .mlp import MLP, MLPConfig
from .registry import build, describe, register
from .unet import UNet, UNetConfig

__all__ = ["MLP", "MLPConfig", "UNet", "UNetConfig", "build", "describe", "register"]
