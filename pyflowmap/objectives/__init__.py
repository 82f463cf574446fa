"""Ways of learning a flow map, one file each. Every objective is `objective(flow_map, x1, ...) -> Loss`."""

from .alpha_flow import alpha_flow, alpha_schedule
from .baked_guidance import baked_guidance
from .eulerian import eulerian
from .flow_matching import flow_matching
from .lagrangian import lagrangian
from .loss import Loss
from .mean_flow import mean_flow
from .progressive import progressive

__all__ = [
    "Loss",
    "alpha_flow",
    "alpha_schedule",
    "baked_guidance",
    "eulerian",
    "flow_matching",
    "lagrangian",
    "mean_flow",
    "progressive",
]
