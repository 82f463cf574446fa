"""From scratch to the exact flow map of a Gaussian, within 1 %, by every objective: the same network, points, steps."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import time
from functools import partial

import pytest
import torch

from pyflowmap import weights
from pyflowmap.objectives import (
    alpha_flow,
    alpha_schedule,
    eulerian,
    improved_mean_flow,
    lagrangian,
    mean_flow,
    progressive,
)

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "gaussian_oracle.py"
STEPS = 1500
MEAN = {"weight": weights.constant(), "equal": 0.5}  # with one number per sample 1/(e + c) would seek a mode


def annealed(flow_map, x1, *, count, **options):
    """alpha falls from 1 to 0 in the first half."""
    return alpha_flow(flow_map, x1, alpha=lambda: alpha_schedule(next(count), end=STEPS // 2), **MEAN, **options)


CASES = {
    "lagrangian": lagrangian,
    "eulerian": eulerian,
    "progressive, midpoint": partial(progressive, diagonal=0.5),
    "progressive, uniform": partial(progressive, diagonal=0.5, split="uniform"),
    "mean_flow": partial(mean_flow, **MEAN),
    "improved_mean_flow": partial(improved_mean_flow, **MEAN),
    "alpha_flow": annealed,
}


@pytest.mark.parametrize("name", CASES)
def test_training_finds_the_exact_map(name):
    """Relative RMS errors of X_{0,1} over the noise and of X_{s,t} over random times; 30 % and more at the start."""
    spec = importlib.util.spec_from_file_location("gaussian_oracle", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    objective = CASES[name]
    example.OBJECTIVES[name] = partial(objective, count=itertools.count()) if objective is annealed else objective
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begin = time.process_time()
        found = example.errors(example.train(name, steps=STEPS))
        seconds = time.process_time() - begin
    finally:
        torch.set_num_threads(threads)
    print(f"{name}: X_01 {found[0]:.2%}, X_st {found[1]:.2%}, {seconds:.1f} s")
    assert max(found) < 0.01 and seconds < 60.0
    torch.manual_seed(0)
    assert min(example.errors(example.Network())) > 0.3
