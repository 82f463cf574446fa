"""VeCoR: flow matching that is pushed away from velocities with their channels in the wrong order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import times as time_laws
from .. import weights
from ..flow_map import FlowMap
from .batch import check_inputs, draw_path
from .loss import Loss
from .negatives import permuted_channels, pushed_away

__all__ = ["velocity_contrastive"]

_mean_square = weights.constant()


def velocity_contrastive(
    flow_map: FlowMap,
    x1: Tensor,  # (B, C, ...) data
    *,
    x0: Tensor | None = None,  # (B, C, ...) noise; drawn in the kernel where not given
    condition: Mapping[str, Any] | None = None,
    times: Callable[..., Tensor] = time_laws.uniform,
    weight: Callable = _mean_square,
    strength: float = 0.05,
    negatives: int = 1,
    channel_dim: int = 1,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Loss:
    """|| v_t(x_t) - u ||^2 - strength sum_{k=1..K} || v_t(x_t) - u_k ||^2,   u = dx_t/dt, u_k its channels permuted.

    VeCoR, velocity contrastive regularisation. Squared norms, the sum over a sample, which `weight` turns into a mean.

    strength     lambda; the paper's 0.05. strength * negatives < 1, or the loss has no lower bound
    negatives    K, how many permutations, each drawn anew for each sample; the identity, 1 in C!, is among them
    channel_dim  the dimension of x1 whose entries are permuted: 1 for images (B, C, H, W) and latents, -1 for tokens
                 (B, N, C)
    weight       is given the square completed, (1 - K lambda) || v - (u - lambda sum u_k)/(1 - K lambda) ||^2: the same
                 gradient, never negative. The paper's own number is parts["flow_matching"] - K lambda
                 parts["negative"], mean squares both; it may be negative. `raw_error` is the plain || v - u ||^2

    The minimum is not the velocity: with mu the mean over channels of the exact v it is mu + (v - mu)/(1 - K lambda),
    contrast between channels enlarged, by 1.053 with the defaults. So a guidance scale that was tuned on plain flow
    matching is too large here, and likelihoods are off.

    One network evaluation. Use it with a backbone too small for its data (the paper's SiT-XL/2); where channels are
    exchangeable (noise-like latents) it does nothing but scale. With a seed, all that is drawn for a row depends on
    (seed, sample id) alone.
    Errors: TypeError, ValueError for data, one channel, and a strength out of range.
    """
    check_inputs(flow_map, x1, x0, weight)
    if isinstance(negatives, bool) or not isinstance(negatives, int) or negatives < 1:
        raise ValueError(f"negatives = {negatives!r}; it is a number of permutations, at least 1")
    if not (strength >= 0.0 and strength * negatives < 1.0):
        raise ValueError(
            f"strength = {strength} with negatives = {negatives}: the loss has no lower bound unless their product "
            "lies in [0, 1); the paper has 0.05 and 1"
        )
    if not -x1.dim() < channel_dim < x1.dim() or channel_dim == 0:
        raise ValueError(
            f"channel_dim = {channel_dim} is no dimension of a sample of x1 {tuple(x1.shape)}; e.g. 1 or -1"
        )
    if x1.shape[channel_dim] == 1:
        raise ValueError(
            f"x1 {tuple(x1.shape)} has one channel in dimension {channel_dim}: its permutation is itself; use "
            "flow_matching or contrastive"
        )
    batch = draw_path(flow_map, x1, x0, condition, times, seed, sample_ids)
    wrong = permuted_channels(batch.velocity, negatives, channel_dim % x1.dim(), seed, sample_ids)
    return pushed_away(flow_map, batch, wrong, strength, weight)
