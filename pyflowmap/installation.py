"""What this installation is: versions, back ends, architectures. Printed by `python -m pyflowmap info`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pyflowmap import _C
from pyflowmap.ops import backend


def version() -> str:
    """The installed version; pyproject.toml is the one place where it is written."""
    try:
        return metadata.version("pyflowmap")
    except metadata.PackageNotFoundError:
        return "0+source"  # a source tree on the path that was never installed


def _simt_is_built() -> bool:
    return any(Path(_C.__file__).parent.glob("_simt*"))


def _libgomp() -> str | None:
    """The OpenMP runtime in this process. Two of them would be two thread pools that fight."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = sorted({line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line})
    return ", ".join(found) or None


def _cuda(core: dict[str, Any]) -> str:
    if not core["cuda"]:
        return "not in this build: CUDA tensors run on the plain-torch reference (install where nvcc is found)"
    runtime, driver = core["cuda_runtime"], core["cuda_driver"]
    version = f"{runtime // 1000}.{runtime % 1000 // 10}"
    if driver == 0:
        return f"built with {version}, no driver on this machine"
    if driver // 1000 < runtime // 1000:
        return f"built with {version}, but the driver serves {driver // 1000}.{driver % 1000 // 10}: update it"
    return f"built with {version}, driver serves {driver // 1000}.{driver % 1000 // 10}"


def build_config() -> dict[str, Any]:
    """Versions, back ends, CUDA architectures, instruction set, threads and devices, as a flat dictionary.

    Example:
        >>> pyflowmap.build_config()["backend"]
        'auto'
    """
    core = _C.build()
    return {
        "pyflowmap": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
        "compiler": core["compiler"],
        "backend": backend.current(),
        "backends": [
            name
            for name, present in (
                ("cpu", True),
                ("cuda", core["cuda"]),
                ("simt", _simt_is_built()),
                ("reference", True),
            )
            if present
        ],
        "instruction set": f"{core['isa']} (best here: {core['best_isa']})",
        "threads": torch.get_num_threads(),
        "openmp": _libgomp() if core["openmp"] else "not in this build: CPU kernels use one thread",
        "cuda": _cuda(core),
        "cuda archs": core["cuda_archs"] or None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
    }
