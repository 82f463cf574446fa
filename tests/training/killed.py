"""Lives of a training run that ends by kill -9: `python killed.py FOLDER STEPS [LIVES SEED]`.

Each life is a fork of this process, so that importing torch is paid once; it is killed at a random step, found by
watching its history, or somewhere in the write after it. The last life runs to the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import small
import torch

from pyflowmap.training import Trainer


def live(folder: Path, steps: int) -> None:
    options = dict(save_every=2, keep=2, log_every=1, progress=False, ema=(0.9, 0.99), optimizer="muon", lr=1e-2)
    step = small.step(dropout=0.2, dtype=torch.float32)
    Trainer(
        step,
        small.Stream(dtype=torch.float32, poison={9: [2]}),
        steps=steps,
        folder=folder,
        dropout={"label": (4, 0.3)},
        schedule="cosine",
        warmup=5,
        **options,
    ).fit()


def lines(folder: Path) -> int:
    try:
        return (folder / "history.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def main() -> None:
    folder, steps, lives, seed = Path(sys.argv[1]), *map(int, [*sys.argv[2:], "0", "0"][:3])
    torch.set_num_threads(1)
    draw, killed = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            live(folder, steps)
            os._exit(0)
        if killed == lives:
            _, status = os.waitpid(child, 0)
            print(f"killed {killed}, then ended with {status}")
            sys.exit(status != 0)
        time.sleep(0.02)  # the history is cut back first
        target = lines(folder) + draw.randint(1, 4)
        while lines(folder) < target:
            time.sleep(0.0005)
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit(f"a life ended before it was killed ({killed} of {lives})")
        time.sleep(draw.uniform(0.0, 0.004))  # somewhere in the step, or in the write
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)


if __name__ == "__main__":
    main()
