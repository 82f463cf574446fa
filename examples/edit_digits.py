"""Edit and restore real digits with the model that ships: another class, missing pixels, blur, a quarter of the pixels.

    python examples/edit_digits.py --out editing.png

draws one picture, rows of ten digits, and prints how many of the edits a classifier trained on real digits names as
they should be. A minute or two on two cores; needs pyflowmap[demo].
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import pyflowmap as pfm
from pyflowmap import editing

NONE = {"label": 10}  # the label that stands for no label


def another_class(model: pfm.FlowMap, images: Tensor, labels: Tensor, targets: Tensor, steps: int, seed: int) -> Tensor:
    """FlowEdit: the digit becomes another one and keeps what it can of slant and stroke."""
    return editing.flow_edit(
        model,
        images,
        steps,
        skip=steps // 4,
        source={"label": labels},
        target={"label": targets},
        guidance_source=pfm.guidance.cfg(1.5, null=NONE),
        guidance_target=pfm.guidance.cfg(3.0, null=NONE),
        seed=seed,
    )


def restored(model: pfm.FlowMap, operator, measurement: Tensor, labels: Tensor, steps: int, seed: int, **options):
    """FlowChef: a sample of the class that agrees with the measurement."""
    shape = (len(labels), 1, 28, 28)
    return editing.flow_chef(
        model, shape, measurement, operator, steps=steps, condition={"label": labels}, seed=seed, **options
    )


def hole() -> Tensor:
    """1 = known: all but a square in the middle."""
    mask = torch.ones(1, 1, 28, 28)
    mask[..., 8:20, 8:20] = 0.0
    return mask


def rows(model: pfm.FlowMap, images: Tensor, labels: Tensor, steps: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """What the picture shows, by name, top to bottom: each (N, 1, 28, 28) in [-1, 1]."""
    targets = (labels + 1) % 10
    mask, blur, coarse = hole(), editing.Blur.gaussian(2.0), editing.Downsample(4)
    blurred, small = blur.forward(images + 1.0) - 1.0, coarse.forward(images)  # outside the image is background, -1
    again = lambda operator, y, **o: restored(model, operator, y, labels, steps, seed, **o)  # noqa: E731
    background = blur.forward(torch.ones_like(images)) - 1.0  # A(x + 1) - 1 = A x + background
    return {
        "real digit": images,
        "FlowEdit: one more": another_class(model, images, labels, targets, steps, seed),
        "a hole": images * mask + (mask - 1.0),
        "inpainted": again(editing.Mask(mask), images, strength=1.0),
        "blurred": blurred,
        "deblurred": again(blur, blurred - background, strength=1.0, inner=5),
        "7 x 7 pixels": small.repeat_interleave(4, 2).repeat_interleave(4, 3),
        "super-resolution": again(coarse, small, strength=1.0),
    }


def draw(path: Path, pictures: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(next(iter(pictures.values())))
    figure, axes = pyplot.subplots(len(pictures), 1, figsize=(0.62 * count + 2.0, 0.66 * len(pictures)))
    for axis, (name, images) in zip(axes, pictures.items()):
        axis.imshow(images[:, 0].permute(1, 0, 2).flatten(1).clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.subplots_adjust(hspace=0.05)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("editing.png"))
    parser.add_argument("--count", type=int, default=10, help="digits, from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of each edit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from pyflowmap.cli.quality import train_classifier
    from pyflowmap.data import load_digits

    (train_images, train_labels), (images, labels) = load_digits()
    chosen = [int((labels == k % 10).nonzero()[k // 10]) for k in range(options.count)]
    images, labels = images[chosen], labels[chosen]
    begin = time.perf_counter()
    pictures = rows(pfm.load("digits"), images, labels, options.steps, options.seed)
    print(f"{time.perf_counter() - begin:.1f} s for the edits of {len(images)} digits")
    classifier = train_classifier(train_images, train_labels, epochs=5)
    for name in ("FlowEdit: one more", "inpainted", "deblurred", "super-resolution"):
        wanted = (labels + 1) % 10 if name.startswith("FlowEdit") else labels
        error = float((pictures[name] - images).square().mean().sqrt())
        right = 100 * classifier.accuracy(pictures[name], wanted)
        print(f"{name:20} {right:.0f} % named as wanted, root mean square from the real digit {error:.2f}")
    draw(options.out, pictures)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
