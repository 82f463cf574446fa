"""`pyflowmap demo`: train a flow map on real digits, sample it in 1 to 16 steps, and measure it beside ODE solvers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = (1, 2, 4, 8, 16)
SECONDS, UPDATES = 165.0, 6000
OBJECTIVES = ("progressive", "lagrangian")


def add(subparsers) -> None:
    parser = subparsers.add_parser("demo", help="train on real digits in minutes and write pictures, plots and a table")
    parser.add_argument("--out", default="demo", help="folder to write into (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="wall clock for training (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="most training steps (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="20 s of training and 100 samples: does it run, not how good"
    )
    parser.add_argument("--count", type=int, default=500, help="samples per measurement (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance; 1: none")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="what is learned (default: %(default)s)"
    )
    parser.add_argument("--channels", type=int, default=16, help="width of the U-Net")
    parser.add_argument("--batch", type=int, default=32, help="rows of an update (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--save", default=None, help="write the flow map here too (.safetensors, weights in float16)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from .. import recipes
    from ..data import load_digits
    from ..files import writable_folder
    from . import report
    from .quality import train_classifier

    out = writable_folder(args.out)  # all that can be wrong is looked at before the minutes of work
    if args.save is not None:
        if not args.save.endswith(".safetensors"):
            raise ValueError(f"--save {args.save}: the file name ends in .safetensors")
        writable_folder(Path(args.save).parent)
    report.require_matplotlib()
    seconds, count = (min(args.seconds, 20.0), min(args.count, 100)) if args.fast else (args.seconds, args.count)
    if not seconds > 0.0 or count < 70:
        raise ValueError(
            f"--seconds {seconds:g} --count {count}; seconds are positive, and 64 features need at least 70 samples"
        )
    (images, labels), (held_images, held_labels) = load_digits()

    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    classifier = train_classifier(images, labels, epochs=5 if args.fast else 20)
    real = {"accuracy": classifier.accuracy(held_images, held_labels)}
    print(
        f"classifier: {100 * real['accuracy']:.1f} % of {len(held_images)} held-out real digits named right, "
        f"{time.perf_counter() - begin:.0f} s"
    )

    history: list[dict] = []
    recipe: Any = recipes.load("digits")
    recipe = replace(
        recipe,
        method=args.objective,
        channels=args.channels,
        steps=args.updates,
        seconds=seconds,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        log_every=1,
        sample_every=0,
    )
    trained = recipe.trainer(callback=history.append).fit()
    model = trained.step.flow_map(trained.ema[recipe.ema[-1]])
    if args.save is not None:  # now, so that minutes of training survive an interrupted measurement
        model.save(args.save, dtype=torch.float16)
    rows = measure(model, classifier, images, held_images, count, args.guidance, args.seed)
    real |= rows.pop("real")
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "options": {k: v for k, v in vars(args).items() if k not in ("command", "run", "out", "save")},
        "training": {
            "updates": trained.steps,
            "seconds": history[-1]["seconds"],
            "final_error": sum(record["error"] for record in history[-100:]) / len(history[-100:]),
            "parameters": sum(p.numel() for p in model.network.parameters()),
        },
        "real": real,
        "results": rows["results"],
        "seconds": time.perf_counter() - begin,
    }
    report.samples(out / "samples.png", rows["pictures"])
    report.loss(out / "loss.png", history)
    report.quality(out / "quality.png", rows["results"], real)
    report.table(out / "table.md", result)
    report.write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
    if args.save is not None:
        notes = {key: result[key] for key in ("machine", "options", "training", "real", "results")}
        model.save(args.save, dtype=torch.float16, notes=notes)
    print((out / "table.md").read_text())
    print(
        f"{result['seconds']:.0f} s in all; "
        f"wrote samples.png, loss.png, quality.png, table.md and metrics.json into {out}/"
    )


def measure(model, classifier, images, held_images, count: int, scale: float, seed: int) -> dict:
    """Accuracy, distances and milliseconds of the flow map, Euler and Heun at equal network evaluations."""
    import torch
    from tqdm.auto import tqdm

    from ..guidance import cfg
    from ..sampling import sample
    from .quality import frechet_distance, sliced_wasserstein

    label = torch.arange(count) % 10
    options: dict[str, Any] = {
        "condition": {"label": label},
        "guidance": cfg(scale, null={"label": 10}),
        "seed": seed + 1,
    }
    features = classifier.features(images)
    runs = (
        [("flow_map", n, n) for n in STEPS]
        + [("euler", n, n) for n in STEPS]
        + [("heun", n, n // 2) for n in STEPS[1:]]
    )
    results, pictures = [], {}
    for solver, evaluations, steps in tqdm(runs, desc="sampling", unit="run"):
        begin = time.perf_counter()
        drawn = sample(model, (count, *images.shape[1:]), steps, solver=solver, **options).clamp(-1, 1)
        elapsed = time.perf_counter() - begin
        results.append(
            {
                "solver": solver,
                "evaluations": evaluations,
                "steps": steps,
                "accuracy": classifier.accuracy(drawn, label),
                "frechet": frechet_distance(classifier.features(drawn), features),
                "sliced_wasserstein": sliced_wasserstein(drawn, images),
                "milliseconds_per_sample": 1000 * elapsed / count,
            }
        )
        if solver == "flow_map":
            pictures[steps] = drawn[:20]
    real = {
        "frechet": frechet_distance(classifier.features(held_images), features),
        "sliced_wasserstein": sliced_wasserstein(held_images, images),
    }
    return {"results": results, "pictures": pictures, "real": real}
