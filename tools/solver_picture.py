"""docs/quality.png: quality of the shipped digits model against network evaluations, one line per solver.

    python tools/solver_picture.py --out docs/quality.png
    python tools/solver_picture.py --solvers euler heun --nfe 2 4 --count 100

Every solver starts from the same noise and spends the same budget, guidance counted as one evaluation of the guided
field. A solver that is not in this build, or cannot spend a budget exactly, is left out and named. Beside the picture
goes a table, with .md for .png. Minutes on two cores; needs pyflowmap[demo].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pyflowmap as pfm
from pyflowmap.cli.quality import frechet_distance, sliced_wasserstein, train_classifier
from pyflowmap.data import load_digits
from pyflowmap.files import whole_file

SOLVERS = (
    "flow_map", "euler", "heun", "midpoint", "adams_bashforth_2", "deis_2", "dpm_solver_pp_2m", "unipc_2",
)  # fmt: skip
PANELS = {
    "frechet": "Fréchet distance of features",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "error": "distance from the exact ODE",
    "accuracy": "named right",
}


def exact(model: pfm.FlowMap, noise: torch.Tensor, steps: int, options: dict) -> torch.Tensor:
    """The ODE's own end, by Heun in many steps: what every solver but the flow map converges to."""
    return pfm.sample(model, noise, steps, solver="heun", **options)


def measure(solvers, budgets, count: int, scale: float, seed: int, reference: int, epochs: int) -> tuple[list, dict]:
    """One row per solver and budget that it can spend, and the same figures of real digits held out."""
    model = pfm.load("digits")
    (images, labels), (held, held_labels) = load_digits()
    classifier = train_classifier(images, labels, epochs=epochs)
    features, label = classifier.features(images), torch.arange(count) % 10
    guidance = pfm.guidance.cfg(scale, null={"label": 10}) if scale != 1.0 else None
    options = {"condition": {"label": label}, "guidance": guidance}
    noise = pfm.evaluate(pfm.noise(torch.empty(count, 1, 28, 28), seed=seed))
    end = exact(model, noise, reference, options)
    found = []
    for name in solvers:
        solver = pfm.solvers.named.get(name)
        if solver is None:
            print(f"{name}: not in this build")
            continue
        for nfe in budgets:
            extra = {"seed": seed} if solver.stochastic else {}
            try:
                solver.steps_for(nfe)
                drawn = pfm.sample(model, noise, nfe=nfe, solver=solver, **options, **extra)
            except (ValueError, FloatingPointError) as reason:
                print(f"{name}: {reason}")
                continue
            seen = drawn.clamp(-1, 1)
            found.append(
                {
                    "solver": name,
                    "nfe": nfe,
                    "frechet": frechet_distance(classifier.features(seen), features),
                    "sliced_wasserstein": sliced_wasserstein(seen, images),
                    "error": float((drawn - end).square().mean().sqrt()),
                    "accuracy": classifier.accuracy(seen, label),
                }
            )
            print("  ".join(f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in found[-1].values()), flush=True)
    few = held[:count]  # as many as were drawn: both distances fall with the number of samples
    real = {
        "frechet": frechet_distance(classifier.features(few), features),
        "sliced_wasserstein": sliced_wasserstein(few, images),
        "accuracy": classifier.accuracy(held, held_labels),
    }
    return found, real


def draw(path: Path, found: list[dict], real: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    budgets = sorted({row["nfe"] for row in found})
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4.3 * len(PANELS), 3.8))
    for axis, (key, name) in zip(axes, PANELS.items()):
        for solver in dict.fromkeys(row["solver"] for row in found):
            points = [(row["nfe"], row[key]) for row in found if row["solver"] == solver]
            axis.plot(*zip(*points), marker="o", markersize=4, label=solver)
        if key in real:
            axis.axhline(real[key], color="gray", linestyle=":", label="real digits, held out")
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(n) for n in budgets])
        axis.xaxis.set_minor_locator(NullLocator())
        if key != "accuracy":
            axis.set_yscale("log")
        axis.set(xlabel="network evaluations", ylabel=name)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def table(path: Path, found: list[dict], real: dict, note: str) -> None:
    lines = [
        note,
        "",
        "| solver | NFE | named right | Fréchet | sliced Wasserstein | from the exact ODE |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        lines.append(
            f"| {row['solver']} | {row['nfe']} | {100 * row['accuracy']:.1f} % | {row['frechet']:.2f} "
            f"| {row['sliced_wasserstein']:.4f} | {row['error']:.4f} |"
        )
    lines.append(
        f"| real, held out | | {100 * real['accuracy']:.1f} % | {real['frechet']:.2f} "
        f"| {real['sliced_wasserstein']:.4f} | |"
    )
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/quality.png"))
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, help="names in pfm.solvers.named")
    parser.add_argument("--nfe", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--count", type=int, default=150, help="samples, at least 70 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; 1: none (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=48, help="Heun steps of the exact ODE (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of the classifier (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.count < 70:
        raise SystemExit(f"--count {options.count}; 64 features need at least 70 samples")
    torch.manual_seed(options.seed)
    found, real = measure(
        options.solvers, options.nfe, options.count, options.guidance, options.seed, options.reference, options.epochs
    )
    if not found:
        raise SystemExit(f"none of {', '.join(options.solvers)} can spend {options.nfe} evaluations in this build")
    note = (
        f"{options.count} samples from one noise, guidance {options.guidance:g}, against 4,000 real digits; "
        f"the exact ODE is Heun in {options.reference} steps. torch {torch.__version__}, "
        f"pyflowmap {pfm.__version__}."
    )
    draw(options.out, found, real)
    table(options.out.with_suffix(".md"), found, real, note)
    print(f"wrote {options.out} and {options.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
