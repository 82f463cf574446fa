"""Averages of weights against their closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyflowmap.training import EMA


def closed_form(values: list[float], decay: float, ramp: float) -> float:
    """sum_i w_i (1 - d_i) prod_{j > i} d_j in float64, d_n = min(decay, n r / (n r + 1))."""
    d = [min(decay, n * ramp / (n * ramp + 1)) for n in range(len(values))]
    total = 0.0
    for i, value in enumerate(values):
        share = 1 - d[i]
        for later in d[i + 1 :]:
            share *= later
        total += value * share
    return total


def network(dtype=torch.float64) -> nn.Module:
    module = nn.BatchNorm1d(2, dtype=dtype)  # two parameters and three buffers
    module.bias.requires_grad_(False)
    return module


def test_the_average_is_the_sum_it_stands_for():
    module = network()
    ema = EMA(module, (0.5, 0.9, 0.999), ramp=0.3)
    values = torch.randn(40, dtype=torch.float64).tolist()
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
    for decay in (0.5, 0.9, 0.999):
        average = ema.averaged(decay)
        assert average.weight[0].item() == pytest.approx(closed_form(values, decay, 0.3), rel=1e-12)
        assert torch.equal(average.bias, module.bias) and not average.training
    assert module.weight[0].item() == values[-1] and module.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32(dtype):
    """0.9999 * 1 + 0.0001 * 2: in bfloat16 the shadow would stay at 1 for ever."""
    module = network(dtype)
    ema = EMA(module, (0.9999,), ramp=1e9)  # no warm-up after the first
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema.update()
        module.weight.fill_(2.0)
    for _ in range(100):
        ema.update()
    shadow = ema.state()["0.9999/weight"]
    assert shadow.dtype == torch.float32
    assert shadow[0].item() == pytest.approx(2.0 - 0.9999**100, abs=1e-5)
    assert ema.averaged(0.9999).weight.dtype == dtype


def test_shadows_do_not_share_memory_with_the_weights_and_the_names_are_those_of_the_network():
    module = network()
    ema = EMA(module, (0.9, 0.99))
    assert set(ema.state()) == {"0.9/weight", "0.99/weight"}
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert all(x[0] == 1.0 for x in ema.state().values())
    module.running_mean.fill_(3.0)
    assert ema.averaged(0.9).running_mean[0] == 3.0  # buffers are the network's
