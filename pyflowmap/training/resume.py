"""A Trainer's whole state as tensors and numbers, and back: what makes a killed run end with an unbroken one's bits."""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoints, optimizers, seeds

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["collected", "described", "load"]


# ---- the configuration ----------------------------------------------------------------------------------------------


def described(recipe: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The recipe's fields and the trainer's arguments as flat JSON: {"recipe.width": 64, "trainer.lr": 0.001}."""
    flat: dict[str, Any] = {}
    for prefix, fields in (("recipe", recipe), ("trainer", own)):
        for key, value in fields.items():
            _flatten(f"{prefix}.{key}", value, flat)
    return flat


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            _flatten(f"{name}.{key}", each, into)
    elif callable(value):
        into[name] = _called(value)
    else:
        if isinstance(value, Tensor):
            value = value.tolist()
        try:
            into[name] = json.loads(json.dumps(value, default=_plain))
        except (TypeError, ValueError):
            raise TypeError(
                f"configuration {name} is {type(value).__name__}; it is kept as JSON: numbers, text, lists, dicts"
            ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError


def _called(function: Any) -> str:
    """A function's name, with the arguments bound to it; an address would differ in each process."""
    if isinstance(function, functools.partial):
        bound = [_plain_text(x) for x in function.args]
        bound += [f"{key}={_plain_text(x)}" for key, x in sorted(function.keywords.items())]
        return f"{_called(function.func)}({', '.join(bound)})"
    name = getattr(function, "__qualname__", None)
    if name is None:  # an object with __call__; a dataclass shows its fields
        shown = repr(function)
        return type(function).__qualname__ if " at 0x" in shown else shown
    return f"{getattr(function, '__module__', '')}.{name}"


def _plain_text(value: Any) -> str:
    return _called(value) if callable(value) else repr(value)


def _compare(path: Path, there: Any, here: dict[str, Any]) -> None:
    if not isinstance(there, dict):
        raise ValueError(f"{path / 'state.json'} is damaged: it holds no configuration")
    differing = [
        f"{key} was {there.get(key, 'absent')!r} and is {here.get(key, 'absent')!r}"
        for key in sorted(there.keys() | here.keys())
        if key not in there or key not in here or there[key] != here[key]
    ]
    if differing:
        raise ValueError(
            f"{path} is of a run with another configuration: {'; '.join(differing)}; put that back, or choose another "
            "folder"
        )


# ---- saving ---------------------------------------------------------------------------------------------------------


def collected(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything with elements by name, and everything else as JSON. Every process calls it."""
    state_tensors, numbers = optimizers.state_of(trainer.optimizers, trainer.step)
    tensors = {**_live(trainer), **{f"optimizer/{name}": x for name, x in state_tensors.items()}}
    update = trainer.update
    state = {
        "position": trainer.stream.position,
        "ema_updates": trainer.ema.updates,
        "masked_rows": update.masked,
        "skipped_steps": update.skipped,
        "in_a_row": trainer.in_a_row,
        "above": trainer.above,
        "seconds": trainer.elapsed,
        "scaler": update.scaler.state_dict(),
        "optimizer": numbers,
        # Optimizers keep their counts on the host; they must come back to where they were.
        "on_host": [name for name, x in state_tensors.items() if x.device.type == "cpu"],
        "generators": trainer.distribution.gather(seeds.snapshot()),
        "configuration": trainer.configuration,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    return tensors, state


def _live(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, buffers and averages: the very tensors, to save from and to load into."""
    tensors = {f"step/{name}": x for name, x in trainer.step.state_dict().items() if isinstance(x, Tensor)}
    return tensors | {f"ema/{name}": x for name, x in trainer.ema.state().items()}


# ---- resuming -------------------------------------------------------------------------------------------------------


def load(trainer: Trainer) -> None:
    """Continue from the latest checkpoint in the trainer's folder, if there is one."""
    assert trainer.folder is not None
    folder, here = trainer.folder / "checkpoints", trainer.distribution
    error: Exception | None = None
    latest: Path | None = None
    if here.first:
        checkpoints.sweep(folder)
        error, latest = _latest(folder)
    here.together(error)
    latest = here.gather(latest)[0]
    if latest is None:
        return
    try:
        _load(trainer, latest)
    except (KeyError, TypeError, IndexError, AttributeError) as raised:
        raise ValueError(f"{latest / 'state.json'} is damaged: {type(raised).__name__} {raised}") from None


def _latest(folder: Path) -> tuple[Exception | None, Path | None]:
    there = checkpoints.found(folder)
    if not there:
        return None, None
    latest = there[-1][1]
    wrong = checkpoints.damage(latest)
    if wrong is None:
        return None, latest
    whole = next((path for _, path in reversed(there[:-1]) if checkpoints.damage(path) is None), None)
    cure = (
        f"the last whole one is {whole}: delete {latest} to resume from it"
        if whole
        else f"no other is whole: delete {folder} to start over"
    )
    return ValueError(f"{wrong}; {cure}"), None


def _load(trainer: Trainer, path: Path) -> None:
    state = checkpoints.read_state(path)
    _compare(path, state.get("configuration"), trainer.configuration)
    live, there = _live(trainer), checkpoints.layout(path)
    expected = {name: (tuple(x.shape), x.dtype) for name, x in live.items()}
    wrong = checkpoints.differing(expected, there, ("step/", "ema/"))
    if wrong is not None:
        raise ValueError(f"{path} does not fit this network: {wrong}; choose another folder")

    of_optimizer = _room(trainer, path, there, set(state["on_host"]))
    checkpoints.read_tensors(path, live | {f"optimizer/{name}": x for name, x in of_optimizer.items()})
    try:
        optimizers.read_state(trainer.optimizers, trainer.step, of_optimizer, state["optimizer"])
    except ValueError as error:
        raise ValueError(f"{path} does not fit this step: {error}") from None

    update, rank = trainer.update, trainer.distribution.rank
    trainer.ema.updates, update.masked, update.skipped = (
        int(state[key]) for key in ("ema_updates", "masked_rows", "skipped_steps")
    )
    trainer.done, trainer.in_a_row, trainer.above = (int(state[key]) for key in ("step", "in_a_row", "above"))
    trainer.elapsed, trainer.stream.position = float(state["seconds"]), int(state["position"])
    if update.scaler.is_enabled():
        update.scaler.load_state_dict(state["scaler"])
    # A process that was not there before starts generators of its own.
    if rank < len(state["generators"]):
        seeds.restore(state["generators"][rank])
    else:
        seeds.seed_all(seeds.mix(trainer.seed, rank, trainer.done))


def _room(trainer: Trainer, path: Path, there: checkpoints.Layout, on_host: set[str]) -> dict[str, Tensor]:
    """Empty tensors for the optimizer's state: sharded as the parameter where they have its shape."""
    parameters, room = dict(trainer.step.named_parameters()), {}
    for key, (shape, dtype) in there.items():
        if not key.startswith("optimizer/"):
            continue
        name = key.removeprefix("optimizer/")
        p = parameters.get(name.split("/", 1)[-1].rpartition("/")[0])
        if p is None:
            raise ValueError(f"{path} does not fit this step: {key!r} belongs to none of its parameters")
        if shape == tuple(p.shape) and not (name in on_host and p.device.type != "cpu"):
            room[name] = torch.empty_like(p, dtype=dtype, requires_grad=False)
        else:
            room[name] = torch.empty(shape, dtype=dtype, device="cpu" if name in on_host else p.device)
    return room
