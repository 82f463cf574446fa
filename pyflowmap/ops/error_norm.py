"""`error_norm`: how large the error of a step is, in tolerances, per sample.

For the adaptive solvers. It is not among the functions of `pyflowmap.ops`, because it has no gradient: the lengths of
steps are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowmap import reference
from pyflowmap.ops.backend import module_for
from pyflowmap.ops.combine_roads import is_watched

__all__ = ["error_norm"]

_MOST_TERMS = 7


def error_norm(
    terms: Sequence[Tensor],  # up to 7, (B, ...)
    coefficients: Sequence[float],
    x: Tensor,  # (B, ...)
    y: Tensor,  # (B, ...)
    rtol: float,
    atol: float,
    factor: Tensor | None = None,  # (B,) float64
) -> Tensor:  # (B,)
    """sum_i (f sum_j c_j K_j / (atol + rtol max(|x|, |y|)))^2 over the elements i of each sample, one pass over memory.

    float32, float64 where any is. Where f is 0 the sum is 0, whatever the operands hold. No gradient. Raises ValueError
    where shapes differ or `atol` is not positive. Contract: csrc/error_norm/error_norm.h.

    >>> error_norm([torch.tensor([[3.0, 4.0]])], [2.0], torch.zeros(1, 2), torch.ones(1, 2), 1.0, 1.0)
    tensor([25.])
    """
    if not 0 < len(terms) == len(coefficients) <= _MOST_TERMS:
        raise ValueError(
            f"error_norm: {len(terms)} terms and {len(coefficients)} coefficients; one each, 1 to {_MOST_TERMS}"
        )
    for name, each in (("y", y), *((f"term {j}", each) for j, each in enumerate(terms))):
        if each.shape != x.shape:
            raise ValueError(
                f"error_norm: {name} has shape {tuple(each.shape)} but x has shape {tuple(x.shape)}; they must agree"
            )
    if x.dim() == 0 or (factor is not None and factor.shape != x.shape[:1]):
        raise ValueError(
            f"error_norm: x has shape {tuple(x.shape)}, the factor "
            f"{None if factor is None else tuple(factor.shape)}; they are (B, ...) and (B,)"
        )
    if not atol > 0.0:
        raise ValueError(f"error_norm: atol = {atol}; it is positive, the tolerance where the states are 0")
    with torch.no_grad():
        every = (x, y, *terms) if factor is None else (x, y, *terms, factor)
        plain = all(type(each) is Tensor or type(each) is torch.nn.Parameter for each in every)
        if not torch.compiler.is_compiling() and plain and x.numel() and not is_watched():
            wide = any(each.dtype == torch.float64 for each in (x, y, *terms))
            module = module_for(x.device, wide)
            if module is not None:
                return _run(module, every, tuple(coefficients), rtol, atol, factor, wide)
        return reference.error_norm(
            [each.detach() for each in terms], coefficients, x.detach(), y.detach(), rtol, atol, factor
        )


def _run(module, every, coefficients, rtol, atol, factor, wide):
    kind = torch.float64 if wide else torch.float32
    x = every[0]
    sums = torch.empty(x.shape[0], dtype=kind, device=x.device)
    states = every[: len(coefficients) + 2]
    if factor is not None:
        factor = factor.to(torch.float64).contiguous()
    if module.error_norm((*states, sums, factor), coefficients, rtol, atol):
        return sums
    # Another order in memory, another type beside float64, rows that are not dense: copies.
    states = tuple(each.resolve_neg().to(kind if wide else each.dtype).contiguous() for each in states)
    if module.error_norm((*states, sums, factor), coefficients, rtol, atol):
        return sums
    raise RuntimeError(f"error_norm: the kernel refused x of {x.dtype}, {tuple(x.shape)}; please report it")
