"""Which network classes a file may name. A file holds a name and a config, never code."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

__all__ = ["register", "describe", "build", "check_range"]

_networks: dict[str, tuple[type[nn.Module], type]] = {}


def register(config: type):
    """Class decorator `@register(Config)` for a module whose constructor takes one config and keeps it as `.config`."""

    if isinstance(config, type) and issubclass(config, nn.Module):
        raise TypeError(f"@register on {config.__name__} lacks its config; write @pfm.nn.register(Config)")
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        shown = getattr(config, "__name__", repr(config))
        raise TypeError(f"{shown} is not a dataclass; a network's config must be one")

    def add(network: type[nn.Module]) -> type[nn.Module]:
        known = _networks.get(network.__name__)
        if known is not None and known[0].__module__ != network.__module__:
            raise ValueError(
                f"a network named {network.__name__} is registered already, by {known[0].__module__}; rename one"
            )
        _networks[network.__name__] = (network, config)
        return network

    return add


def describe(network: nn.Module) -> dict[str, Any]:
    """{"name", "config"}: what rebuilds `network`."""
    name = type(network).__name__
    if name not in _networks or type(network) is not _networks[name][0]:
        raise TypeError(
            f"{name} is not a registered network, so no file can rebuild it; decorate it with "
            "@pfm.nn.register(Config), or pass the network that it wraps (.module, ._orig_mod)"
        )
    return {"name": name, "config": dataclasses.asdict(network.config)}  # type: ignore[call-overload]


def build(description: Any) -> nn.Module:
    """The network of a description; raises ValueError where it names an unknown one or an unfit config."""
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise ValueError(
            'the description of the network is not {"name": ..., "config": {...}}; the file is not from pyflowmap'
        )
    name = description.get("name")
    if not isinstance(name, str) or name not in _networks:
        raise ValueError(
            f"the file's network {str(name)[:80]!r} is unknown, known are {', '.join(_networks)}; import its module "
            "first"
        )
    network, config = _networks[name]
    fields = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(description["config"]) - fields)
    if unknown:
        raise ValueError(
            f"the file's {name} has the unknown option {unknown[0]!r}; it was written by a newer pyflowmap, upgrade"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    try:
        return network(config(**values))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the file's {name} has an unfit config ({error}); the file is damaged") from None


def check_range(config: Any, **bounds: tuple[int, int]) -> None:
    """Whole numbers in range: a config can come from a foreign file and must not be able to ask for a terabyte."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, bool) or not isinstance(each, int) or not low <= each <= high:
                raise ValueError(f"{type(config).__name__}.{name} = {value!r}; whole numbers from {low} to {high}")
