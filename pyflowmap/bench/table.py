"""Results as text: for the terminal, and the cells of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["asked_rows", "cells", "duration", "table", "verdict"]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _time(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    text = duration(row["median_s"])
    if result["per"]:
        count, what = result["per"]
        return f"{duration(row['median_s'] / count)} / {what}"
    if result["traffic_bytes"] and row["median_s"] > 1e-4 and row["role"] != "peer":
        return f"{text} ({result['traffic_bytes'] / row['median_s'] / 1e9:.3g} GB/s)"
    return text


def _ratio(row: Mapping[str, Any]) -> str:
    """Peer time / our time, or our time / peer time where the target is stated so."""
    ratio = row.get("ratio")
    if ratio is None:
        return ""
    target = row.get("target")
    if target and target["slower"] is not None:
        low, middle, high = 1 / ratio["high"], 1 / ratio["median"], 1 / ratio["low"]
        return f"{middle:.2f} of its time [{low:.2f}, {high:.2f}]"
    low, middle, high = ratio["low"], ratio["median"], ratio["high"]
    what = "of its speed" if row["role"] == "limit" else "x"
    gap = " " if row["role"] == "limit" else ""
    return f"{middle:.2f}{gap}{what} [{low:.2f}, {high:.2f}]"


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """(what was asked, met or not)."""
    target = row.get("target")
    if target is None:
        return "", ""
    asked = f">= {target['faster']:g}" if target["faster"] is not None else f"<= {target['slower']:g}"
    return asked, "met" if target["met"] else "NOT met"


def cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per contestant: (name, time, ratio, asked, met)."""
    rows = [
        (row["name"] + (f" ({row['note']})" if row["note"] else ""), _time(result, row), _ratio(row), *verdict(row))
        for row in result["contestants"]
    ]
    return rows + [(s["name"], "not run", s["reason"], "", "") for s in result["skipped"]]


def asked_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(contestant, ratio, asked, met) of what has a target, and of what could not run."""
    rows = [(row["name"], _ratio(row), *verdict(row)) for row in result["contestants"] if "target" in row]
    return rows + [(s["name"], f"not run: {s['reason']}", "", "not run") for s in result["skipped"]]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """For the terminal: one block per case."""
    lines = []
    for result in results:
        lines.append(f"{result['title']}   [{result['case']}, {result['threads']} threads, {result['rounds']} rounds]")
        for name, time, ratio, asked, met in cells(result):
            lines.append(f"  {name:<52} {time:<26} {ratio:<38} {asked:<8} {met}".rstrip())
        if result["note"]:
            lines.append(f"  {result['note']}")
        lines.append("")
    return "\n".join(lines)
