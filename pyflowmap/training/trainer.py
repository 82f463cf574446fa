"""The Trainer: a loop over steps, from a folder it can be killed in and resumed from bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import writable_folder
from ..flow_map import FlowMap
from . import checkpoints, optimizers, resume, seeds
from .distributed import Distribution
from .ema import EMA
from .logs import Log
from .rows import check_dropout
from .signals import Stop
from .step import Step
from .update import PRECISIONS, Update

__all__ = ["Result", "Trainer"]


@dataclass(frozen=True, eq=False)
class Result:
    """What a run leaves: the trained step, the averaged networks by decay, where its history is, and why it ended.

    stopped   "done" all steps, "seconds" the time was up, "signal" SIGTERM or SIGINT, "diverged" the raw error stayed
              above `stop_above`
    """

    step: Step
    ema: dict[float, nn.Module]
    history: Path | None
    stopped: str
    steps: int


class Trainer:
    """Trains a `Step` on a stream of batches.

    step, stream   the loss, and `pyflowmap.data.Stream`: an iterator of batches (x1, condition, sample_ids) with a
                   settable `position`, the number of batches drawn
    steps          updates in all, those before a resume included
    folder         where checkpoints, history and samples go; None writes nothing. If it holds a checkpoint the run
                   resumes from it, and ends with the bits of a run that was never stopped

    optimizer      "adamw", "radam", "muon" or a function of the list of parameters; see `optimizers.build`
    lr             default 1e-3; leave it away with an optimizer of one's own
    schedule       "constant", "cosine" (to 0), "inverse_sqrt" (from the end of warmup) or a function of (step,
                   progress), times a linear warm-up over `warmup` steps. progress is max(step/steps, time/seconds)
    clip           bound on the norm of the gradient of all parameters together; None: no bound
    ema            decays of averages of the network's weights; () for none
    precision      "float32": the weights' own, whatever it is. "bfloat16", "float16": autocast, the latter with a
                   scaled loss; `Step(tangents=)` says what holds for derivatives
    dropout        {key: (null, share)}: share of rows whose condition is replaced by null, for guidance
    save_every, keep   steps between checkpoints (one at the end always), and how many stay
    log_every      steps between records of history.jsonl: loss (weighted), error (raw, unweighted), the objective's
                   parts, rate, norm of the gradient, rows masked and steps skipped so far. With several processes the
                   parts are those of the first
    sample, sample_every   `sample(flow_map, step)` -> pictures (N, C, H, W) in [-1, 1], drawn from the first average,
                   or from the network where there is none; random numbers drawn there do not touch the training
    on_nonfinite   of a sample whose loss is not finite. "mask": the step is done again without it; the mean is over the
                   others, its gradient is exactly 0. Where no sample is to blame, or all are, the step is skipped.
                   "skip": the step is skipped. "raise": FloatingPointError at once
    patience       that many steps in a row, masked or skipped, raise FloatingPointError
    stop_above     the run ends, saving nothing more, where the raw error is above it `patience` steps in a row: a
                   learned weight can hide a divergence from the loss
    compile        torch.compile the network
    distribution   None, "ddp" or "fsdp", under torchrun. One process wrote a checkpoint or eight: any number resumes
    seed           of everything: a step's noise, times and dropped conditions are functions of (seed, step, sample id)
                   where the objective takes `seed` and `sample_ids`. Each process draws the network's own dropout
                   for itself
    seconds        of wall clock, those before a resume included; the result then depends on the machine
    configuration  a recipe's fields, any JSON: kept in the checkpoint, and a resume with others raises
    callback       called with each record

    Memory: weights, gradients, the optimizer's state, and one copy of the weights per average.
    """

    def __init__(
        self,
        step: Step,
        stream: Any,
        *,
        steps: int,
        folder: str | Path | None = None,
        optimizer: str | Callable = "adamw",
        lr: float | None = None,
        schedule: str | Callable = "constant",
        warmup: int = 0,
        clip: float | None = 1.0,
        ema: Sequence[float] = (0.999, 0.9999),
        precision: str = "float32",
        dropout: Mapping[str, tuple[Any, float]] = {},
        save_every: int = 1000,
        keep: int = 2,
        log_every: int = 10,
        sample: Callable[[FlowMap, int], Tensor] | None = None,
        sample_every: int = 1000,
        on_nonfinite: str = "mask",
        patience: int = 10,
        stop_above: float | None = None,
        compile: bool = False,
        distribution: str | None = None,
        progress: bool = True,
        seed: int = 0,
        seconds: float | None = None,
        configuration: Mapping[str, Any] = {},
        callback: Callable[[dict[str, Any]], None] | None = None,
    ):
        if not isinstance(step, Step):
            raise TypeError(f"step is {type(step).__name__}; wrap the network: pfm.training.Step(network, objective)")
        counts = {"steps": steps, "save_every": save_every, "keep": keep, "log_every": log_every}
        for name, value in {**counts, "sample_every": sample_every, "patience": patience}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}; a whole number from 1")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup = {warmup!r}; a number of steps from 0")
        bounds = {"lr": lr, "clip": clip, "seconds": seconds, "stop_above": stop_above}
        for name, bound in bounds.items():
            if bound is not None and not bound > 0.0:
                raise ValueError(f"{name} = {bound!r}; a positive number or None")
        if precision not in PRECISIONS:
            raise ValueError(f"precision = {precision!r}; it is one of {', '.join(PRECISIONS)}")
        if on_nonfinite not in ("mask", "skip", "raise"):
            raise ValueError(f'on_nonfinite = {on_nonfinite!r}; it is "mask", "skip" or "raise"')
        if "seed" in step.options or "sample_ids" in step.options:
            raise ValueError("the trainer gives each step its seed and sample ids; leave them out of Step's options")
        check_dropout(dropout)
        if distribution == "fsdp" and (precision == "float16" or optimizer == "muon"):
            asked = 'precision="float16"' if precision == "float16" else 'optimizer="muon"'
            raise ValueError(
                f'{asked} does not go with distribution="fsdp", whose parameters are in pieces; use '
                f'{"bfloat16" if precision == "float16" else "adamw"}, or distribution="ddp"'
            )
        self.step, self.stream, self.steps, self.seconds = step, stream, steps, seconds
        self.folder = None if folder is None else Path(folder)
        self.save_every, self.keep, self.log_every, self.sample_every = save_every, keep, log_every, sample_every
        self.patience, self.stop_above, self.seed = patience, stop_above, seed
        self.sample, self.callback, self.progress = sample, callback, progress
        rate = optimizers.rate(schedule, warmup)
        # A rate that does not depend on the run's length lets a run be continued with more steps.
        endless = schedule in ("constant", "inverse_sqrt") or isinstance(schedule, optimizers.inverse_sqrt)
        self.configuration = resume.described(
            dict(configuration),
            objective=step.objective,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            **({} if endless else {"steps": steps, "seconds": seconds}),
            warmup=warmup,
            clip=clip,
            ema=list(ema),
            precision=precision,
            dropout={key: list(value) for key, value in dropout.items()},
            on_nonfinite=on_nonfinite,
            seed=seed,
        )

        device = next((p.device for p in step.parameters()), torch.device("cpu"))
        self.distribution = Distribution(distribution, device)
        self._check_stream()
        call, self.template = self.distribution.wrap(step)
        if compile:
            step.network.compile()
        self.optimizers = optimizers.build(optimizer, step, lr)
        self.ema = EMA(step.network, ema)
        self.update = Update(
            step,
            call,
            self.optimizers,
            self.distribution,
            rate=rate,
            clip=clip,
            precision=precision,
            dropout=dropout,
            on_nonfinite=on_nonfinite,
            seed=seed,
        )
        self.done, self.in_a_row, self.above, self.elapsed = 0, 0, 0, 0.0

    def fit(self) -> Result:
        """Train to the end, or to a signal. Python's, numpy's and torch's global generators are left as they were."""
        outer = seeds.snapshot()
        try:
            with checkpoints.held(self.folder if self.distribution.first else None):
                return self._fit()
        finally:
            seeds.restore(outer)
            self.distribution.close()

    def _fit(self) -> Result:
        seeds.seed_all(seeds.mix(self.seed, self.distribution.rank))
        if self.folder is not None:
            resume.load(self)
        first = self.distribution.first
        self.log = Log(
            self.folder if first else None,
            self.done,
            self.steps,
            self.seconds,
            callback=self.callback if first else None,
            progress=self.progress and first,
        )
        modes = [(module, module.training) for module in self.step.modules()]
        self.step.train()
        try:
            with Stop() as stop:
                stopped = self._loop(stop)
        finally:
            for module, mode in modes:
                module.training = mode
            self.log.close()
        averages = {decay: self.ema.averaged(decay, self.template) for decay in self.ema.shadows}
        history = None if self.folder is None else self.folder / "history.jsonl"
        return Result(self.step, averages, history, stopped, self.done)

    def _loop(self, stop: Stop) -> str:
        saved, begin, elapsed = self.done, time.perf_counter() - self.elapsed, self.elapsed
        stopped = "done"
        while self.done < self.steps:
            done = self.done / self.steps
            if self.seconds is not None:
                done = max(done, elapsed / self.seconds)  # the first process' clock, so that all have one rate
                if done >= 1.0:
                    stopped = "seconds"
                    break
            batch = next(self.stream, None)
            if batch is None:
                raise ValueError(f"the stream ended after {self.done} of {self.steps} batches; it must not end")
            # The clock and the signals of the processes travel with the loss: one message a step.
            clock = time.perf_counter() - begin if self.distribution.first else 0.0
            taken = self.update(self.done, done, batch, extra=[clock, float(stop.asked)])
            elapsed, signals = taken.extra
            self.elapsed, self.done = elapsed, self.done + 1
            if taken.updated:
                self.ema.update()
            self._judge(taken)
            self._tell(taken)
            if self.stop_above is not None:
                self.above = self.above + 1 if not taken.error <= self.stop_above else 0
                if self.above >= self.patience:
                    return "diverged"
            if signals > 0 and self.done < self.steps:
                stopped = "signal"
                break
            if self.done % self.save_every == 0:
                self._save()
                saved = self.done
        if saved < self.done:
            self._save()
        return stopped

    # ---- after a step ------------------------------------------------------------------------------------------------

    def _judge(self, taken: Any) -> None:
        self.in_a_row = self.in_a_row + 1 if taken.troubled else 0
        if taken.troubled and (self.update.on_nonfinite == "raise" or self.in_a_row >= self.patience):
            raise FloatingPointError(
                f"step {self.done}: {taken.bad} of {taken.rows} samples have a loss that is not finite (loss "
                f"{taken.loss:g}, norm of the gradient {taken.norm:g}), {self.in_a_row} steps in a row; lower the "
                "rate, or look at the data"
            )

    def _tell(self, taken: Any) -> None:
        self.log.advance(self.done, self.elapsed, taken.loss, taken.error)
        if (self.done % self.log_every == 0 or self.done == self.steps) and self.distribution.first:
            parts = {name: float(x) for name, x in taken.parts.items()}
            record = {"step": self.done, "seconds": self.elapsed, "loss": taken.loss, "error": taken.error}
            record |= {"lr": taken.rate, "gradient_norm": taken.norm}
            record |= {"masked_rows": self.update.masked, "skipped_steps": self.update.skipped}
            self.log.record(record | {name: x for name, x in parts.items() if name not in record})
        if self.sample is not None and self.done % self.sample_every == 0:
            self._picture()

    def _picture(self) -> None:
        assert self.sample is not None
        before = seeds.snapshot()
        network: nn.Module = self.step.network
        decays = list(self.ema.shadows)
        if decays and (self.distribution.first or self.template is not None):
            network = self.ema.averaged(decays[0], self.template)
        elif self.template is not None:
            network = EMA(network, [0.0]).averaged(0.0, self.template)
        error = None
        if self.distribution.first:
            training = network.training
            try:
                with torch.no_grad():
                    self.log.picture(self.sample(self.step.flow_map(network.eval()), self.done), self.done)
            except Exception as raised:
                error = raised
            network.train(training)
        self.distribution.together(error)
        seeds.restore(before)

    # ---- files -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors, state = resume.collected(self)
        checkpoints.save(
            self.folder / "checkpoints", self.done, tensors, state, keep=self.keep, distribution=self.distribution
        )

    def _check_stream(self) -> None:
        here = self.distribution
        rank, world = getattr(self.stream, "rank", 0), getattr(self.stream, "world", 1)
        if (rank, world) != (here.rank, here.world):
            raise ValueError(
                f"the stream is that of process {rank} of {world}, this is {here.rank} of {here.world}; make it with "
                f"Stream(..., rank={here.rank}, world={here.world})"
            )
        if not hasattr(self.stream, "position"):
            raise TypeError(f"stream is {type(self.stream).__name__}; pass a pyflowmap.data.Stream: it has .position")
        if self.folder is not None and here.first:
            writable_folder(self.folder)
