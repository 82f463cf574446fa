"""Other people's libraries, met at their own interfaces. Each is imported when it is asked for, not before."""

import importlib


def __getattr__(name: str):
    if name == "diffusers":
        return importlib.import_module(f"{__name__}.diffusers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
