"""Editing and restoring images with a trained model: no training, no inversion, no gradient through the network."""

from .flow_chef import flow_chef
from .flow_edit import flow_edit
from .operators import Blur, Downsample, LinearOperator, Loss, Mask

__all__ = ["flow_edit", "flow_chef", "LinearOperator", "Mask", "Blur", "Downsample", "Loss"]
