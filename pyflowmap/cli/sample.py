"""`pyflowmap sample digits --steps 2 --out grid.png`: pictures from a flow map in a file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser("sample", help="sample a shipped or saved flow map into a picture")
    parser.add_argument("model", help='"digits" or the path of a .safetensors file')
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", default="grid.png", help="PNG to write (default: %(default)s)")
    parser.add_argument("--solver", default="flow_map", help="flow_map, euler or heun")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--label", type=int, default=None, help="draw this class only (default: all in turn)")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance; 1: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from .. import guidance
    from ..checkpoint import load
    from ..files import writable_folder
    from ..sampling import sample
    from . import png

    if args.count < 1:
        raise ValueError(f"--count {args.count}; at least 1")
    out = Path(args.out)
    writable_folder(out.parent)
    model = load(args.model)
    config = getattr(model.network, "config", None)
    image, labels = getattr(config, "image", None), getattr(config, "labels", 0)
    if image is None or image[0] != 1:
        raise ValueError(f"{args.model} does not draw grey pictures ({type(model.network).__name__}); use pfm.sample")
    if args.label is not None and not 0 <= args.label < labels:
        raise ValueError(f"--label {args.label}; this flow map knows {f'0 to {labels - 1}' if labels else 'no labels'}")
    condition, guide = None, None
    if labels:
        label = torch.arange(args.count) % labels if args.label is None else torch.full((args.count,), args.label)
        condition, guide = {"label": label}, guidance.cfg(args.guidance, null={"label": labels})
    begin = time.perf_counter()
    images = sample(
        model, (args.count, *image), args.steps, solver=args.solver, condition=condition, guidance=guide, seed=args.seed
    )
    elapsed = time.perf_counter() - begin
    png.write(png.grid(images, columns=min(args.count, 10)), out)
    print(
        f"{out}: {args.count} pictures, {args.steps} steps of {args.solver}, {1000 * elapsed / args.count:.1f} ms each"
    )
