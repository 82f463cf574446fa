"""One of two processes that train under DDP and FSDP2: `python distributed_worker.py RANK STORE RESULTS`.

Each configuration trains `pfm.training.Step` for ten steps on its half of each batch, and is compared with the same
training in one process on the whole batch, written with torch.func.jvp. Results are JSON lines, one per configuration.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from by_torch import jvp as jvp_by_torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyflowmap as pfm
from pyflowmap.objectives.loss import Loss

STEPS, ROWS, WORLD = 10, 8, 2


class Configuration(NamedTuple):
    name: str
    wrap: Callable[[nn.Module], tuple[nn.Module, nn.Module]]  # Step -> what is called, and what holds the parameters
    loss: str
    dtype: torch.dtype = torch.float64


# ---- the losses -----------------------------------------------------------------------------------------------------


def slope(flow_map: Any, x1: Tensor, *, condition: dict, jvp: Callable, tracked: bool, diagonal: bool = True) -> Loss:
    """|| u - v - (t-s) du/ds ||^2, the right side a target or not, and || u_{s,s} - v ||^2 by a second call."""
    x0, s, t = condition["x0"], condition["s"], condition["t"]
    net, span = flow_map.network, (t - s)[:, None, None]
    x, v = torch.lerp(x0, x1, s[:, None, None]), x1 - x0
    options = {"track_tangent": True} if tracked and jvp is pfm.jvp else {}
    u, du = jvp(lambda x, s: net(x, s, t), (x, s), (v, torch.ones_like(s)), **options)
    error = u - v - span * (du if tracked else du.detach())
    rows = error.square().mean(dim=(1, 2))
    if diagonal:
        rows = rows + (net(x, s, s) - v).square().mean(dim=(1, 2))
    return Loss(rows, rows.detach())


def published(flow_map: Any, x1: Tensor, *, condition: dict, jvp: Callable, objective: Callable, **rest: Any) -> Loss:
    """An objective of the library, with the noise and times of the batch. Its own jvp: the reference is one process."""
    pair = condition["s"], condition["t"]
    return objective(flow_map, x1, x0=condition["x0"], times=lambda x1: pair, **rest)


LOSSES = {
    "to a target": functools.partial(slope, tracked=False),
    "through the tangent": functools.partial(slope, tracked=True),
    "to a target, one call": functools.partial(slope, tracked=False, diagonal=False),
    "through the tangent, one call": functools.partial(slope, tracked=True, diagonal=False),
    "lagrangian": functools.partial(published, objective=pfm.objectives.lagrangian, diagonal=0.5),
    "mean_flow": functools.partial(published, objective=pfm.objectives.mean_flow, equal=0.5),
}


def batches(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(STEPS):
        x = torch.randn(2, ROWS, 6, 4, generator=generator, dtype=torch.float64)
        s, span = torch.rand(2, ROWS, generator=generator, dtype=torch.float64)
        rows.append({"x1": x[0].to(dtype), "x0": x[1].to(dtype), "s": s.to(dtype), "t": (s + span * (1 - s)).to(dtype)})
    return rows


def network(dtype: torch.dtype) -> nn.Module:
    from small_dit import SmallDiT

    torch.manual_seed(0)
    return SmallDiT().to(dtype)


# ---- training -------------------------------------------------------------------------------------------------------


def name_of(parameter: str) -> str:
    """Without what wrappers put into it."""
    return parameter.replace("_checkpoint_wrapped_module.", "").replace("module.", "").removeprefix("network.")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def part(x: Tensor, rank: int) -> Tensor:
    """This process' rows: of each half the same share, since objectives treat the first rows otherwise."""
    return torch.cat([half.chunk(WORLD)[rank] for half in x.chunk(2)])


def train(call: nn.Module, owner: nn.Module, rank: int | None, dtype: torch.dtype) -> tuple[dict, list[str]]:
    """The parameters after training, and every (step, parameter) without a gradient. Rank None: the whole batch."""
    optimiser = torch.optim.SGD(owner.parameters(), lr=0.1, momentum=0.5)
    missing = []
    for k, batch in enumerate(batches(dtype)):
        if rank is not None:
            batch = {key: part(value, rank) for key, value in batch.items()}
        optimiser.zero_grad(set_to_none=True)
        loss, _ = call(batch.pop("x1"), **batch)
        loss.backward()
        for name, parameter in owner.named_parameters():
            if parameter.grad is None or not whole(parameter.grad).abs().sum() > 0:
                missing.append(f"step {k}: {name_of(name)}")
        optimiser.step()
    return {name_of(name): whole(p.detach()).double() for name, p in owner.named_parameters()}, missing


@functools.cache
def one_process(loss: str) -> dict[str, Tensor]:
    step = pfm.training.Step(network(torch.float64), LOSSES[loss], jvp=jvp_by_torch)
    parameters, missing = train(step, step, None, torch.float64)
    if missing:
        raise RuntimeError(f"the reference itself lacks gradients: {missing}")
    return parameters


# ---- ways to wrap ---------------------------------------------------------------------------------------------------


