"""`pyflowmap sample digits --steps 2 --out grid.png`: pictures, or any number of samples, from a flow map in a file."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="sample a shipped or saved flow map into a picture, or into a file of tensors",
        description="A .png is a grid of pictures. A .safetensors file or a folder takes any number of samples: made "
        "in batches, by any number of processes (torchrun --nproc_per_node 4 -m pyflowmap sample ...), and after an "
        "interruption the same command goes on. The samples are the same bits in each case.",
    )
    parser.add_argument("model", help='"digits" or the path of a .safetensors file')
    parser.add_argument("--steps", type=int, default=None, help="(default: 2; solvers that choose their own: none)")
    parser.add_argument("--out", default="grid.png", help=".png, .safetensors or a folder (default: %(default)s)")
    parser.add_argument("--solver", default="flow_map", help="a name in pyflowmap.solvers.named (default: %(default)s)")
    parser.add_argument("--count", type=int, default=40, help="samples (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (default: %(default)s)")
    parser.add_argument("--label", type=int, default=None, help="draw this class only (default: all in turn)")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="scale of classifier-free guidance; 1: none (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help='"cuda" takes the device of LOCAL_RANK (default: %(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import load
    from ..files import writable_folder
    from .shards import world

    for name, value in (("count", args.count), ("batch", args.batch)):
        if value < 1:
            raise ValueError(f"--{name} {value}; at least 1")
    adaptive = _adaptive(args.solver)
    if adaptive and args.steps is not None:
        raise ValueError(
            f"--steps {args.steps} with --solver {args.solver}, which chooses its steps; leave --steps out"
        )
    if not adaptive and args.steps is None:
        args.steps = 2
    out = Path(args.out)
    rank, size = world()
    picture = out.suffix.lower() not in (".safetensors", "")
    if picture and size > 1:
        raise ValueError(f"--out {out} is made by one process, here are {size}; name it .safetensors, or a folder")
    writable_folder(out.parent)
    model = load(args.model, device=_device(args.device))
    config = getattr(model.network, "config", None)
    image, labels = getattr(config, "image", None), getattr(config, "labels", 0)
    if image is None or (picture and image[0] != 1):
        raise ValueError(f"{args.model} does not draw grey pictures ({type(model.network).__name__}); use pfm.sample")
    if args.label is not None and not 0 <= args.label < labels:
        raise ValueError(f"--label {args.label}; this flow map knows {f'0 to {labels - 1}' if labels else 'no labels'}")
    if picture:
        _picture(args, model, tuple(image), labels, out)
    else:
        _tensors(args, model, tuple(image), labels, out, rank, size)


def _picture(args: argparse.Namespace, model: Any, image: tuple[int, ...], labels: int, out: Path) -> None:
    from .. import png

    parts = {"chunk": args.batch} if args.count > args.batch else {}
    begin = time.perf_counter()
    images = _make(args, model, image, labels, 0, args.count, **parts)["samples"]
    elapsed = time.perf_counter() - begin
    png.write(png.grid(images, columns=min(args.count, 10)), out)
    print(f"{out}: {args.count} pictures, {_how(args)}, {1000 * elapsed / args.count:.1f} ms each")


def _adaptive(solver: str) -> bool:
    from .. import solvers

    return solver in solvers.named and solvers.named[solver].loop is not None


def _how(args: argparse.Namespace) -> str:
    return f"steps chosen by {args.solver}" if args.steps is None else f"{args.steps} steps of {args.solver}"


def _tensors(
    args: argparse.Namespace, model: Any, image: tuple[int, ...], labels: int, out: Path, rank: int, size: int
) -> None:
    from ..files import writable_folder
    from .shards import Shards

    names = ("count", "batch", "steps", "solver", "guidance", "label", "seed")
    parameters = {
        "format": 1,
        **{name: getattr(args, name) for name in names},
        "device": args.device.split(":")[0],
        "image": list(image),
        "labels": labels,
        "weights": _weights(model),
    }
    shards = Shards(out, parameters)
    if shards.finished():
        shards.clear()
        print(f"{out}: {args.count} samples, complete already")
        return

    def make(lo: int, hi: int) -> dict:
        return _make(args, model, image, labels, lo, hi)

    try:
        writable_folder(shards.folder)
        shards.open()
        there, made, damaged = shards.work(make, rank, size)
        missing = shards.finish()
    except OSError:
        if not shards.finished():
            raise
        shards.finish()  # the same command, run elsewhere, was first, and the folder went away under this one
        there, made, damaged, missing = 0, 0, [], 0
    who = f"process {rank + 1} of {size}: " if size > 1 else ""
    if there:
        print(f"{who}resumed: {there} of {there + made} parts were there")
    for path in damaged:
        print(f"{who}{path} was damaged or of another run; it was made again")
    if missing:
        print(f"{who}{made} parts made; {missing} of other processes are missing yet")
    else:
        print(f"{out}: {args.count} samples, {_how(args)}")


def _make(
    args: argparse.Namespace, model: Any, image: tuple[int, ...], labels: int, lo: int, hi: int, **options: Any
) -> dict:
    """Samples lo to hi of the run, and their labels if there are any."""
    import torch

    from .. import guidance
    from ..sampling import sample

    device = next(model.network.parameters()).device
    ids = torch.arange(lo, hi, device=device)
    tensors = {}
    if labels:
        label = ids % labels if args.label is None else torch.full_like(ids, args.label)
        tensors["labels"] = label
        options |= {"condition": {"label": label}, "guidance": guidance.cfg(args.guidance, null={"label": labels})}
    tensors["samples"] = sample(
        model, (hi - lo, *image), args.steps, solver=args.solver, seed=args.seed, sample_ids=ids, **options
    )
    return tensors


def _device(name: str) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _weights(model: Any) -> str:
    """Names the model by what it computes with, wherever its file lies."""
    import torch

    what = (model.prediction, model.interpolant, type(model.network).__name__, _call(model.call))
    found = hashlib.sha256(" ".join(map(str, what)).encode())
    found.update(repr(getattr(model.network, "config", "")).encode())
    for key, value in model.network.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _call(call: Any) -> str:
    """Names a call by what it does: its class and the fields that say how, of which functions only by name."""
    if not dataclasses.is_dataclass(call):
        return f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', type(call).__qualname__)}"
    fields = {each.name: getattr(call, each.name) for each in dataclasses.fields(call)}
    shown = {key: getattr(value, "__qualname__", value) if callable(value) else value for key, value in fields.items()}
    return f"{type(call).__name__} {shown}"
