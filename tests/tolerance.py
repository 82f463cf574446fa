"""How far a kernel may be from the float64 reference: derived, not guessed.

A value that `operations` roundings with unit roundoff u = eps/2 lead to is off by at most (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1)

    |computed - exact| <= gamma(n) * magnitude + eps_s/2 * |exact| + tiny_s + noise,     gamma(n) = n u / (1 - n u)

where `magnitude` is the sum of the absolute values of the terms, eps_s and tiny_s belong to the storage type, and
`noise` is the absolute error of the normal numbers in it (float32 Box-Muller).
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMAL = 2e-6  # of one normal number against exact Box-Muller
# The longest chain of additions in a reduction. A lane of the CPU adds 512 / 16 numbers and folds 4 times; a thread of
# the GPU adds at most 1024 / 32 and folds 5 + 3 times; whatever is beyond is added in float64.
CHAIN = 64


def bound(
    exact: Tensor,
    magnitude: Tensor,
    operations: int,
    arithmetic: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
    normal: Tensor | float = 0.0,
) -> Tensor:
    """The largest error allowed in a result whose exact value is `exact`; `normal` multiplies noise, elementwise."""
    u = torch.finfo(arithmetic).eps / 2
    storage = storage or arithmetic
    info = torch.finfo(storage)
    allowed = operations * u / (1 - operations * u) * magnitude.double() + NORMAL * normal
    return allowed + (info.eps / 2) * (exact.double().abs() + allowed) + info.smallest_normal * info.eps


def assert_within(computed: Tensor, exact: Tensor, allowed: Tensor, what: str = "result") -> None:
    """Fails with the worst place; infinities and NaN must be in the same places."""
    assert computed.shape == exact.shape, f"{what}: shape {tuple(computed.shape)}, expected {tuple(exact.shape)}"
    computed, exact = computed.detach().double().cpu(), exact.detach().double().cpu()
    same = (computed == exact) | (computed.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (computed - exact).abs())
    bad = ~(error <= allowed.cpu())
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} numbers are off; first at {place}: {computed[place].item()!r}, "
            f"expected {exact[place].item()!r} within {allowed.expand(exact.shape)[place].item():.3g}"
        )
