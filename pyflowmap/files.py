"""Writing files whole: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file", "writable_folder"]


@contextmanager
def whole_file(path: str | Path, *, folder: Path | None = None) -> Iterator[Path]:
    """A temporary path with the same suffix; renamed to `path` when the block ends well, removed when it does not.

    It lies beside `path`, or in `folder` of the same file system, which its owner clears of what killed processes left.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} for {path.name!r} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=folder or path.parent)
    except OSError as error:
        raise PermissionError(
            f"cannot write into {str(path.parent)!r} ({error.strerror}); choose another folder"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(path: str | Path) -> Path:
    """Make the folder and prove that a file can be written there, before any long work starts."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write into {str(path)!r} ({error.strerror}); pass another folder with --out"
        ) from None
    return path
