"""The demo's pictures, plots and table. Every file is written whole: temporary name, then rename."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..files import whole_file

__all__ = ["require_matplotlib", "samples", "loss", "quality", "table", "write_text"]

_NAMES = {"flow_map": "flow map", "euler": "Euler", "heun": "Heun"}


def require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError(
            'the demo draws with matplotlib, which is missing; run pip install "pyflowmap[demo]"'
        ) from None
    matplotlib.use("Agg")  # no display needed


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def samples(path: Path, pictures: dict[int, Tensor]) -> None:
    """One row per number of steps; a column is one noise and one label."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(pictures), 1, figsize=(10, 0.56 * len(pictures)))
    for axis, (steps, drawn) in zip(axes, pictures.items()):
        axis.imshow(drawn[:, 0].permute(1, 0, 2).flatten(1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(f"{steps} step{'s' if steps > 1 else ''}", rotation=0, ha="right", va="center")
    figure.subplots_adjust(hspace=0.05)
    _save(figure, path)


def loss(path: Path, history: list[dict]) -> None:
    """Unweighted mean squared errors of both terms, running means over 50 steps."""
    import numpy as np
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    for key, name in (
        ("flow_matching", "flow matching (diagonal)"),
        ("progressive", "progressive (off-diagonal)"),
        ("lagrangian", "Lagrangian (off-diagonal)"),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            step, value = np.array(points).T
            width = min(50, len(value))
            axis.plot(step[width - 1 :], np.convolve(value, np.full(width, 1 / width), "valid"), label=name)
    axis.set(xlabel="training step", ylabel="mean squared error per pixel", yscale="log")
    axis.legend(frameon=False)
    _save(figure, path)


def quality(path: Path, results: list[dict], real: dict) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    panels = (
        ("frechet", "Fréchet distance of features"),
        ("sliced_wasserstein", "sliced Wasserstein distance"),
        ("accuracy", "named right"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.6))
    for axis, (key, name) in zip(axes, panels):
        for solver, label in _NAMES.items():
            points = [(row["evaluations"], row[key]) for row in results if row["solver"] == solver]
            axis.plot(*zip(*points), marker="o", label=label)
        axis.axhline(real[key], color="gray", linestyle=":", label="held-out real digits")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.xaxis.set_minor_locator(NullLocator())
        if key != "accuracy":
            axis.set_yscale("log")
        axis.set(xlabel="network evaluations per sample (guided)", ylabel=name)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)


def table(path: Path, result: dict) -> None:
    """Markdown: one row per solver and number of evaluations."""
    machine, training, real = result["machine"], result["training"], result["real"]
    lines = [
        f"{training['parameters']:,} parameters, {training['updates']} updates in {training['seconds']:.0f} s; "
        f"{machine['cores']} cores ({machine['processor']}), {machine['threads']} threads, torch {machine['torch']}. "
        f"Guidance {result['options']['guidance']:g}: each evaluation calls the network with and without the label.",
        "",
        "| solver | evaluations | steps | named right | Fréchet | sliced Wasserstein | ms per sample |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["results"]:
        lines.append(
            f"| {_NAMES[row['solver']]} | {row['evaluations']} | {row['steps']} | {100 * row['accuracy']:.1f} % "
            f"| {row['frechet']:.2f} | {row['sliced_wasserstein']:.4f} | {row['milliseconds_per_sample']:.2f} |"
        )
    lines.append(
        f"| real, held out | | | {100 * real['accuracy']:.1f} % | {real['frechet']:.2f} "
        f"| {real['sliced_wasserstein']:.4f} | |"
    )
    write_text(path, "\n".join(lines) + "\n")
