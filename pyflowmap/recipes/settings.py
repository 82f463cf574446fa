"""`field=value`, as typed on a command line, into the fields of a recipe."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

__all__ = ["changed"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def changed(recipe: Any, settings: Sequence[str]) -> Any:
    """The recipe with these fields set; raises ValueError for a field it has not and a value of another type."""
    hints = typing.get_type_hints(type(recipe))
    fields = [field.name for field in dataclasses.fields(recipe)]
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"{setting!r} is not field=value, e.g. steps=1000")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.6)
            cure = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(fields)}"
            raise ValueError(f"the recipe {type(recipe).__name__} has no field {name!r}; {cure}")
        values[name] = _value(text.strip(), hints[name], name)
    return dataclasses.replace(recipe, **values)


def _value(text: str, hint: Any, name: str) -> Any:
    kind = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if type(None) in parts and text.lower() in ("none", ""):
            return None
        # Numbers before text: anything is a text.
        for each in sorted((p for p in parts if p is not type(None)), key=lambda p: p is str):
            try:
                return _value(text, each, name)
            except ValueError:
                continue
    elif kind is typing.Literal:
        if text in parts:
            return text
    elif kind is tuple and parts:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        kinds = [parts[0]] * len(items) if len(parts) == 2 and parts[1] is Ellipsis else list(parts)
        if len(kinds) == len(items):
            return tuple(_value(item, each, name) for item, each in zip(items, kinds))
    elif hint is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    elif hint is int:
        try:
            number = float(text) if set(text) & set("eE.") else int(text)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    elif hint is float:
        try:
            return float(text)
        except ValueError:
            pass
    elif hint is str:
        return text
    else:
        raise ValueError(f"{name} is {hint}, which cannot be typed here; set it in the recipe's own file")
    shown = hint.__name__ if isinstance(hint, type) and not parts else str(hint).replace("typing.", "")
    raise ValueError(f"{name} = {text!r} is no {shown}; e.g. {_EXAMPLES.get(kind or hint, 'see the recipe')}")


_EXAMPLES = {int: "1000", float: "1e-3", bool: "true", tuple: "0.999,0.9999"}
