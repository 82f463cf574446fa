"""Fused operations, one per kernel: checks, the direct road, the torch operator, autograd and forward-mode AD.

Every function here is right in eager mode, under autograd, `torch.func.jvp`, `torch.func.vmap` and
`torch.compile(fullgraph=True)`, and can be adopted alone.
"""

from pyflowmap.ops.combine import combine
from pyflowmap.reference import Combined, Noise

__all__ = ["Combined", "Noise", "combine"]
