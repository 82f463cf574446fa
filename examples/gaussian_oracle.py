"""Train a flow map whose exact answer is known: data N(0.7, 0.5^2), one number per sample.

    python examples/gaussian_oracle.py --objective lagrangian
    torchrun --nproc-per-node 2 examples/gaussian_oracle.py --objective mean_flow

prints the relative error of the jump X_{0,1} and of jumps X_{s,t} between random times, over the distribution of x_s.
About ten seconds on one core.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyflowmap as pfm

MEAN, STD = 0.7, 0.5
# The weight counts squares as they are: with one number per sample, MeanFlow's own, 1 / (error + c), would seek a mode.
OBJECTIVES = {
    "lagrangian": pfm.objectives.lagrangian,
    "mean_flow": partial(pfm.objectives.mean_flow, equal=0.5, weight=pfm.weights.constant()),
}


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t = t x1 + (1 - t) x0."""
    return ((1.0 - t) ** 2 + (t * STD) ** 2).sqrt()


def exact_jump(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return t * MEAN + (x - s * MEAN) * spread(t) / spread(s)


class Network(nn.Module):
    """u(x, s, t): one hidden layer, scaled and shifted by the times."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.first, self.last = nn.Linear(1, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.times(4.0 * torch.stack([s - 0.5, t - s - 0.5], 1)).chunk(2, 1)
        return self.last(nn.functional.silu(self.first(x) * (1.0 + scale) + shift))


def points(engine: torch.quasirandom.SobolEngine, batch: int) -> Tensor:
    """(batch, 4): x1, x0, s, t. Sobol points fill the space evenly, so a batch counts like a larger one.

    The times are stretched and cut off, so that a share of the jumps starts at 0 exactly or ends at 1.
    """
    uniform = engine.draw(batch).clamp(1e-6, 1.0 - 1e-6)
    normal = torch.special.ndtri(uniform[:, :2])
    times = (1.2 * uniform[:, 2:] - 0.1).clamp(0.0, 1.0).sort(1).values
    return torch.cat([MEAN + STD * normal[:, :1], normal[:, 1:], times], 1)


def on_points(objective, flow_map: pfm.FlowMap, batch: Tensor, *, condition=None) -> pfm.objectives.Loss:
    """The objective on given x1, x0, s, t."""
    x1, x0, s, t = (column.contiguous() for column in (batch[:, :1], batch[:, 1:2], batch[:, 2], batch[:, 3]))
    return objective(flow_map, x1, x0=x0, times=lambda _: (s, t), condition=condition)


def train(objective: str, *, steps: int = 2000, batch: int = 1024, lr: float = 1e-2, seed: int = 0) -> nn.Module:
    """The average of the weights; `batch` is shared out among the processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(seed)
    network = Network()
    step: nn.Module = pfm.training.Step(network, partial(on_points, OBJECTIVES[objective]))
    if world > 1:
        step = DistributedDataParallel(step)
    optimiser = torch.optim.Adam(network.parameters(), lr, betas=(0.8, 0.95), fused=True)
    average = pfm.training.EMA(network, [0.99])
    engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=1000 * seed + rank)
    for k in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * k / steps))
        loss, _ = step(points(engine, batch // world))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update()
    return average.averaged(0.99)


@torch.no_grad()
def errors(network: nn.Module, samples: int = 20000) -> tuple[float, float]:
    """Relative L2 errors of X_{0,1} and of X_{s,t}, s < t uniform, x_s from its distribution."""
    rng = torch.Generator().manual_seed(0)
    s, t = torch.rand(2, samples, generator=rng).sort(0).values
    found = []
    for start, end in ((torch.zeros(samples), torch.ones(samples)), (s, t)):
        a, b = start[:, None], end[:, None]
        x = a * MEAN + spread(a) * torch.randn(samples, 1, generator=rng)
        exact = exact_jump(x, a, b)
        found.append(float((pfm.FlowMap(network).jump(x, start, end) - exact).norm() / exact.norm()))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=sorted(OBJECTIVES), default="lagrangian")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)  # the network is small: threads would wait for one another
    begin = time.perf_counter()
    network = train(options.objective, steps=options.steps, seed=options.seed)
    if not dist.is_initialized() or dist.get_rank() == 0:
        one, any_jump = errors(network)
        print(
            f"{options.objective}: error of X_01 {one:.2%}, of X_st {any_jump:.2%}, {time.perf_counter() - begin:.1f} s"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
