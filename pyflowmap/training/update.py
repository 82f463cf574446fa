"""One update: gradients of a batch, and what is done where they are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import Distribution, full
from .rows import drop, replaced
from .seeds import mix
from .step import Step

__all__ = ["PRECISIONS", "Taken", "Update"]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Taken:
    """An update: weighted loss, raw error and norm of the gradient over all processes; rows of the global batch and how
    many of them had a loss that is not finite; whether the weights changed; whether anything was not finite."""

    loss: float
    error: float
    norm: float
    rate: float
    rows: int
    bad: int
    updated: bool
    troubled: bool
    parts: dict[str, Tensor]
    extra: list[float]


class Update:
    """`update(step, progress, batch)`: batch to device, gradients, clipping, optimizer.

    The device is read once, after everything was queued: loss, error and norm in one message. Only where that message
    is not finite the batch is evaluated again, to find the samples to blame.
    """

    def __init__(
        self,
        step: Step,
        call: nn.Module,
        optimizers: list[Optimizer],
        distribution: Distribution,
        *,
        rate: Callable[[int, float], float],
        clip: float | None,
        precision: str,
        dropout: Mapping[str, tuple[Any, float]],
        on_nonfinite: str,
        seed: int,
    ):
        self.step, self.call, self.optimizers, self.distribution = step, call, optimizers, distribution
        self.rate, self.clip, self.dropout, self.on_nonfinite, self.seed = rate, clip, dropout, on_nonfinite, seed
        self.dtype = PRECISIONS[precision]
        self.parameters = [p for p in step.parameters() if p.requires_grad]
        self.device = distribution.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.takes = {name: step.takes(name) for name in ("seed", "sample_ids")}
        self.masked = self.skipped = 0

    def __call__(self, k: int, progress: float, batch: Any, extra: list[float]) -> Taken:
        x1, condition, ids = self._placed(batch, k)
        rate = self.rate(k, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["initial_lr"]
        self.step.now = k
        before = self._generators()
        parts, found = self._gradients(x1, condition, ids, k, None, extra)
        loss, error, norm, *extra = found
        rows, bad, masked = len(x1) * self.distribution.world, 0, False
        # Half precision overflows now and then: the scaler's business while it can still lower its factor.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1.0
        troubled = not (math.isfinite(loss) and math.isfinite(error) and math.isfinite(norm)) and not overflow
        if troubled:
            self._back(before)
            good = self._finite_rows(x1, condition, ids, k)
            [kept] = self.distribution.sum([good.sum()])
            bad = rows - int(kept)
            if self.on_nonfinite == "mask" and 0 < bad < rows:
                self._back(before)
                # Every process' mean is over its own rows, and the mean of those is taken: this makes it one mean.
                weight = good.to(torch.promote_types(x1.dtype, torch.float32)) * (rows / kept)
                x1 = replaced(x1, good)
                condition = {key: replaced(x, good) if _by_row(x, len(x1)) else x for key, x in condition.items()}
                ids = replaced(ids, good)
                parts, (loss, error, norm) = self._gradients(x1, condition, ids, k, weight, [])
                masked = all(map(math.isfinite, (loss, error, norm)))
        updated = not troubled or masked
        if updated:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update() if self.scaler.is_enabled() else None
        self.masked += bad if masked else 0
        self.skipped += not updated
        updated = updated and not (overflow and not math.isfinite(norm))
        lr = max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups)
        return Taken(loss, error, norm, lr, rows, bad, updated, troubled, parts, extra)

    # ---- the batch ---------------------------------------------------------------------------------------------------

    def _placed(self, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        condition = dict(batch.condition)
        ids = torch.as_tensor(batch.sample_ids, dtype=torch.int64)
        if self.dropout:
            total = len(batch.x1) * self.distribution.world
            condition = drop(condition, self.dropout, ids, total, mix(self.seed, k, 1))
        condition = {key: x.to(self.device, non_blocking=True) for key, x in condition.items()}
        return batch.x1.to(self.device, non_blocking=True), condition, ids.to(self.device, non_blocking=True)

    def _evaluate(self, x1: Tensor, condition: dict, ids: Tensor, k: int, row_weight: Tensor | None) -> Any:
        given: dict[str, Any] = {} if row_weight is None else {"row_weight": row_weight}
        if self.takes["seed"]:
            # Without sample ids equal seeds would draw equal noise in every process.
            rank = 0 if self.takes["sample_ids"] else self.distribution.rank
            given["seed"] = mix(self.seed, k, 0, rank)
        if self.takes["sample_ids"]:
            given["sample_ids"] = ids
        # No cache: in older torch (pytorch issue 158232) a cast made without gradient, for a teacher, is handed to the
        # student, who then does not learn.
        kind = self.device.type
        low = torch.autocast(kind, dtype=self.dtype, cache_enabled=False) if self.dtype is not None else nullcontext()
        with low:
            return self.call(x1, **given, **condition)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def _gradients(
        self, x1: Tensor, condition: dict, ids: Tensor, k: int, row_weight: Tensor | None, extra: list[float]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Gradients in the parameters, clipped; the objective's parts, and [loss, error, norm, *extra] of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss, parts = self._evaluate(x1, condition, ids, k, row_weight)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError("no parameter received a gradient; the objective's loss does not depend on the network")
        if self.clip is None:
            norm = nn.utils.get_total_norm(gradients)
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        parts = {name: x for name, x in parts.items() if name != "per_sample"}
        world = self.distribution.world
        means = [loss.detach() / world, parts["error"] / world, full(norm) / world]
        return parts, self.distribution.sum([*means, *extra])

    def _finite_rows(self, x1: Tensor, condition: dict, ids: Tensor, k: int) -> Tensor:
        if self.scaler.is_enabled():
            self.scaler.update()  # it refuses to look at the same optimizer's gradients twice in a step
        with torch.no_grad():
            _, parts = self._evaluate(x1, condition, ids, k, x1.new_ones(len(x1)))
        return parts["per_sample"].isfinite()

    # ---- the generators an evaluation draws from, to draw the same again ---------------------------------------------

    def _generators(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _back(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)


def _by_row(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows
