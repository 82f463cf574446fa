"""What the walk through the table of tangent rules visits: one use of one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    name: str  # "layer_norm: affine", unique
    function: Callable[..., Any]  # of tensors; returns a tensor, or a tuple or list of them
    arguments: Callable[[], tuple[Any, ...]]  # float64 primals, drawn from torch's seeded generator
    moves: tuple[int, ...] | None = None  # which arguments have tangents; None: every floating-point tensor
    func_jvp: bool = True  # torch.func.jvp can do it too, and is compared with
    random: bool = False  # draws random numbers: the generator is reset before each run
    second: bool = True  # is differentiated through the tangent as well
    compiled: bool = True  # torch.compile(fullgraph=True) takes it
    torch_error: float = 1e-11  # of torch.func.jvp in float64: some of its constants are float32 numbers
    rule: str = ""  # the row of the table in docs/; default: what stands before the ":" of the name


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5
