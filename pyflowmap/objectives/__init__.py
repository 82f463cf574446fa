"""Ways of learning a flow map, one file each. Every objective is `objective(flow_map, x1, ...) -> Loss`."""

from .alpha_flow import alpha_flow, alpha_schedule
from .baked_guidance import baked_guidance
from .consistency import consistency
from .continuous_consistency import continuous_consistency
from .contrastive import contrastive
from .easy_consistency import easy_consistency
from .embedded_guidance import embedded_guidance
from .eulerian import eulerian
from .flow_matching import flow_matching
from .improved_mean_flow import improved_mean_flow
from .lagrangian import lagrangian
from .loss import Loss
from .mean_flow import mean_flow
from .posterior_augmented import posterior_augmented
from .progressive import progressive
from .shortcut import shortcut
from .velocity_contrastive import velocity_contrastive

__all__ = [
    "Loss",
    "alpha_flow",
    "alpha_schedule",
    "baked_guidance",
    "consistency",
    "continuous_consistency",
    "contrastive",
    "easy_consistency",
    "embedded_guidance",
    "eulerian",
    "flow_matching",
    "improved_mean_flow",
    "lagrangian",
    "mean_flow",
    "posterior_augmented",
    "progressive",
    "shortcut",
    "velocity_contrastive",
]
