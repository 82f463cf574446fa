"""Optimizers of torch by name, the learning rate along a run, and their state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["build", "inverse_sqrt", "muon_names", "rate", "read_state", "state_of"]


def muon_names(network: nn.Module) -> set[str]:
    """The hidden matrices of a network: weights of its nn.Linear modules but the first and the last registered.

    Jordan et al. 2024 give Muon the hidden 2-D weights alone: the layers that touch data, embeddings, biases, norms
    and convolutions stay with AdamW.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return {f"{name}.weight" for name in linear[1:-1]}


def build(kind: str | Callable, step: Any, lr: float | None) -> list[Optimizer]:
    """The optimizers of `step`.

    "adamw"   AdamW, betas (0.9, 0.99), no weight decay
    "radam"   RAdam, betas (0.9, 0.99): its own warm-up
    "muon"    Muon for `muon_names(network)`, with the update's size matched to AdamW's so that one lr serves both, and
              AdamW as above for the rest
    callable  given the list of parameters, returns an optimizer or a list of them: any other setting
    """
    named = {name: p for name, p in step.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("the step has no parameter that requires a gradient; there is nothing to train")
    rate = 1e-3 if lr is None else lr
    if callable(kind):
        if lr is not None:
            raise ValueError(f"lr = {lr} and an optimizer of one's own, which has its own rate; leave lr away")
        made = kind(list(named.values()))
        made = list(made) if isinstance(made, (list, tuple)) else [made]
        for each in made:
            if not isinstance(each, Optimizer):
                raise TypeError(f"optimizer gave {type(each).__name__}; it returns a torch.optim.Optimizer")
    elif kind == "adamw":
        made = [_adamw(list(named.values()), rate)]
    elif kind == "radam":
        made = [torch.optim.RAdam(named.values(), lr=rate, betas=(0.9, 0.99))]
    elif kind == "muon":
        hidden = {f"network.{name}" for name in muon_names(step.network)} & named.keys()
        if not hidden:
            raise ValueError(
                'optimizer="muon" trains hidden matrices, and this network has none: no nn.Linear between its first '
                'and its last; use "adamw"'
            )
        matched = torch.optim.Muon(
            [named[name] for name in named if name in hidden], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        made = [matched, _adamw([p for name, p in named.items() if name not in hidden], rate)]
    else:
        raise ValueError(f'optimizer = {kind!r}; it is "adamw", "radam", "muon" or a function of the parameters')
    covered = {id(p) for each in made for group in each.param_groups for p in group["params"]}
    left_out = next((name for name, p in named.items() if id(p) not in covered), None)
    if left_out is not None:
        raise ValueError(f"the optimizer does not train {left_out!r}; freeze it with requires_grad_(False) or add it")
    for each in made:
        for group in each.param_groups:
            group["initial_lr"] = float(group["lr"])
    return made


def _adamw(parameters: list[Tensor], lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


# ---- the learning rate ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class inverse_sqrt:
    """1 until step `after`, then sqrt(after / step). Karras et al. 2024 (EDM2), eq. 67."""

    after: int

    def __post_init__(self):
        if self.after < 1:
            raise ValueError(f"after = {self.after}; the number of steps at the full rate, from 1")

    def __call__(self, step: int, progress: float) -> float:
        return math.sqrt(self.after / max(step, self.after))


def _constant(step: int, progress: float) -> float:
    return 1.0


def _cosine(step: int, progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def rate(schedule: str | Callable, warmup: int) -> Callable[[int, float], float]:
    """The factor on the learning rate at `step` (from 0) and `progress`, the share of the run that is done."""
    if schedule == "inverse_sqrt" and warmup < 1:
        raise ValueError(
            'schedule="inverse_sqrt" falls from the end of warmup, which is 0; give warmup=, or '
            "schedule=pfm.training.inverse_sqrt(after=35_000)"
        )
    named = {"constant": _constant, "cosine": _cosine}
    if schedule == "inverse_sqrt":
        law: Callable = inverse_sqrt(warmup)
    elif callable(schedule):
        law = schedule
    elif schedule in named:
        law = named[schedule]
    else:
        raise ValueError(
            f'schedule = {schedule!r}; it is "constant", "cosine", "inverse_sqrt" or a function of (step, progress)'
        )
    return lambda step, progress: law(step, progress) * min(1.0, (step + 1) / max(warmup, 1))


# ---- state by name --------------------------------------------------------------------------------------------------


def _names(step: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in step.named_parameters()}


def state_of(optimizers: list[Optimizer], step: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of every optimizer's state: "0/network.body.0.weight/exp_avg"."""
    names, tensors, numbers = _names(step), {}, {}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for key, value in state.items():
                name = f"{i}/{names[id(p)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                elif value is None or isinstance(value, (bool, int, float, str)):
                    numbers[name] = value
                else:
                    raise TypeError(
                        f"the optimizer keeps {key} = {type(value).__name__}; checkpoints hold tensors and numbers, "
                        "no others: use another optimizer, or train without folder="
                    )
    return tensors, numbers


def read_state(
    optimizers: list[Optimizer], step: nn.Module, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """The inverse of `state_of`. Names are checked before anything is changed."""
    parameters = dict(step.named_parameters())
    found: list[tuple[Optimizer, Tensor, str, Any]] = []
    for name, value in {**tensors, **numbers}.items():
        index, _, rest = name.partition("/")
        parameter, _, key = rest.rpartition("/")
        if not index.isdigit() or int(index) >= len(optimizers) or parameter not in parameters:
            raise ValueError(f"optimizer state {name!r} belongs to no parameter of this step")
        found.append((optimizers[int(index)], parameters[parameter], key, value))
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer, p, key, value in found:
        optimizer.state[p][key] = value
