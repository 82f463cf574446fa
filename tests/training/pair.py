"""One of two processes that train with the Trainer: `python pair.py RANK FOLDER`. Results are JSON lines."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import small
import torch
import torch.distributed as dist

from pyflowmap import objectives
from pyflowmap.training import Trainer

STEPS = 10


def train(kind: str | None, rank: int, world: int, folder: Path | None, steps: int = STEPS, **options) -> dict:
    stream = small.Stream(rank=rank, world=world, poison=options.pop("poison", None))
    step = small.step(*options.pop("objective", ()), **options.pop("given", {}))
    trainer = Trainer(
        step,
        stream,
        steps=steps,
        folder=folder,
        distribution=kind,
        progress=False,
        clip=0.5,
        ema=(0.9,),
        dropout={"label": (4, 0.3)},
        log_every=1,
        **options,
    )
    result = trainer.fit()
    names = dict(result.step.network.named_parameters())
    out = {f"weights/{n}": p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in names.items()}
    out |= {f"ema/{n}": p for n, p in result.ema[0.9].named_parameters()}
    return {n: p.detach().clone() for n, p in out.items()}


def gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def agree(kind: str, rank: int, folder: Path) -> dict:
    """Two processes against one, with a sample that is NaN in one process in step 4."""
    poison = {3: [1]}
    both = train(kind, rank, 2, None, poison=poison)
    return {"gap": gap(both, train(None, 0, 1, None, poison=poison)), "moved": gap(both, train(None, 0, 1, None, 1))}


def library(kind: str, rank: int, folder: Path) -> dict:
    """The library's own objectives, half of the rows on the diagonal: two processes against one."""
    found = {}
    cases = ((objectives.mean_flow, "equal"), (objectives.lagrangian, "diagonal"), (objectives.progressive, "diagonal"))
    for objective, share in cases:
        given = {"objective": (objective,), "given": {share: 0.5}}
        both, one = train(kind, rank, 2, None, **given), train(None, 0, 1, None, **given)
        found[objective.__name__] = {"gap": gap(both, one), "moved": gap(both, train(None, 0, 1, None, 1, **given))}
    return found


def resume(kind: str, rank: int, folder: Path) -> dict:
    """Half the way on two processes, the rest on two again, saved; and the unbroken run."""
    half = train(kind, rank, 2, folder / f"{kind}-2", 5)
    again = train(kind, rank, 2, folder / f"{kind}-2")
    unbroken = train(kind, rank, 2, None)
    files = sorted(p.name for p in (folder / f"{kind}-2" / "checkpoints" / "step-000000005").iterdir())
    return {"gap": gap(again, unbroken), "moved": gap(half, again), "files": files}


def spread(kind: str, rank: int, folder: Path) -> dict:
    """Started on one process, continued on two."""
    if rank == 0:
        train(None, 0, 1, folder / f"{kind}-spread", 5)
    dist.barrier()
    return {"gap": gap(train(kind, rank, 2, folder / f"{kind}-spread"), train(None, 0, 1, None))}


def pictures(kind: str, rank: int, folder: Path) -> dict:
    """In bfloat16: the first process alone draws, from whole weights, those of the average."""
    drawn: list[dict] = []

    def sample(flow_map, step):
        x, label = torch.ones(4, 3, dtype=torch.float64), torch.arange(4)
        flow_map.jump(x, 0.0, 1.0, label=label)
        drawn.append({f"ema/{n}": p.detach().clone() for n, p in flow_map.network.named_parameters()})
        return torch.zeros(2, 1, 4, 4)

    options = dict(sample=sample, sample_every=5, precision="bfloat16")
    out = train(kind, rank, 2, folder / f"{kind}-pictures", **options)
    averages = {n: p for n, p in out.items() if n.startswith("ema/")}
    names = sorted(p.name for p in (folder / f"{kind}-pictures" / "samples").glob("*.png"))
    return {"drawn": len(drawn), "gap": gap(drawn[-1], averages) if drawn else None, "files": names}


def failure(kind: str, rank: int, folder: Path) -> dict:
    """The first process cannot write: both raise."""
    here = folder / f"{kind}-failure"
    if rank == 0:
        here.mkdir()
        (here / "checkpoints").write_text("a file where a folder should be")
    dist.barrier()
    try:
        train(kind, rank, 2, here, 2)
    except (OSError, RuntimeError) as error:
        return {"message": str(error)}
    return {"message": None}


EACH = (agree, library, resume, spread, pictures, failure)
JOBS = {f"{job.__name__} {kind}": (job, kind) for kind in ("ddp", "fsdp") for job in EACH}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(folder / f"{rank}.json", "w", encoding="utf8") as file:
        for i, (name, (job, kind)) in enumerate(JOBS.items()):
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store.{i}",
                rank=rank,
                world_size=2,
                timeout=timedelta(seconds=30),
            )
            try:
                found = job(kind, rank, folder)
            except Exception:
                found = {"raised": traceback.format_exc()}
            file.write(json.dumps({"name": name, **found}) + "\n")
            file.flush()
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
