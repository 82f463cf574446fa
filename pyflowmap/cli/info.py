"""`pyflowmap info`: versions, back ends, devices."""

from __future__ import annotations

import argparse
from importlib import metadata


def add(subparsers) -> None:
    parser = subparsers.add_parser("info", help="print versions, back ends, architectures and devices")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import pyflowmap

    from ..checkpoint import pretrained

    lines = dict(pyflowmap.build_config())
    for package in ("numpy", "safetensors"):
        lines[package] = metadata.version(package)
    lines["flow maps"] = pretrained()
    width = max(map(len, lines))
    for key, value in lines.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{key:<{width}}  {shown or 'none'}")
