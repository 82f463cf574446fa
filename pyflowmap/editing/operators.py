"""What was measured of an image: linear operators A with their adjoints, and losses.

    forward(x)     A x
    adjoint(r)     A' r, the operator with <A x, r> = <x, A' r>
    norm_squared   the largest eigenvalue of A'A, or a bound above it: what makes a strength mean the same for all
    tight          whether A A' = norm_squared * identity, so that K gradient steps are one

An operator of one's own is any object with these four, or a `LinearOperator`, which fills in the last two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["LinearOperator", "Mask", "Blur", "Downsample", "Loss"]


class LinearOperator:
    """Two functions as an operator: `LinearOperator(forward, adjoint, norm_squared)`.

    >>> half = LinearOperator(lambda x: 0.5 * x, lambda r: 0.5 * r, norm_squared=0.25, tight=True)
    >>> half.forward(torch.ones(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    tight = False

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        norm_squared: float,
        tight: bool = False,
    ) -> None:
        if not (math.isfinite(norm_squared) and norm_squared > 0.0):
            raise ValueError(f"norm_squared = {norm_squared}; it is the largest eigenvalue of A'A, above 0")
        self.forward, self.adjoint, self.norm_squared, self.tight = forward, adjoint, float(norm_squared), tight


class Mask:
    """Inpainting: the loss 1/2 sum m (x - y)^2, m = 1 where y is known, 0 where it is to be filled in, or between.

    The measurement has the shape of x; where m = 0 its values do not matter, but they are finite.
    """

    def __init__(self, mask: Tensor) -> None:  # each dimension that of x or 1, e.g. (1, 1, H, W)
        if not isinstance(mask, Tensor) or mask.is_complex():
            raise TypeError(f"mask is {type(mask).__name__}; pass a real tensor, 1 = known, 0 = unknown")
        if mask.numel() == 0 or not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN fails too
            raise ValueError(f"mask {tuple(mask.shape)} has values outside [0, 1]; 1 = known, 0 = to be filled in")
        self.mask = mask

    def gain(self, strength: float, inner: int, dtype: torch.dtype) -> Tensor:
        """1 - (1 - strength m)^inner: what `inner` gradient steps take off the residual, elementwise."""
        m = self.mask.double()
        return (1.0 - (1.0 - strength * m) ** inner).to(dtype)


class Blur:
    """A x = x convolved with one kernel, channel by channel; outside the image is 0. x is (B, C, H, W).

    kernel: (k,), applied along both axes, or (k, l); odd sizes. Deblurring is an inverse problem whose high
    frequencies are lost: several inner steps help. norm_squared is (sum |kernel|)^2, a bound.

    >>> Blur(torch.tensor([0.25, 0.5, 0.25])).forward(torch.ones(1, 1, 3, 3))[0, 0, 1]
    tensor([0.7500, 1.0000, 0.7500])
    """

    tight = False

    def __init__(self, kernel: Tensor | Sequence[float]) -> None:
        kernel = torch.as_tensor(kernel, dtype=torch.float64)
        kernel = kernel if kernel.dim() == 2 else torch.outer(kernel, kernel) if kernel.dim() == 1 else kernel
        if kernel.dim() != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}; it is (k,) or (k, l), odd sizes, e.g. 3 or 5")
        self.norm_squared = float(kernel.abs().sum()) ** 2
        if not (math.isfinite(self.norm_squared) and self.norm_squared > 0.0):
            raise ValueError(f"kernel sums to {math.sqrt(self.norm_squared)} in absolute value; give finite numbers")
        self.kernel = kernel
        self._placed: dict[Any, Tensor] = {}

    @classmethod
    def gaussian(cls, std: float) -> Blur:
        """A Gaussian of `std` pixels, cut off at 3 std, of sum 1."""
        if not (math.isfinite(std) and std > 0.0):
            raise ValueError(f"std = {std}; it is a number of pixels, above 0")
        reach = math.ceil(3.0 * std)
        weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / std) ** 2)
        return cls(weight / weight.sum())

    def _run(self, convolve: Callable, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"Blur takes images (B, C, H, W), got shape {tuple(x.shape)}")
        channels, key = x.shape[1], (x.shape[1], x.dtype, x.device)
        if key not in self._placed:
            kernel = self.kernel.flip(0, 1).to(x)  # torch's convolution is a correlation
            self._placed[key] = kernel.expand(channels, 1, *kernel.shape).contiguous()
        padding = tuple(n // 2 for n in self.kernel.shape)
        return convolve(x, self._placed[key], padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(functional.conv2d, x)

    def adjoint(self, r: Tensor) -> Tensor:
        return self._run(functional.conv_transpose2d, r)


class Downsample:
    """A x = means over factor x factor blocks: super-resolution. x is (B, C, H, W), H and W multiples of the factor.

    A' spreads each number over its block, divided by factor^2. A A' = identity / factor^2, so K steps are one.

    >>> Downsample(2).forward(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
    tensor([[[[3.]]]])
    """

    tight = True

    def __init__(self, factor: int) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor = {factor!r}; it is a whole number of pixels, e.g. 2")
        self.factor, self.norm_squared = factor, 1.0 / factor**2

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"Downsample({self.factor}) takes images (B, C, H, W) with H and W multiples of {self.factor}, got "
                f"shape {tuple(x.shape)}"
            )
        return functional.avg_pool2d(x, self.factor)

    def adjoint(self, r: Tensor) -> Tensor:
        spread = (r / self.factor**2).repeat_interleave(self.factor, 2)
        return spread.repeat_interleave(self.factor, 3)


class Loss:
    """Any differentiable loss of the data prediction: `Loss(fn)`, fn(x1, measurement) -> (B,), one number per sample.

    Its gradient goes through fn and not through the network. There is no norm here, so the strength is the plain step
    size of gradient descent and depends on the scale of the loss: sum rather than average over pixels.
    """

    def __init__(self, fn: Callable[[Tensor, Any], Tensor]) -> None:
        if not callable(fn):
            raise TypeError(f"fn is {type(fn).__name__}; pass a function fn(x1, measurement) -> (B,)")
        self.fn = fn

    def gradient(self, x1: Tensor, measurement: Any) -> Tensor:
        # Autograd takes no tensor of inference mode: a copy outside of it is an ordinary one.
        with torch.inference_mode(False), torch.enable_grad():
            x1, measurement = (
                each.clone() if isinstance(each, Tensor) and each.is_inference() else each for each in (x1, measurement)
            )
            x1 = x1.detach().requires_grad_()
            value = self.fn(x1, measurement)
            if not isinstance(value, Tensor) or value.shape != x1.shape[:1]:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss returned {shown}; give one number per sample, ({x1.shape[0]},)")
            if not value.requires_grad:
                raise ValueError("the loss does not depend on x1 in a way that autograd sees; do not detach it")
            return torch.autograd.grad(value.sum(), x1)[0]
