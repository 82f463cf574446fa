"""`pyflowmap train NAME`: a training run from a recipe, resumed where it was stopped."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a flow map by a recipe: a shipped one, or a file of your own",
        description="A recipe is a small Python file: copy one from pyflowmap/recipes, edit it and name its path here. "
        "The file is run, so name only files that you trust. The same command again goes on from the latest "
        "checkpoint, to the same bits as a run that was never stopped; SIGTERM and Ctrl-C save and exit with 0. On "
        "several devices: torchrun --nproc_per_node 2 -m pyflowmap train ...",
    )
    parser.add_argument("recipe", nargs="?", help="a name of --list, path/to/recipe.py or path/to/recipe.py:Class")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings",
        help="change a field of the recipe; may be given several times",
    )  # fmt: skip
    parser.add_argument("--folder", default=None, help="where everything is written (default: runs/NAME)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="an error where the folder holds no checkpoint")
    start.add_argument("--fresh", action="store_true", help="start over; what is in the folder is moved aside")
    parser.add_argument("--list", action="store_true", help="show the shipped recipes and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from .. import recipes

    if args.list:
        print(_table())
        return
    if args.recipe is None:
        raise ValueError(f"name a recipe, {', '.join(recipes.named)}, or the path of a .py file; --list describes them")
    trainer: Any = None

    def stop(number: int, frame: Any) -> None:
        # While the Trainer's loop runs it has a handler of its own. Before, there is nothing to save.
        begun = trainer is not None and trainer.done > 0
        print("pyflowmap train: stopped" + ("" if begun else " before the first step"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + number if begun else 0)

    watch = threading.current_thread() is threading.main_thread()  # Python takes handlers nowhere else
    before = signal.signal(signal.SIGTERM, stop) if watch else None
    try:
        recipe = recipes.changed(recipes.load(args.recipe), args.settings)
        rank, _ = recipe.processes()
        folder = Path(args.folder or Path("runs") / _name(args.recipe))
        if args.resume and not _checkpoints(folder):
            raise FileNotFoundError(f"--resume: {folder} holds no checkpoint; name another --folder, or leave it out")
        if args.fresh and rank == 0:
            _move_aside(folder)
        try:
            trainer = recipe.trainer(folder)
        except NotImplementedError as error:  # a part that the recipe lacks
            raise TypeError(f"{args.recipe}: {error}") from error
        result = trainer.fit()
    finally:
        if watch:
            signal.signal(signal.SIGTERM, before)
    if result.stopped == "diverged":
        raise FloatingPointError(
            f"the raw error stayed above stop_above = {recipe.stop_above}; stopped at step {result.steps} of "
            f"{recipe.steps}: lower lr = {recipe.lr}"
        )
    if rank == 0:
        ended = {"done": "done", "seconds": f"{recipe.seconds} s are over", "signal": "stopped by a signal, and saved"}
        print(f"{folder}: step {result.steps} of {recipe.steps}, {ended[result.stopped]}")
        if result.stopped != "signal":
            print(_export(result, folder, args.recipe))


def _export(result: Any, folder: Path, recipe: str) -> str:
    """Write the last average as a flow map that pfm.load reads; what was done, as a line."""
    from ..flow_map import FlowMap

    network = list(result.ema.values())[-1] if result.ema else result.step.network
    view = dict(result.step.view)
    view["call"] = getattr(view["call"], "inner", view["call"])  # a Step may wrap it
    path = folder / "flow_map.safetensors"
    which = f"the average with decay {list(result.ema)[-1]}" if result.ema else "the last weights"
    try:
        FlowMap(network, **view).save(path, notes={"steps": result.steps})
    except TypeError as error:  # a network or a call that a file cannot name
        return f"{path} was not written: {error}"
    # A file names its network's class; one that a recipe defines is known once the recipe has been loaded.
    shipped = type(network).__module__.startswith("pyflowmap.nn.")
    return f"{path}: {which}; pfm.load reads it" + ("" if shipped else f" after pyflowmap.recipes.load({recipe!r})")


def _name(recipe: str) -> str:
    path, _, kind = recipe.partition(".py:")
    return Path(path).stem + (f"-{kind}" if kind else "")


def _checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def _move_aside(folder: Path) -> None:
    """runs/x to runs/x.old-1, or the next number that is free: nothing is deleted."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"--fresh: moved {folder} to {aside}")


def _table() -> str:
    from .. import recipes

    rows = [("recipe", "steps", "batch", "what it trains")]
    for name in recipes.named:
        recipe = recipes.load(name)
        rows.append((name, f"{recipe.steps:,}", f"{recipe.batch:,}", recipe.title()))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)
