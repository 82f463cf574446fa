"""The Trainer with what the tests ask of it, and a loop in plain torch to compare it with."""

from __future__ import annotations

import math

import small
import torch
from torch import nn

from pyflowmap.training import Trainer
from pyflowmap.training.seeds import mix


def train(step=None, stream=None, steps=10, **options):
    records: list[dict] = []
    options = {"log_every": 1, "progress": False, "callback": records.append, "ema": (0.9,), **options}
    trainer = Trainer(step or small.step(), stream or small.Stream(), steps=steps, **options)
    return trainer.fit(), records


def by_hand(steps, *, rows=None, rate=lambda k: 1e-3, clip=None, network=None, poison=None, decays=(0.9,)):
    """AdamW on the mean over `rows(k)` of each batch, an average of the weights, and nothing of the library's."""
    network = network or small.step().network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    stream, errors = small.Stream(), []
    averages = {d: {n: p.detach().clone() for n, p in network.named_parameters()} for d in decays}
    for k in range(steps):
        batch = next(stream)
        own = list(range(stream.rows)) if rows is None else rows(k)
        x1, ids = batch.x1[own], batch.sample_ids[own]
        seed = mix(0, k, 0, 0)
        x0 = small.rows_of_noise(x1, seed, ids, 0)
        t = torch.special.ndtr(small.rows_of_noise(x1[:, 0], seed, ids, 1))
        out = network((1 - t[:, None]) * x0 + t[:, None] * x1, t, t, batch.condition["label"][own])
        error = (out - (x1 - x0)).square().sum(1).mean()
        optimizer.zero_grad()
        error.backward()
        if clip is not None:
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
            for p in network.parameters():
                p.grad *= min(1.0, clip / (norm + 1e-6))  # torch guards the division so
        optimizer.param_groups[0]["lr"] = rate(k)
        optimizer.step()
        errors.append(error.item())
        for d, average in averages.items():
            used = min(d, 0.1 * k / (0.1 * k + 1.0))
            for n, p in network.named_parameters():
                average[n] = used * average[n] + (1 - used) * p.detach()
    return network, errors, averages


def assert_close(module, expected, atol=1e-12):
    expected = dict(expected.named_parameters()) if isinstance(expected, nn.Module) else expected
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=atol, rtol=0, msg=name)
