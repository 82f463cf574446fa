"""Training: a step whose forward is the loss, the Trainer, and a small loop."""

from .ema import EMA
from .optimizers import inverse_sqrt
from .step import Step, ramp
from .trainer import Result, Trainer

__all__ = ["EMA", "Result", "Step", "Trainer", "inverse_sqrt", "ramp"]
