"""The machine, the versions and the commit that belong to a measured number."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re
import subprocess
from importlib import metadata
from typing import Any

import torch

from pyflowmap import _C, __version__

__all__ = ["describe", "file_name"]

_PEERS = ("numpy", "diffusers", "torchdiffeq")


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_level_cache() -> str:
    sizes = [_read(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size").strip() for i in range(4)]
    return next((s for s in reversed(sizes) if s), "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that holds this file, with + where it was changed; empty for an installed package."""
    here = pathlib.Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "pyflowmap", "csrc", "bench", "CMakeLists.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache": _last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": _commit(),
        "versions": {
            "pyflowmap": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in _PEERS},
        },
        "build": dict(_C.build()),
    }


def file_name(machine: dict[str, Any]) -> str:
    """amd-epyc-9654-2cores.json"""
    words = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", machine["processor"].lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{machine['cores']}cores"]) + ".json"
