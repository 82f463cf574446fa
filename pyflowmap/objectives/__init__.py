"""Ways of learning a flow map, one file each. Every objective is `objective(flow_map, x1, ...) -> Loss`."""

from .flow_matching import flow_matching
from .loss import Loss
from .progressive import progressive

__all__ = ["Loss", "flow_matching", "progressive"]
