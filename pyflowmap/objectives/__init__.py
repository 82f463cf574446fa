"""Ways of learning a flow map, one file each. Every objective is `objective(flow_map, x1, ...) -> Loss`."""

from .baked_guidance import baked_guidance
from .contrastive import contrastive
from .flow_matching import flow_matching
from .lagrangian import lagrangian
from .loss import Loss
from .mean_flow import mean_flow
from .posterior_augmented import posterior_augmented
from .progressive import progressive
from .shortcut import shortcut
from .velocity_contrastive import velocity_contrastive

__all__ = [
    "Loss",
    "baked_guidance",
    "contrastive",
    "flow_matching",
    "lagrangian",
    "mean_flow",
    "posterior_augmented",
    "progressive",
    "shortcut",
    "velocity_contrastive",
]
