"""The 2-D table of "How to build a consistency model" (Boffi, Albergo & Vanden-Eijnden 2025), trained from scratch.

    python examples/checkerboard/run.py                          # a CPU's budget: 4 x 240 s, batches of 1024
    python examples/checkerboard/run.py --full --folder runs/full  # the paper's: 250,000 steps of 100,000 rows each

Writes results.json and table.png beside this file (or into --out). Killed, the same command goes on: each method is a
run of `pyflowmap train` in --folder. KL(data || model) is that of two histograms, `pfm.data.checkerboard.divergence`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

import pyflowmap as pfm
from pyflowmap import recipes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = (1, 2, 4, 8, 16)
PAPER = {  # KL at those steps
    "lsd": (0.0864, 0.0765, 0.0708, 0.0699, 0.0710),
    "psd_m": (0.1456, 0.0891, 0.0812, 0.0717, 0.0689),
    "psd_u": (0.1113, 0.1067, 0.0747, 0.0727, 0.0679),
    "esd": (0.0983, 0.0921, 0.0834, 0.0816, 0.0751),
}
HERE = Path(__file__).resolve().parent


def drawn(flow_map: pfm.FlowMap, count: int, steps: int) -> torch.Tensor:
    return pfm.sample(flow_map, (count, 2), steps, seed=12345, chunk=16384)


def train(method: str, args: argparse.Namespace) -> dict:
    """One method to its budget; the KL of the averaged network along the way and at the end."""
    recipe = recipes.load(f"checkerboard_{method}")
    if not args.full:
        changes = [f"seconds={args.seconds}", f"batch={args.batch}", "ema=[0.999]", "save_every=500"]
        recipe = recipes.changed(recipe, changes)
    board = recipe.data()
    curve: list[dict] = []
    folder = Path(args.folder) / method
    begin = time.perf_counter()

    def look(flow_map: pfm.FlowMap, step: int) -> torch.Tensor:
        shown = {n: board.divergence(drawn(flow_map, args.look, n)) for n in (1, 4)}
        curve.append({"step": step, "seconds": round(time.perf_counter() - begin, 1), "kl": shown})
        return torch.zeros(1, 1, 8, 8)

    result = recipe.trainer(folder, sample=look, sample_every=args.every, log_every=50).fit()
    network = list(result.ema.values())[-1].eval()
    flow_map = pfm.FlowMap(network)
    clouds = {n: drawn(flow_map, args.count, n) for n in STEPS}
    return {
        "updates": result.steps,
        "rows": result.steps * recipe.batch,
        "seconds": json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["seconds"],
        "ended": result.stopped,
        "kl": [board.divergence(clouds[n]) for n in STEPS],
        "curve": curve,
        "clouds": clouds,
    }


def picture(path: Path, found: dict, board) -> None:
    figure, axes = plt.subplots(
        len(STEPS) + 1, len(found), figsize=(2.6 * len(found), 2.4 * (len(STEPS) + 1)), squeeze=False
    )
    edges = np.linspace(-1.3 * board.half, 1.3 * board.half, 120)
    for column, (method, result) in enumerate(found.items()):
        for row, n in enumerate(STEPS):
            x = result["clouds"][n].numpy()
            axis = axes[row][column]
            axis.hist2d(x[:, 0], x[:, 1], bins=[edges, edges], cmap="magma", vmax=2.5 * len(x) / 2 / (92 * 92))
            axis.set_title(
                f"{method.upper().replace('_', '-')}, {n} step{'s' * (n > 1)}: {result['kl'][row]:.3f}", fontsize=8
            )
            axis.set_xticks([]), axis.set_yticks([])
            axis.set_aspect("equal")
        axis = axes[-1][column]
        for n, style in ((1, "C0"), (4, "C1")):
            points = [(each["seconds"], each["kl"][n]) for each in result["curve"]]
            if points:
                axis.plot(*zip(*points), style, marker=".", label=f"{n} step{'s' * (n > 1)}")
            axis.axhline(PAPER[method][STEPS.index(n)], color=style, ls=":", lw=1)
        axis.set_yscale("log"), axis.tick_params(labelsize=6)
        axis.set_xlabel("seconds of training (dotted: the paper's KL)", fontsize=6)
        axis.legend(fontsize=6)
    figure.suptitle("KL(data || model) of the checkerboard", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the paper's own settings; days on a CPU")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training per method, without --full")
    parser.add_argument("--batch", type=int, default=1024, help="without --full")
    parser.add_argument("--methods", nargs="+", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--folder", default="runs/checkerboard")
    parser.add_argument("--out", default=str(HERE))
    parser.add_argument("--count", type=int, default=65536, help="samples of the final KL")
    parser.add_argument("--look", type=int, default=16384, help="samples of the KL along the way")
    parser.add_argument("--every", type=int, default=500, help="updates between looks")
    args = parser.parse_args()

    board = recipes.load("checkerboard_lsd").data()
    found = {method: train(method, args) for method in args.methods}
    rows = np.arange(args.count)
    true = [board.divergence(board.batch(rows + k * args.count)[0]) for k in range(20)]
    results = {
        "what": "KL(data || model) at 1, 2, 4, 8 and 16 steps",
        "estimator": f"two histograms, {args.count} samples; see pyflowmap.data.checkerboard.divergence",
        "of true data": {"mean": statistics.mean(true), "std": statistics.stdev(true)},
        "settings": "the paper's"
        if args.full
        else f"the paper's, but batches of {args.batch} and {args.seconds:g} s each",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "steps": STEPS,
        "paper": {method: PAPER[method] for method in found},
        "here": {m: {k: v for k, v in each.items() if k != "clouds"} for m, each in found.items()},
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(out / "table.png", found, board)
    print(f"{'':8}" + "".join(f"{n:>9}" for n in STEPS))
    for method, each in found.items():
        print(f"{method:8}" + "".join(f"{kl:9.4f}" for kl in each["kl"]) + f"   {each['updates']} updates")
        print(f"{'  paper':8}" + "".join(f"{kl:9.4f}" for kl in PAPER[method]))
    print(f"true data: {statistics.mean(true):.4f} +- {statistics.stdev(true):.4f}")


if __name__ == "__main__":
    main()
