"""Which back end runs a kernel: the compiled module, the emulator of CUDA sources, or the reference in plain torch."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor

from pyflowmap import _C

BACKENDS = ("auto", "cpu", "cuda", "simt", "reference")


# The direct road: the functions of the current back end, with every check in C. One answers False, or None, where it
# wants Python to look at the call.
DIRECT = ("combine", "update", "activate", "dual_linear", "sum_of", "version_of")


class _Direct:
    """A plain class: the interpreter finds its attributes ten times faster than those of a SimpleNamespace."""

    combine: Any
    update: Any
    dual_linear: Any
    activate: Any
    sum_of: Any
    version_of: Any


direct = _Direct()


def _refuse(*_: Any) -> bool:
    return False


def _allocate(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def _connect(module: Any) -> Any:
    module.connect(
        {
            "Tensor": torch.Tensor,
            "Parameter": torch.nn.Parameter,
            "is_grad_enabled": torch.is_grad_enabled,
            "dispatch_modes": torch._C._len_torch_dispatch_stack,
            "is_tracing": torch._C._is_tracing,
            "increment_version": torch._C._increment_version,
            "forward_ad": torch.autograd.forward_ad,
            "allocate": _allocate,
            "empty_like": torch.empty_like,
        }
    )
    # Dynamo cannot look into C: it takes "no direct road here" and "no version known" for an answer instead.
    for name in DIRECT:
        answer = (lambda *_: None) if name in ("activate", "sum_of", "version_of") else (lambda *_: False)
        torch.compiler.substitute_in_graph(getattr(module, name), skip_signature_check=True)(answer)
    return module


_connect(_C)
_HAS_CUDA: bool = _C.build()["cuda"]
_warned = False


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"PYFLOWMAP_BACKEND={name!r} is not a back end; choose one of {', '.join(BACKENDS)}")
    return name


_current = _checked(os.environ.get("PYFLOWMAP_BACKEND", "auto") or "auto")


@cache
def simt() -> Any:
    """The emulator's module. It is a build option for tests (PYFLOWMAP_SIMT=ON) and never part of a wheel."""
    try:
        return _connect(importlib.import_module("pyflowmap._simt"))
    except ImportError as error:
        raise ValueError(
            "the back end 'simt' is not in this build; install with -C cmake.define.PYFLOWMAP_SIMT=ON"
        ) from error


def current() -> str:
    """The name chosen by PYFLOWMAP_BACKEND or `use`."""
    return _current


@contextmanager
def use(name: str) -> Iterator[None]:
    """Forces a back end for every op inside the block (as PYFLOWMAP_BACKEND does for a process)."""
    global _current
    before = _current
    _set(_checked(name))
    try:
        yield
    finally:
        _set(before)


def _set(name: str) -> None:
    global _current
    module = simt() if name == "simt" else _C
    for function in DIRECT:
        setattr(direct, function, getattr(module, function))
    if name == "reference":
        direct.combine = direct.update = direct.dual_linear = _refuse
        direct.activate = lambda *_: None
    _current = name


_set(_current)


def module_for(device: torch.device, wide: bool = False) -> Any | None:
    """The module that computes on `device`, None where the reference does; `wide` means float64."""
    global _warned
    if _current == "reference":
        return None
    if _current == "cpu" and device.type != "cpu":
        raise ValueError(f"PYFLOWMAP_BACKEND=cpu, but an operand is on {device}; move it with .cpu()")
    if _current == "cuda" and device.type != "cuda":
        raise ValueError(f"PYFLOWMAP_BACKEND=cuda, but an operand is on {device}; move it with .cuda()")
    if device.type == "cpu":
        return simt() if _current == "simt" and not wide else _C
    if device.type == "cuda":
        if _HAS_CUDA:
            return None if wide else _C
        if not _warned:
            _warned = True
            warnings.warn(
                "pyflowmap was built without CUDA: CUDA tensors run on the plain-torch reference, correctly but "
                "slowly. "
                "Install where nvcc is found, or with -C cmake.define.PYFLOWMAP_CUDA=ON.",
                stacklevel=4,
            )
    return None
