"""Training: a step whose forward is the loss, and a small loop."""

from .loop import ema_average, fit, shuffled
from .step import Step

__all__ = ["Step", "ema_average", "fit", "shuffled"]
