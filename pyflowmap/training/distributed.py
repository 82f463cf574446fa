"""One process or several: what wraps the step, and the few things that processes must agree on."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Distribution", "full", "local"]


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; every process must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class Distribution:
    """None: this process alone. "ddp": DistributedDataParallel. "fsdp": FSDP2, whose parameters are sharded.

    Both are started by torchrun, or by one's own init_process_group. FSDP2 shards each entry of the network's
    ModuleLists (its blocks) and the rest as one group.
    """

    def __init__(self, kind: str | None, device: torch.device):
        if kind not in (None, "ddp", "fsdp"):
            raise ValueError(f'distribution = {kind!r}; it is None, "ddp" or "fsdp"')
        self.kind, self.device, self.rank, self.world, self.owner = kind, device, 0, 1, False
        if kind is None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    f"{os.environ['WORLD_SIZE']} processes were started but distribution = None: each would train "
                    'alone and write over the others; pass distribution="ddp" or "fsdp"'
                )
            return
        import torch.distributed as dist

        if not dist.is_available():
            raise RuntimeError(f'distribution = "{kind}" needs a torch with torch.distributed; this one has none')
        if not dist.is_initialized():
            if "RANK" not in os.environ:
                raise RuntimeError(f'distribution = "{kind}" runs under torchrun: torchrun --nproc-per-node 2 train.py')
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.owner = True
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """The process that writes."""
        return self.rank == 0

    def wrap(self, step: Any) -> tuple[nn.Module, nn.Module | None]:
        """What is called in place of `step`, and for a sharded one an unsharded copy of its network."""
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(step), None
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            template = copy.deepcopy(step.network).cpu()
            mesh = init_device_mesh(self.device.type, (self.world,))
            for module in step.network.modules():
                if isinstance(module, nn.ModuleList):
                    for block in module:
                        fully_shard(block, mesh=mesh)
            fully_shard(step, mesh=mesh)
            return step, template
        return step, None

    # ---- agreeing ----------------------------------------------------------------------------------------------------

    def sum(self, numbers: list[Tensor | float]) -> list[float]:
        """Each number summed over the processes, in float64: one message, and the one read of the device in a step."""
        on_device = [torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in numbers]
        vector = torch.stack(on_device)
        if self.world > 1:
            torch.distributed.all_reduce(vector)
        return vector.tolist()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in order; between processes of one run, never through a file."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def together(self, error: Exception | None) -> None:
        """Raise here what any process raised, so that none waits for one that is gone."""
        errors = self.gather(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise RuntimeError(f"process {rank} of {self.world} failed: {other[0]}: {other[1]}")

    def close(self) -> None:
        if self.owner and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            self.owner = False
