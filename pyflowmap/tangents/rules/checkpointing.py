"""Checkpoints in compiled code, where `torch.utils.checkpoint.checkpoint` is an operator of the compiler that is given
tensors: the parts of the Duals. (Elsewhere a checkpoint calls the function again, and that is all.)
"""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint

from ..registry import RULES, Kind, Rule

_OPTIONS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
_operator = torch.ops.higher_order.tag_activation_checkpoint


def _checkpoint(function, *args, **kwargs):
    options = {key: value for key, value in kwargs.items() if key in _OPTIONS}
    keywords = {key: value for key, value in kwargs.items() if key not in _OPTIONS}
    parts, spec = pytree.tree_flatten((args, keywords))

    def run(*parts):
        args, keywords = pytree.tree_unflatten(parts, spec)
        return function(*args, **keywords)

    return _operator(run, *parts, **options)


# The compiler looks a function up by what it was in Python.
RULES[torch.utils.checkpoint.checkpoint] = RULES[_operator] = Rule(Kind.COMPOSITE, _checkpoint)
