"""Fused operations, one per kernel: checks, the direct road, the torch operator, autograd and forward-mode AD.

Every function here is right in eager mode, under autograd, `torch.func.jvp`, `torch.func.vmap` and
`torch.compile(fullgraph=True)`, and can be adopted alone.
"""

from pyflowmap.ops.activation import activation, gated_unit
from pyflowmap.ops.attention import attention
from pyflowmap.ops.combine import combine
from pyflowmap.ops.gated_residual import gated_residual
from pyflowmap.ops.norm_modulate import norm_modulate
from pyflowmap.ops.norm_rope import norm_rope
from pyflowmap.ops.time_embedding import time_embedding
from pyflowmap.reference import Combined, Noise

__all__ = [
    "Combined",
    "Noise",
    "activation",
    "attention",
    "combine",
    "gated_residual",
    "gated_unit",
    "norm_modulate",
    "norm_rope",
    "time_embedding",
]