def ddp(**options: Any) -> Callable:
    def wrap(step: nn.Module) -> tuple[nn.Module, nn.Module]:
        wrapped = DistributedDataParallel(step, **options)
        return wrapped, wrapped

    return wrap


def ddp_network(**options: Any) -> Callable:
    """The network alone is wrapped, so Duals pass through DDP itself."""

    def wrap(step: nn.Module) -> tuple[nn.Module, nn.Module]:
        step.network = DistributedDataParallel(step.network, **options)
        return step, step

    return wrap


graphs = 0


def counted(graph: Any, inputs: list[Any]) -> Any:
    """The compiler "aot_eager", and that it ran."""
    global graphs
    graphs += 1
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def fsdp(checkpointed: bool = False, compiled: bool = False, **options: Any) -> Callable:
    def wrap(step: nn.Module) -> tuple[nn.Module, nn.Module]:
        mesh = init_device_mesh("cpu", (WORLD,))
        blocks = step.network.blocks
        for i, block in enumerate(blocks):
            if checkpointed:
                blocks[i] = block = checkpoint_wrapper(block)  # of the non-reentrant kind
            if compiled:
                block.compile(backend=counted, fullgraph=True)
            fully_shard(block, mesh=mesh, **options)
        fully_shard(step, mesh=mesh, **options)
        return step, step

    return wrap


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_BOTH = ("to a target", "through the tangent")
_ONE_CALL = ("to a target, one call", "through the tangent, one call")
_OURS = ("lagrangian", "mean_flow")
_WAYS: list[tuple[str, Callable, tuple[str, ...]]] = [
    ("ddp", ddp(), _BOTH + _OURS),
    ("ddp find_unused_parameters", ddp(find_unused_parameters=True), _BOTH + _OURS),
    ("ddp static_graph", ddp(static_graph=True), _BOTH + _OURS),
    ("ddp of the network", ddp_network(), _ONE_CALL),
    ("ddp of the network, find_unused_parameters", ddp_network(find_unused_parameters=True), _ONE_CALL),
    ("ddp of the network, static_graph", ddp_network(static_graph=True), _ONE_CALL),
    ("fsdp2", fsdp(), _BOTH + _OURS),
    ("fsdp2 bf16", fsdp(mp_policy=BF16), _BOTH),
    ("fsdp2 checkpoint", fsdp(checkpointed=True), _BOTH + _OURS),
    ("fsdp2 compile", fsdp(compiled=True), _ONE_CALL),
    ("fsdp2 checkpoint compile", fsdp(checkpointed=True, compiled=True), _ONE_CALL[1:]),
]
CONFIGURATIONS = [
    Configuration(f"{name}: {loss}", wrap, loss, torch.float32 if "bf16" in name else torch.float64)
    for name, wrap, losses in _WAYS
    for loss in losses
]
REFUSALS = ("as_tensor under ddp", "as_tensor under fsdp2")


def trained(config: Configuration, rank: int) -> dict[str, Any]:
    step = pfm.training.Step(network(config.dtype), LOSSES[config.loss], jvp=pfm.jvp)
    global graphs
    graphs = 0
    start = {name_of(n): p.detach().double().clone() for n, p in step.named_parameters()}
    call, owner = config.wrap(step)
    parameters, missing = train(call, owner, rank, config.dtype)
    expected = one_process(config.loss)
    if parameters.keys() != expected.keys():
        raise RuntimeError(f"parameters {sorted(parameters)} instead of {sorted(expected)}")
    error = {n: (p - expected[n]).norm().item() for n, p in parameters.items()}
    moved = {n: (p - start[n]).norm().item() for n, p in expected.items()}
    return {
        "missing": missing,
        "graphs": graphs,
        "error": max(error.values()),
        "relative": max(error[n] / moved[n] for n in error),  # to how far the parameter travelled
        "moved": min(moved.values()),
    }


def refused(name: str) -> dict[str, Any]:
    """What pfm.jvp(as_tensor=True) says where a TensorDual would enter a wrapped module."""
    net = network(torch.float64)
    if "ddp" in name:
        net = DistributedDataParallel(net)
    else:
        fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    x, s = torch.randn(2, 6, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    messages = []
    for function in (net, lambda *args: net(*args)):
        try:
            pfm.jvp(function, (x, s, s), (x, None, None), as_tensor=True)
            messages.append(None)
        except TypeError as error:
            messages.append(str(error))
    return {"messages": messages}


def main() -> None:
    rank, store, results = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    jobs: list[tuple[str, Callable]] = [(c.name, functools.partial(trained, c, rank)) for c in CONFIGURATIONS]
    jobs += [(name, functools.partial(refused, name)) for name in REFUSALS]
    with open(results, "w", encoding="utf8") as file:
        for i, (name, job) in enumerate(jobs):
            # A group for each: where one process raises it hangs up, and the other, which waits for it, raises too.
            dist.init_process_group(
                "gloo", init_method=f"file://{store}.{i}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
            )
            try:
                found = job()
            except Exception:
                found = {"raised": traceback.format_exc()}
            file.write(json.dumps({"name": name, **found}) + "\n")
            file.flush()
            dist.destroy_process_group()
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
