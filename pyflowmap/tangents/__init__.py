"""Dual numbers: any torch model's Jacobian-vector product at the price of two forwards, right or refused."""

from . import rules
from .call import call
from .check import check
from .compiler import teach_compiler
from .dual import Dual
from .functions import watch_functions
from .parts import primal, tangent
from .registry import Kind, MissingRule, rule
from .tensor_dual import TensorDual
from .verb import jvp

__all__ = ["Dual", "Kind", "MissingRule", "TensorDual", "call", "check", "jvp", "primal", "rule", "rules", "tangent"]

watch_functions()
teach_compiler()
