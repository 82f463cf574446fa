"""The command line: `pyflowmap demo | train | sample | bench | info`.

Each command is a file here with `add(subparsers)` and `run(args)`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = ("demo", "train", "sample", "bench", "info")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors a user can cure print as one line and return 1."""
    parser = argparse.ArgumentParser(prog="pyflowmap", description="Train and sample flow maps.")
    subparsers = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:  # bench ships with the microbenchmarks
            importlib.import_module(f"{__name__}.{name}").add(subparsers)
    args = parser.parse_args(arguments)
    if arguments is None and args.command in ("demo", "train"):
        _start_over_with_patient_threads()
    if args.command is None:
        args = parser.parse_args(["info"])  # what a bare `python -m pyflowmap` is asked for
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"pyflowmap {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pyflowmap {args.command}: interrupted; nothing half-written was kept", file=sys.stderr)
        return 130
    return 0


def _start_over_with_patient_threads() -> None:
    """Replace this process by itself with OMP_WAIT_POLICY=passive, once.

    GNU OpenMP's threads spin while they wait for each other. Beside other work on the same two cores that made a
    training step 2 to 5 times slower (1.4 s against 0.3 to 0.7 s). The policy is read when torch loads libgomp, which
    importing this package has done.
    """
    if "OMP_WAIT_POLICY" not in os.environ and os.name == "posix":
        os.environ["OMP_WAIT_POLICY"] = "passive"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
