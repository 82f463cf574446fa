"""Ways of learning a flow map, one file each. Every objective is `objective(flow_map, x1, ...) -> Loss`."""

from .baked_guidance import baked_guidance
from .consistency import consistency
from .continuous_consistency import continuous_consistency
from .easy_consistency import easy_consistency
from .flow_matching import flow_matching
from .lagrangian import lagrangian
from .loss import Loss
from .mean_flow import mean_flow
from .progressive import progressive

__all__ = [
    "Loss",
    "baked_guidance",
    "consistency",
    "continuous_consistency",
    "easy_consistency",
    "flow_matching",
    "lagrangian",
    "mean_flow",
    "progressive",
]
