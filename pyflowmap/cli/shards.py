"""A large run of `sample`, cut into parts that processes share and that survive an interruption.

Part i holds rows i batch to (i + 1) batch; process r of w makes the parts i = r mod w. A sample depends on (seed, its
global number), and a part is always made in one batch, so neither the number of processes nor a restart changes a bit.

    out.safetensors.parts/manifest.json             the run's parameters
    out.safetensors.parts/part-000012.safetensors   "samples" (b, ...), "labels" (b,); written whole or not at all
    out.safetensors.parts/.out-x1y2.safetensors     the merged file while it is written
    out.safetensors                                 all parts in order, when all are there; the folder is removed

Each file carries the digest of the parameters, a part also that of its numbers. Whoever finds all parts present merges
them. A lock of the operating system, which a dead process cannot hold, spares the others that work; without it two
would write the same file, one after the other. To a folder in place of a file the parts are written, and stay.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import whole_file

__all__ = ["Shards", "world"]

_LARGEST_MANIFEST = 1 << 16
_LARGEST_HEADER = 1 << 20
_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16"}


def world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them; (0, 1) without."""
    given = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if given == (None, None):
        return 0, 1
    try:
        rank, size = int(given[0] or ""), int(given[1] or "")
    except ValueError:
        rank, size = -1, -1
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK = {given[0]}, WORLD_SIZE = {given[1]}; set both as torchrun does, 0 <= RANK < WORLD_SIZE"
        )
    return rank, size


