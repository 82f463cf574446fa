"""Training runs as files: `pyflowmap train NAME`, or a copy of one of these that a user has edited.

A recipe is a dataclass whose fields are the numbers of a run and whose methods are its parts: `Recipe`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from .recipe import Recipe
from .settings import changed

__all__ = ["Recipe", "changed", "load", "named"]

named: dict[str, tuple[str, str, dict[str, str]]] = {  # name -> (module, class, fields)
    **{f"checkerboard_{m}": ("checkerboard", "Checkerboard", {"method": m}) for m in ("lsd", "psd_m", "psd_u", "esd")},
    "digits": ("digits", "Digits", {}),
    "image_folder": ("image_folder", "ImageFolder", {}),
    "latents": ("latents", "Latents", {}),
}


def load(name_or_path: str) -> Recipe:
    """The shipped recipe of a name, or the one in a file: `path/to/recipe.py`, `path/to/recipe.py:ClassName`.

    A file is Python and is run. Raises ValueError where there is no such recipe.
    """
    if name_or_path in named:
        module, kind, fields = named[name_or_path]
        return dataclasses.replace(getattr(importlib.import_module(f"{__name__}.{module}"), kind)(), **fields)
    path, _, wanted = name_or_path.partition(".py:")
    file = Path(path + ".py") if wanted else Path(name_or_path)
    if file.suffix == ".py":
        return _from_file(file, wanted)
    near = difflib.get_close_matches(name_or_path, named, n=3, cutoff=0.5)
    cure = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(named)}"
    raise ValueError(f"there is no recipe {name_or_path!r}; {cure}, or pass the path of a .py file")


def _from_file(file: Path, wanted: str) -> Recipe:
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe file {str(file)!r}")
    # A name that depends on the place: two files called recipe.py do not replace each other.
    name = f"pyflowmap_recipe_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{file} failed while it was read: {type(error).__name__}: {error}") from error
    found = {
        kind.__name__: kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Recipe) and kind.__module__ == name
    }
    if wanted and wanted not in found:
        raise ValueError(f"{file} has no recipe {wanted!r}; it has {', '.join(found) or 'none'}")
    if not wanted and len(found) != 1:
        cure = f"say which: {file}:{next(iter(found))}" if found else "write a dataclass that inherits Recipe"
        raise ValueError(f"{file} has {len(found)} recipes; {cure}")
    kind = found[wanted] if wanted else next(iter(found.values()))
    if "__dataclass_fields__" not in vars(kind):
        raise ValueError(f"{file}: {kind.__name__} is not a dataclass, so its own fields would be lost; add @dataclass")
    return kind()
