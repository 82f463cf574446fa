"""`pyflowmap info`: versions, back ends, devices."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata


def add(subparsers) -> None:
    parser = subparsers.add_parser("info", help="print versions, back ends, architectures and devices")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    import pyflowmap

    from ..checkpoint import pretrained

    lines = dict(pyflowmap.build_config())
    lines.setdefault("python", platform.python_version())
    lines.setdefault("torch", torch.__version__)
    for package in ("numpy", "safetensors"):
        lines.setdefault(package, metadata.version(package))
    lines.setdefault(
        "cuda devices", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none"
    )
    lines.setdefault("threads", torch.get_num_threads())
    lines.setdefault("PYFLOWMAP_BACKEND", os.environ.get("PYFLOWMAP_BACKEND", "auto"))
    lines.setdefault("flow maps", pretrained() or "none")
    width = max(map(len, lines))
    for key, value in lines.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{key:<{width}}  {shown}")
