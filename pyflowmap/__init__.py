"""Fused kernels and exact JVPs for flow maps (MeanFlow, consistency, self-distillation): any torch model, your loop."""

import torch as _torch  # noqa: F401  first: the compiled module shares the OpenMP pool that torch has loaded

from pyflowmap import (
    coupling,
    data,
    editing,
    guidance,
    integrations,
    interpolants,
    nn,
    objectives,
    ops,
    schedules,
    solvers,
    tangents,
    times,
    training,
    weights,
)
from pyflowmap.algebra import Lazy, evaluate, inner, lazy, noise, per_sample
from pyflowmap.checkpoint import load
from pyflowmap.flow_map import FlowMap
from pyflowmap.installation import build_config
from pyflowmap.installation import version as _version
from pyflowmap.likelihood import log_likelihood
from pyflowmap.sampling import sample
from pyflowmap.tangents import Dual, jvp

__version__ = _version()

__all__ = [
    # the algebra
    "lazy",
    "noise",
    "evaluate",
    "inner",
    "per_sample",
    "Lazy",
    # derivatives
    "jvp",
    "Dual",
    "tangents",
    # fused operations
    "ops",
    # models
    "FlowMap",
    "load",
    "nn",
    "interpolants",
    "times",
    "weights",
    # generating
    "sample",
    "solvers",
    "schedules",
    "guidance",
    "log_likelihood",
    "editing",
    # learning
    "objectives",
    "coupling",
    "training",
    "data",
    # where users already are
    "integrations",
    # what is installed
    "build_config",
    "__version__",
]