class Shards:
    """The parts of one run and where they lie."""

    def __init__(self, out: Path, parameters: Mapping[str, Any]) -> None:
        self.out = out
        self.merges = out.suffix == ".safetensors"
        self.folder = out.with_name(out.name + ".parts") if self.merges else out
        self.parameters = dict(parameters)
        self.count, self.batch = self.parameters["count"], self.parameters["batch"]
        self.number = -(-self.count // self.batch)
        self._text = json.dumps(self.parameters, indent=1, sort_keys=True)
        self.digest = hashlib.sha256(self._text.encode()).hexdigest()

    # ---- whose run it is ---------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Whether the merged file is there, of these parameters; raises ValueError where it is of others."""
        if not self.merges or not self.out.exists():
            return False
        found = _metadata(self.out)
        if found is None or "parameters" not in found:
            raise ValueError(f"{self.out} exists and is not a run of pyflowmap sample; choose another --out")
        self._compare(_json(found["parameters"], self.out), self.out)
        return True

    def open(self) -> None:
        """Make the folder and its manifest, or check that the one there is of the same run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "manifest.json"
        if not path.exists():
            with _temporary(path) as own:
                own.write_text(self._text + "\n", encoding="utf-8")
                try:
                    os.link(own, path)  # fails where another process was first, unlike a rename
                except FileExistsError:
                    pass
                except OSError:  # no hard links here: the parts' digests still tell two runs apart
                    os.replace(own, path)
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{path} is damaged ({path.stat().st_size} bytes); delete {self.folder} to start over")
        self._compare(_json(path.read_text(encoding="utf-8", errors="replace"), path), path)

    def _compare(self, found: Any, path: Path) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: no parameters; delete it to start over")
        for key in sorted(found.keys() | self.parameters.keys()):
            if found.get(key) != self.parameters.get(key):
                raise ValueError(
                    f"{path} is of a run with {key} = {str(found.get(key))[:80]}, this one has "
                    f"{key} = {str(self.parameters.get(key))[:80]}; delete it or choose another --out"
                )

    def clear(self) -> None:
        """Take away the parts of this run that one killed after the merge has left; those of another run stay."""
        with suppress(OSError, ValueError):
            if (self.folder / "manifest.json").exists():
                self.open()  # raises ValueError where it is another's
                self._remove()
            else:
                self.folder.rmdir()  # where it is empty

    # ---- parts -------------------------------------------------------------------------------------------------------

    def path(self, index: int) -> Path:
        return self.folder / f"part-{index:06d}.safetensors"

    def rows(self, index: int) -> tuple[int, int]:
        return index * self.batch, min((index + 1) * self.batch, self.count)

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {"run": self.digest, "part": str(index), "sha256": _digest(own)}
        with whole_file(self.path(index)) as temporary:
            temporary.write_bytes(save(own, metadata))

    def read(self, index: int) -> dict[str, Tensor] | None:
        """A part that is there and whole; None where it is missing, damaged or of another run."""
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("run") != self.digest or metadata.get("part") != str(index):
                    return None
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (SafetensorError, OSError, ValueError):
            return None
        lo, hi = self.rows(index)
        whole = "samples" in tensors and all(len(each) == hi - lo for each in tensors.values())
        return tensors if whole and metadata.get("sha256") == _digest(tensors) else None

    def work(
        self, make: Callable[[int, int], Mapping[str, Tensor]], rank: int, size: int, *, progress: bool = True
    ) -> tuple[int, int, list[Path]]:
        """Make this process's parts; returns how many were there, how many were made, and the damaged ones among the
        latter."""
        from tqdm.auto import tqdm

        mine = range(rank, self.number, size)
        there, damaged = 0, []
        rows = sum(hi - lo for lo, hi in map(self.rows, mine))
        shown = "sampling" if size == 1 else f"sampling (process 1 of {size})"
        with tqdm(total=rows, desc=shown, unit="sample", disable=not progress or rank > 0) as bar:
            for index in mine:
                lo, hi = self.rows(index)
                if self.path(index).exists():
                    if self.read(index) is not None:
                        there += 1
                        if not bar.disable:  # a bar that is not shown has nothing to count with
                            bar.initial += hi - lo  # counted, but not for the speed
                        bar.update(hi - lo)
                        continue
                    if self.path(index).exists():  # not merged and removed in this moment
                        damaged.append(self.path(index))
                self.write(index, make(lo, hi))
                bar.update(hi - lo)
        return there, len(mine) - there, damaged

    # ---- the end -----------------------------------------------------------------------------------------------------

    def missing(self) -> int:
        """How many parts are not there yet."""
        try:
            names = set(os.listdir(self.folder))
        except FileNotFoundError:
            return self.number
        return sum(self.path(index).name not in names for index in range(self.number))

    def finish(self) -> int:
        """Merge if all parts are there; returns how many are missing."""
        if not self.merges:
            return self.missing()
        if not self.finished():
            if self.missing() and not self.finished():  # merged between the two looks?
                return self.missing()
            with _locked(self.folder / "merge.lock"):
                if not self.finished():
                    try:
                        self._merge()
                    except FileNotFoundError:
                        if not self.finished():  # another one merged and removed the parts
                            raise
        self._remove()
        return 0

    def _merge(self) -> None:
        first = self._whole(0)
        layout: dict[str, Any] = {"__metadata__": {"parameters": self._text}}
        spans, at = {}, 0
        for key, value in first.items():
            size = value[0].numel() * value.element_size() * self.count
            shape = [self.count, *value.shape[1:]]
            layout[key] = {"dtype": _NAMES[value.dtype], "shape": shape, "data_offsets": [at, at + size]}
            spans[key], at = at, at + size
        header = json.dumps(layout, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with whole_file(self.out, folder=self.folder) as temporary, open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            begin = file.tell()
            file.truncate(begin + at)
            for index in range(self.number):
                part = self._whole(index)
                if {k: (v.dtype, v.shape[1:]) for k, v in part.items()} != {
                    k: (v.dtype, v.shape[1:]) for k, v in first.items()
                }:
                    raise ValueError(f"{self.path(index)} has other tensors than {self.path(0).name}; delete it")
                for key, value in part.items():
                    file.seek(begin + spans[key] + self.rows(index)[0] * value[0].numel() * value.element_size())
                    file.write(_bytes(value))
            file.flush()
            os.fsync(file.fileno())

    def _whole(self, index: int) -> dict[str, Tensor]:
        part = self.read(index)
        if part is None:
            if not self.path(index).exists():
                raise FileNotFoundError(errno.ENOENT, "the part is gone", str(self.path(index)))
            raise ValueError(f"{self.path(index)} is damaged or of another run; run the same command again to redo it")
        return part

    def _remove(self) -> None:
        """Take away what this run wrote; what else is in the folder stays, with the folder."""
        if not self.folder.is_dir():
            return
        own = [self.path(index) for index in range(self.number)]
        names = (".part-*.safetensors", ".manifest-*.json", f".{glob.escape(self.out.stem)}-*.safetensors")
        own += [path for name in names for path in self.folder.glob(name)]  # of killed processes
        own += [self.folder / "merge.lock", self.folder / "manifest.json"]  # last: whose the folder is
        for path in own:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        found.update(_bytes(tensors[key]))
    return found.hexdigest()


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > _LARGEST_HEADER:
                return None
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except (SafetensorError, OSError, ValueError):
        return None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start over") from None


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    own = path.with_name(f".{path.stem}-{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        yield own
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`. The system lets go of it when its holder dies."""
    import fcntl

    try:
        file = open(path, "a")  # noqa: SIM115 (held until the end of the block)
    except FileNotFoundError:  # the folder is gone: merged
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: then twice the work, to the same end
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        yield
