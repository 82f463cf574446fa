"""Flow maps as files: safetensors for the numbers, JSON in its header for the description. No pickle, no code.

header metadata "pyflowmap" = {"format": 1, "network": {"name", "config"}, "prediction", "call",
                               "interpolant": {"name", "options"}, "notes": {...}}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import calls, interpolants
from .files import whole_file
from .flow_map import FlowMap
from .nn import registry

__all__ = ["save", "load", "notes", "pretrained"]

_FORMAT = 1
_paths = {c.__name__: c for c in (interpolants.Linear, interpolants.Trigonometric, interpolants.VariancePreserving)}


def save(
    flow_map: FlowMap,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write `flow_map` to `path`; `dtype` (torch.float16, ...) converts the stored weights, `notes` is any JSON.

    The file is written whole or not at all. Raises TypeError where the network is not registered or the call not ready.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path = {str(path)!r}; the file name ends in .safetensors")
    if not isinstance(flow_map.network, nn.Module):
        raise TypeError(f"network is {type(flow_map.network).__name__}; only a registered nn.Module can be saved")
    if notes is not None and not isinstance(notes, Mapping):
        raise TypeError(f'notes is {type(notes).__name__}; pass a dictionary, e.g. {{"epochs": 10}}')
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype = {dtype}; weights are floating point, e.g. torch.float16")
    name = next((name for name, call in calls.ready.items() if call == flow_map.call), None)
    if name is None:
        raise TypeError("the flow map's call is one's own function; only the ready calls can be written to a file")
    path_of = flow_map.interpolant
    if type(path_of) is not _paths.get(type(path_of).__name__):
        raise TypeError(
            f"interpolant {type(path_of).__name__} is not one of {', '.join(_paths)}; it cannot be written to a file"
        )
    description = {
        "format": _FORMAT,
        "network": registry.describe(flow_map.network),
        "prediction": flow_map.prediction,
        "call": name,
        "interpolant": {"name": type(path_of).__name__, "options": dataclasses.asdict(path_of)},
        "notes": dict(notes or {}),
    }
    try:
        text = json.dumps(description)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"the description cannot be JSON ({error}); notes and configs hold None, bool, int, float, str, list and "
            "dict: turn tensors into lists, e.g. x.tolist()"
        ) from None
    tensors = {}
    for key, value in flow_map.network.state_dict().items():
        value = value.detach().to("cpu")
        if dtype is not None and value.is_floating_point():
            stored = value.to(dtype)
            if not bool(stored.isfinite().all()) and bool(value.isfinite().all()):
                raise ValueError(
                    f"dtype = {dtype} cannot hold tensor {key!r}, whose largest value is {float(value.abs().max()):g}; "
                    "use torch.bfloat16, or leave dtype out"
                )
            value = stored
        tensors[key] = value.contiguous().clone()  # tied weights are written twice
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"pyflowmap": text})
    return path


def load(name_or_path: str | Path, *, device: str | torch.device = "cpu") -> FlowMap:
    """The flow map in a file, or a shipped one by name ("digits"), in float32 and evaluation mode.

    The network is rebuilt from its class name and config, which are checked and bounded, and every tensor's name and
    shape is compared before memory is taken. Raises FileNotFoundError, or ValueError where the file is damaged or not
    ours.
    """
    path, description = _open(name_or_path)
    with torch.device("meta"):  # costs nothing, whatever the file claims
        built = registry.build(description.get("network")).state_dict()
    expected = {k: v.shape for k, v in built.items()}
    with safe_open(path, framework="pt") as file:
        found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise ValueError(
                    f"{path}: tensor {key!r} has shape {_shape(found.get(key))} in the file "
                    f"but {_shape(expected.get(key))} by its config; the file is damaged"
                )
        tensors = {key: file.get_tensor(key) for key in found}
    for key, value in tensors.items():
        own = built[key].dtype
        if not (value.is_floating_point() and own.is_floating_point) and value.dtype != own:
            raise ValueError(
                f"{path}: tensor {key!r} has dtype {value.dtype} in the file but {own} by its config: its "
                "values would change; the file is damaged"
            )
    network = registry.build(description["network"])
    network.load_state_dict(tensors)
    broken = next(
        (k for k, v in network.state_dict().items() if v.is_floating_point() and not v.isfinite().all()), None
    )
    if broken is not None:
        raise ValueError(
            f"{path}: tensor {broken!r} contains NaN or infinity; the file is damaged or its training diverged"
        )
    try:
        flow_map = FlowMap(
            network.to(device).eval(), description["prediction"], _interpolant(description), _call(description)
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is not sound: {error}"
        raise ValueError(f"{path}: the description {what}; the file is damaged or newer than this version") from None
    return flow_map


def _call(description: dict) -> str:
    name = description["call"]
    if not isinstance(name, str) or name not in calls.ready:
        raise ValueError(f"call = {_short(name)} is none of {', '.join(calls.ready)}")
    return name


def _interpolant(description: dict) -> interpolants.Interpolant:
    given = description["interpolant"]
    name, options = given["name"], given["options"]
    if not isinstance(name, str) or name not in _paths or not isinstance(options, dict):
        raise ValueError(f"interpolant = {_short(given)} is none of {', '.join(_paths)} with its options")
    for key, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:  # NaN fails too
            raise ValueError(f"interpolant option {_short(key)} = {_short(value)} is not a finite number")
    return _paths[name](**{key: float(value) for key, value in options.items()})


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**80:
        return "a number of more than 80 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def notes(name_or_path: str | Path) -> dict[str, Any]:
    """What the writer noted: how it was trained, what was measured."""
    path, description = _open(name_or_path)
    found = description.get("notes") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: notes are {_short(found)}, not a dictionary; the file is damaged")
    return found


def pretrained() -> list[str]:
    """Names of the shipped flow maps."""
    folder = resources.files("pyflowmap") / "pretrained"
    return sorted(each.name[: -len(".safetensors")] for each in folder.iterdir() if each.name.endswith(".safetensors"))


_FROM_A_STATE_DICT = (
    "to bring weights of your own: network.load_state_dict(...), then "
    "pfm.FlowMap(network, prediction=..., call=...).save('name.safetensors')"
)


def _open(name_or_path: str | Path) -> tuple[Path, dict]:
    path = Path(name_or_path)
    shown = _short(str(name_or_path))
    shipped = ", ".join(pretrained()) or "none"
    try:
        there = path.is_file()
    except OSError as error:
        raise ValueError(f"{shown} is no path ({error.strerror}); shipped flow maps are {shipped}") from None
    if path.suffix != ".safetensors":
        if there or path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            kind = ValueError if there else FileNotFoundError
            raise kind(f"{shown} is not a .safetensors file, and nothing else is read; {_FROM_A_STATE_DICT}")
        path = Path(str(resources.files("pyflowmap") / "pretrained" / f"{name_or_path}.safetensors"))
        if str(name_or_path) not in pretrained():
            raise FileNotFoundError(f"{shown} is neither a shipped flow map ({shipped}) nor a .safetensors file")
    elif not there:
        raise FileNotFoundError(f"there is no file {shown}; shipped flow maps are {shipped}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("pyflowmap")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); write it again") from None
    if text is None:
        raise ValueError(f"{path} was not written by pyflowmap: its header has no description; {_FROM_A_STATE_DICT}")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise ValueError(f"{path}: the description in the header is not JSON ({error}); the file is damaged") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        version = description.get("format") if isinstance(description, dict) else None
        raise ValueError(
            f"{path} has format {_short(version)}, this version reads {_FORMAT}; upgrade pyflowmap or write it again"
        )
    return path, description


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))
