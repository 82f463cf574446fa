"""Which parameters Muon takes, and that an optimizer's state comes back by name."""

from __future__ import annotations

import pytest
import small
import torch
from torch import nn

import pyflowmap as pfm
from pyflowmap.training import Step, optimizers


def test_muon_takes_the_hidden_matrices_alone():
    step = small.step()
    assert optimizers.muon_names(step.network) == {"layers.1.weight"}
    muon, adamw = optimizers.build("muon", step, 0.01)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    named = {id(p): n for n, p in step.named_parameters()}
    assert [named[id(p)] for p in muon.param_groups[0]["params"]] == ["network.layers.1.weight"]
    assert len(adamw.param_groups[0]["params"]) == len(named) - 1
    with pytest.raises(ValueError, match="has none"):
        optimizers.build("muon", Step(nn.Linear(2, 2), pfm.objectives.progressive), 0.01)


def test_frozen_parameters_are_left_alone():
    step = small.step()
    step.network.embedding.requires_grad_(False)
    [adamw] = optimizers.build("adamw", step, None)
    assert len(adamw.param_groups[0]["params"]) == 6
    step.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optimizers.build("adamw", step, None)


@pytest.mark.parametrize("kind", ["adamw", "radam", "muon", torch.optim.Adagrad, torch.optim.SGD])
def test_state_goes_out_and_in_by_name(kind):
    def descend(made, step):
        for optimizer in made:
            optimizer.step()

    def gradients(step, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in step.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)

    first, second = small.step(), small.step()
    made = optimizers.build(kind, first, None)
    for seed in range(3):
        gradients(first, seed)
        descend(made, first)
    second.load_state_dict(first.state_dict())
    tensors, numbers = optimizers.state_of(made, first)
    fresh = optimizers.build(kind, second, None)
    optimizers.read_state(fresh, second, {k: v.clone() for k, v in tensors.items()}, numbers)
    for step, each in ((first, made), (second, fresh)):
        gradients(step, 9)
        descend(each, step)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_state_of_a_kind_that_no_file_holds_is_refused():
    step = small.step()
    [optimizer] = optimizers.build("adamw", step, None)
    optimizer.state[next(step.parameters())]["history"] = [1, 2]
    with pytest.raises(TypeError, match="history = list"):
        optimizers.state_of([optimizer], step)
