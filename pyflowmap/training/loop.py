"""A small training loop on one process: schedule, clipping, average of the weights, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .step import Step

__all__ = ["fit", "ema_average", "shuffled"]


def ema_average(decay: float = 0.999, ramp: float = 0.1) -> Callable:
    """`multi_avg_fn` of AveragedModel with decay min(decay, n / (n + 1/ramp)): early weights are forgotten quickly."""
    if not 0.0 <= decay < 1.0 or not ramp > 0.0:
        raise ValueError(f"decay = {decay}, ramp = {ramp}; decay lies in [0, 1), e.g. 0.999, and ramp is positive")

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, n * ramp / (n * ramp + 1.0)))

    return update


def shuffled(images: Tensor, labels: Tensor, batch: int, *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, reshuffled each epoch; the last, smaller one of an epoch is left out."""
    if not 1 <= batch <= len(images):
        raise ValueError(f"batch = {batch}; a whole number from 1 to the {len(images)} samples there are")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            if len(rows) == batch:
                yield images[rows], labels[rows]


def fit(
    step: Step,
    batches: Iterator[tuple[Tensor, Tensor]],  # (x1, label)
    *,
    steps: int,
    seconds: float = math.inf,
    lr: float = 2e-3,
    warmup: int = 50,
    clip: float = 1.0,
    label_dropout: float = 0.1,
    null_label: int | None = None,
    ema: float = 0.999,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
    patience: int = 5,
) -> nn.Module:
    """Train `step.network`; return the average of its weights (EMA), in evaluation mode.

    It ends after `steps` updates or `seconds` of wall clock, whichever comes first, and the learning rate follows a
    cosine in that progress, max(step/steps, elapsed/seconds): a slow machine anneals fully, only earlier. With
    `seconds` finite the result depends on the machine; with `seconds=inf` it depends on the seed alone.

    label_dropout  share of labels replaced by `null_label`, for classifier-free guidance
    callback       called each step with {"step", "seconds", "loss", "lr", "gradient_norm", "skipped", ...parts}

    A step whose loss or gradient is not finite is skipped and counted; `patience` in a row raise FloatingPointError.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or not seconds > 0.0:
        raise ValueError(f"steps = {steps!r}, seconds = {seconds!r}; both are positive, steps a whole number")
    if label_dropout > 0.0 and null_label is None:
        raise ValueError(f"label_dropout = {label_dropout} needs null_label, the class that means none, e.g. 10")
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)
    average = AveragedModel(step.network, multi_avg_fn=ema_average(ema), use_buffers=False)
    bar = None
    if progress:
        from tqdm.auto import tqdm

        # By progress, not by steps: the remaining time is then right when the wall clock ends the run.
        shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        bar = tqdm(total=100.0, desc="training", bar_format=shown)
    begin, skipped, in_a_row = time.perf_counter(), 0, 0
    step.train()
    try:
        for k in range(steps):
            elapsed = time.perf_counter() - begin
            done = max(k / steps, elapsed / seconds)
            if done >= 1.0:
                break
            rate = lr * min(1.0, (k + 1) / max(warmup, 1)) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * done)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            x1, label = next(batches)
            if label_dropout > 0.0:
                label = torch.where(
                    torch.rand(label.shape, device=label.device) < label_dropout, int(null_label or 0), label
                )
            loss, parts = step(x1, label=label)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(step.parameters(), clip)
            if not math.isfinite(float(loss.detach())) or not math.isfinite(float(norm)):
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if in_a_row >= patience:
                    raise FloatingPointError(
                        f"loss {float(loss.detach()):g} with gradient norm {float(norm):g} at step {k + 1}, "
                        f"the {in_a_row}th in a row that is not finite; lower lr = {lr:g} or look at the data"
                    )
                continue
            in_a_row = 0
            optimiser.step()
            average.update_parameters(step.network)
            if bar is not None:
                bar.set_postfix(step=k + 1, loss=f"{float(loss.detach()):.3f}", refresh=False)
                bar.update(100.0 * done - bar.n)
            if callback is not None:
                record = {
                    "step": k + 1,
                    "seconds": time.perf_counter() - begin,
                    "loss": float(loss.detach()),
                    "lr": rate,
                }
                record |= {"gradient_norm": float(norm), "skipped": skipped} | {n: float(v) for n, v in parts.items()}
                callback(record)
    finally:
        if bar is not None:
            bar.close()
    return average.module.eval()
