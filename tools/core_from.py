"""A pytest plugin: `pyflowmap._C` and `pyflowmap._simt` come from the folder $PYFLOWMAP_CORE_FROM.

So the installed package is tested on a core that was built another way (with a sanitizer) without installing it.
"""

import importlib.machinery
import importlib.util
import os
import pathlib
import sys


class CoreFrom:
    """A finder for the compiled modules alone; the Python files stay the installed ones."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in ("pyflowmap._C", "pyflowmap._simt"):
            return None
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        file = self.folder / (fullname.rpartition(".")[2] + suffix)
        if not file.exists():
            raise ImportError(f"PYFLOWMAP_CORE_FROM={self.folder} holds no {file.name}; build it there first")
        return importlib.util.spec_from_file_location(fullname, file)


sys.meta_path.insert(0, CoreFrom(pathlib.Path(os.environ["PYFLOWMAP_CORE_FROM"]).resolve()))
