"""`pyflowmap bench`: the microbenchmarks that ship with the library, measured here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="time the kernels beside torch on this machine")
    parser.add_argument("names", nargs="*", help="cases or groups (default: all; --list names them)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--seconds", type=float, default=None, help="measuring time per case")
    parser.add_argument("--out", default=None, help="write every sample to this JSON file too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from .. import bench
    from ..files import whole_file, writable_folder

    if args.list:
        for group in bench.groups():
            print(f"{group}: {', '.join(bench.names(group))}")
        return
    chosen: list[str] = []
    for name in args.names or bench.groups():
        if name not in bench.groups() and name not in bench.names():
            raise ValueError(f"there is no bench case or group {name!r}; pyflowmap bench --list names them")
        chosen += bench.names(name) if name in bench.groups() else [name]
    if args.seconds is not None and not args.seconds > 0.0:
        raise ValueError(f"--seconds {args.seconds:g}; it must be positive, e.g. 5")
    if args.out is not None:
        writable_folder(Path(args.out).parent)
    results = [bench.measure(name, args.seconds) for name in tqdm(dict.fromkeys(chosen), desc="bench", unit="case")]
    print(bench.table(results))
    if args.out is not None:
        with whole_file(args.out) as temporary:
            text = json.dumps({"machine": bench.describe(), "results": results}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
