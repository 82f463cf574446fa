"""Checkpoints: folders that are whole or not there.

    checkpoints/step-000000123/   tensors.safetensors            everything with elements, by name; or, where sharded,
                                  shard-…-model-…safetensors     one file a process, by torch.distributed.checkpoint
                                  state.json                     everything else; bytes and SHA-256 of the files

A folder is written under a name that begins with a dot, forced to the disk and renamed; older ones are removed after.
The sharded files are safetensors as well: the pickled metadata of DCP's own file format is not used, nor read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .distributed import Distribution

__all__ = ["Layout", "damage", "differing", "found", "held", "layout", "read_state", "read_tensors", "save", "sweep"]

_FORMAT = 1
_LARGEST_STATE = 1 << 28  # bytes of state.json: the generators of thousands of processes fit
_ONE_FILE = "tensors.safetensors"

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    steps = [(re.fullmatch(r"step-(\d{1,18})", each.name), each) for each in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in steps if match and path.is_dir())


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """A run's folder is its own: a second run there raises. The system lets go of it when the process dies."""
    if folder is None or os.name != "posix":
        yield
        return
    import fcntl

    with open(folder / ".running", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another run is writing to {str(folder)!r}; wait for it or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


# ---- writing --------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    distribution: Distribution,
) -> Path:
    """Write the checkpoint of `step`; every process calls it, the first one writes unless tensors are sharded."""
    path, part = folder / f"step-{step:09d}", folder / f".step-{step:09d}"
    sharded = any(hasattr(x, "to_local") for x in tensors.values())
    error: Exception | None = None
    try:
        if distribution.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            if not sharded:
                save_file({k: x.detach().cpu().contiguous() for k, x in _apart(tensors).items()}, part / _ONE_FILE)
    except (OSError, SafetensorError) as raised:
        error = raised
    distribution.together(_explained(error, folder, part, step) if error else None)
    try:
        if sharded:
            _save_shards(tensors, part)
        if distribution.first:
            files = {each.name: {"bytes": each.stat().st_size, "sha256": _digest(each)} for each in _tensor_files(part)}
            text = json.dumps({"format": _FORMAT, "step": step, "files": files, **state})
            with open(part / "state.json", "w", encoding="utf-8") as file:
                file.write(text)
            for name in (*files, "state.json", "."):
                _to_disk(part / name)
            if path.exists():  # saved before, by a run that was resumed from further back
                shutil.rmtree(path)
            os.rename(part, path)
            _to_disk(folder)
            for _, old in found(folder)[:-keep]:
                shutil.rmtree(old)
    except Exception as raised:  # torch.distributed.checkpoint raises a kind of its own
        error = raised
    distribution.together(_explained(error, folder, part, step) if error else None)
    return path


def _save_shards(tensors: dict[str, Tensor], part: Path) -> None:
    import torch.distributed.checkpoint as dcp

    # DCP lets one process write what all of them hold in full.
    dcp.save(
        {k: x.detach() for k, x in tensors.items()},
        storage_writer=dcp.HuggingFaceStorageWriter(str(part), save_distributed=True),
    )


def _explained(error: Exception, folder: Path, part: Path, step: int) -> Exception:
    shutil.rmtree(part, ignore_errors=True)  # room for the user to look around
    last = [path for _, path in found(folder)]
    kept = f"{last[-1]} is whole; free some space and run again to resume from it" if last else "there is none before"
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[-1]
    return OSError(f"the checkpoint of step {step} could not be written to {str(folder)!r} ({reason}); {kept}")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, as safetensors asks: tied weights are written twice."""
    seen: set[int] = set()
    out = {}
    for name, x in tensors.items():
        at = x.untyped_storage().data_ptr()
        out[name] = x.detach().clone() if at in seen else x
        seen.add(at)
    return out


def _tensor_files(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.suffix == ".safetensors")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return _file_digest(file)


def _file_digest(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 22):
        found.update(block)
    return found.hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Any]:
    """The scalars of a checkpoint. ValueError names what is damaged."""
    file = path / "state.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    if file.stat().st_size > _LARGEST_STATE:
        raise ValueError(f"{file} is damaged: {file.stat().st_size} bytes")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise ValueError(f"{file} is damaged: it lists no files")
    if state.get("format") != _FORMAT:
        raise ValueError(f"{file} has format {state.get('format')!r}, this version reads {_FORMAT}; upgrade pyflowmap")
    return state


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every byte is as it was written."""
    try:
        state = read_state(path)
        for name, expected in state["files"].items():
            if Path(name).name != name or not isinstance(expected, dict):
                return f"{path / 'state.json'} is damaged: it lists the file {name!r}"
            file = path / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != expected.get("bytes"):
                return f"{file} is damaged: {file.stat().st_size} bytes, {expected.get('bytes')} were written"
            if _digest(file) != expected.get("sha256"):
                return f"{file} is damaged: its contents are not those that were written"
        extra = {each.name for each in _tensor_files(path)} - state["files"].keys()
        if extra or not state["files"]:
            return f"{path} holds {sorted(extra) or 'no tensors'}, which its state.json does not say"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def layout(path: Path) -> Layout:
    """Name, shape and dtype of every tensor in a checkpoint."""
    if (path / _ONE_FILE).is_file():
        with safe_open(path / _ONE_FILE, framework="pt") as file:
            return {
                key: (tuple(file.get_slice(key).get_shape()), _dtype(file.get_slice(key).get_dtype()))
                for key in file.keys()  # noqa: SIM118 (no mapping)
            }
    import torch.distributed.checkpoint as dcp

    described = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {key: x for key, x in described.items() if isinstance(x, dcp.TensorStorageMetadata)}
    return {key: (tuple(x.size), x.properties.dtype) for key, x in tensors.items()}


def read_tensors(path: Path, into: dict[str, Tensor]) -> None:
    """Fill the tensors of `into`, sharded or not, from a checkpoint that may be sharded otherwise."""
    if (path / _ONE_FILE).is_file() and not any(hasattr(x, "to_local") for x in into.values()):
        with safe_open(path / _ONE_FILE, framework="pt") as file, torch.no_grad():
            for key, x in into.items():
                x.copy_(file.get_tensor(key))
        return
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    alone = not (dist.is_available() and dist.is_initialized())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is, and that is meant
        own = {key: x.detach() for key, x in into.items()}
        dcp.load(own, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)


def differing(expected: Layout, there: Layout, prefixes: Iterable[str]) -> str | None:
    """The first tensor under `prefixes` whose shape or dtype differs, in words."""
    begin = tuple(prefixes)
    for key in sorted(k for k in expected.keys() | there.keys() if k.startswith(begin)):
        if expected.get(key) != there.get(key):
            return f"tensor {key!r} is {_shown(there.get(key))} in the checkpoint but {_shown(expected.get(key))} here"
    return None


def _shown(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if entry is None else f"{entry[1]} of shape {entry[0]}"


def _dtype(name: str) -> torch.dtype:
    from safetensors.torch import _getdtype

    return _getdtype(name)
