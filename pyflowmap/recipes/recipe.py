"""What a recipe is: the numbers of a training run as fields, its parts as methods."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import objectives
from ..data import Stream
from ..flow_map import FlowMap
from ..training import Step
from .fits import check

__all__ = ["Recipe"]

# Fields that change nothing in the weights: a run may be resumed with others.
_ABOUT_THE_RUN = ("device", "distribution", "save_every", "keep", "log_every", "sample_every")
# The Trainer compares these itself, where they matter: a cosine depends on them, a constant rate does not.
_OF_THE_TRAINER = ("steps", "seconds")


@dataclass
class Recipe:
    """A training run in one file. To make one's own, copy a file of `pyflowmap/recipes` and edit it:

        pyflowmap train my_recipe.py --set batch=256 --folder runs/mine

    A subclass is a dataclass with further fields and four methods, `data`, `network`, `objective` and, where the
    defaults do not do, `options`, `dropout`, `prepare`, `sample`. Its docstring's first line is shown by --list.

    lr, optimizer, betas   "adamw", "radam" or "muon"; betas None: the Trainer's own
    schedule       "constant", "cosine" over the run, or "inverse_sqrt": lr / sqrt(max(step / decay_after, 1))
    warmup, clip   steps of a linear rise; the largest norm of the gradient
    ema            decays of the averaged weights; the last one is what `pyflowmap train` writes as flow_map.safetensors
    precision      "float32", or autocast to "bfloat16" or "float16"
    stop_above     the run ends where the raw error stays above it
    seconds        of wall clock, after which the run ends; the result then depends on the machine
    device         "auto": "cuda" where there is a GPU, else "cpu"; "cuda" is the GPU of LOCAL_RANK
    distribution   "auto": DDP under torchrun; or "none", "ddp", "fsdp"
    """

    steps: int = 10_000
    batch: int = 64
    lr: float = 1e-3
    optimizer: str = "adamw"
    betas: tuple[float, float] | None = None
    schedule: str = "cosine"
    decay_after: int = 35_000
    warmup: int = 0
    clip: float = 1.0
    ema: tuple[float, ...] = (0.999, 0.9999)
    precision: str = "float32"
    compile: bool = False
    seconds: float | None = None
    stop_above: float | None = None
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 50
    sample_every: int = 0
    device: str = "auto"
    distribution: str = "auto"

    # ---- what a recipe says ------------------------------------------------------------------------------------------

    def data(self) -> Any:
        """The data set, opened but not read."""
        raise NotImplementedError(f"{type(self).__name__} has no data(); return a set, e.g. pfm.data.digits()")

    def network(self, data: Any) -> nn.Module:
        """The network, for this set: data.shape and data.labels say what it takes."""
        raise NotImplementedError(f"{type(self).__name__} has no network(data); return an nn.Module")

    def objective(self) -> Callable:
        """A function such as pfm.objectives.progressive."""
        raise NotImplementedError(f"{type(self).__name__} has no objective(); return e.g. pfm.objectives.progressive")

    def options(self) -> dict[str, Any]:
        """Further keywords of the Step: the objective's (weight=, times=, ...), prediction=, call=, interpolant=."""
        return {}

    def dropout(self, data: Any) -> dict[str, tuple[Any, float]]:
        """Conditions that are replaced at random, {"label": (null, share)}: classifier-free guidance needs it."""
        return {}

    def prepare(self, network: nn.Module, data: Any) -> None:
        """Called once all parts are known to fit: what the network takes from the data before it is trained."""

    def sample(self, flow_map: FlowMap, step: int) -> torch.Tensor:
        """Pictures (N, C, H, W) in [-1, 1] of the averaged network, drawn every `sample_every` steps; 0: never."""
        raise NotImplementedError(f"{type(self).__name__} has no sample(flow_map, step); set sample_every=0")

    def title(self) -> str:
        """One line for `pyflowmap train --list`."""
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]

    # ---- what is made of it ------------------------------------------------------------------------------------------

    def step(self, data: Any) -> Step:
        """Network and objective as one module on the recipe's device, checked against the set."""
        torch.manual_seed(self.seed)
        network = self.network(data).to(self.place())
        step = Step(network, self.objective(), **self.options())
        check(step, data, self.dropout(data))
        return step

    def trainer(self, folder: str | Path | None = None, **options: Any) -> Any:
        """The Trainer of this run; `options` are further keywords of `pfm.training.Trainer`, and go before its own."""
        from ..training import Trainer

        rank, world = self.processes()
        data = self.data()
        step = self.step(data)
        self.prepare(step.network, data)
        stream = Stream(data, self.batch, seed=self.seed, rank=rank, world=world)
        return Trainer(step, stream, folder=folder, **{**self.trainer_options(data), **options})

    def trainer_options(self, data: Any) -> dict[str, Any]:
        """The recipe's fields as keywords of the Trainer."""
        from ..training import inverse_sqrt

        own = self.betas is not None
        return {
            "steps": self.steps,
            "optimizer": self._optimizer if own else self.optimizer,
            "lr": None if own else self.lr,
            "schedule": inverse_sqrt(after=self.decay_after) if self.schedule == "inverse_sqrt" else self.schedule,
            "warmup": self.warmup,
            "clip": self.clip,
            "ema": self.ema,
            "precision": self.precision,
            "dropout": self.dropout(data),
            "save_every": self.save_every,
            "keep": self.keep,
            "log_every": self.log_every,
            "compile": self.compile,
            "distribution": self._distribution(),
            "seed": self.seed,
            "seconds": self.seconds,
            "stop_above": self.stop_above,
            "configuration": self.configuration(),
            **({"sample_every": self.sample_every, "sample": self.sample} if self.sample_every else {}),
        }

    def configuration(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON has them: a run is resumed only with the same."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in _ABOUT_THE_RUN + _OF_THE_TRAINER}
        return {"recipe": type(self).__name__, **json.loads(json.dumps(fields, default=str))}

    def objective_named(self, name: str) -> Callable:
        """pfm.objectives.<name>; raises ValueError with those there are."""
        found = getattr(objectives, name, None)
        if not callable(found) or name not in objectives.__all__:
            raise ValueError(f"there is no objective {name!r}; there are {', '.join(_learnable())}")
        return found

    def place(self) -> torch.device:
        """The device of this process."""
        there = torch.cuda.is_available()
        if self.device == "auto" and not there:
            return torch.device("cpu")
        try:
            device = torch.device("cuda" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(f"device = {self.device!r} ({str(error).splitlines()[0]})") from None
        if device.type == "cuda" and not there:
            raise ValueError(f"device = {self.device!r}, but torch sees no CUDA device here; use auto or cpu")
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # one process, one GPU
        return device

    @staticmethod
    def processes() -> tuple[int, int]:
        """(rank, number of processes) as torchrun sets them; (0, 1) without."""
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def _distribution(self) -> str | None:
        if self.distribution == "auto":
            return "ddp" if self.processes()[1] > 1 else None
        return None if self.distribution == "none" else self.distribution

    def _optimizer(self, parameters: list) -> torch.optim.Optimizer:
        kinds: dict[str, Callable] = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
        if self.optimizer not in kinds:
            raise ValueError(f'optimizer = {self.optimizer!r} with betas = {self.betas}; it is "adamw" or "radam"')
        return kinds[self.optimizer](parameters, lr=self.lr, betas=self.betas, weight_decay=0.0)


def _learnable() -> list[str]:
    return [name for name in objectives.__all__ if callable(getattr(objectives, name)) and name != "Loss"]
