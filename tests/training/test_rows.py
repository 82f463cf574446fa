"""Rows of a batch: those whose loss is not finite, and conditions that are dropped."""

from __future__ import annotations

import math

import pytest
import small
import torch
from by_hand import assert_close, by_hand, train
from torch import nn

from pyflowmap.objectives.loss import Loss
from pyflowmap.training.rows import drop

# ---- rows that are not finite ---------------------------------------------------------------------------------------


def test_a_masked_row_leaves_the_mean_over_the_others_exactly():
    good = {3: [0, 2, 3, 5, 6, 7], 4: [1]}
    poison = {k: [i for i in range(8) if i not in rows] for k, rows in good.items()}
    result, records = train(stream=small.Stream(poison=poison))
    network, errors, averages = by_hand(10, rows=lambda k: good.get(k, list(range(8))), clip=1.0)
    assert_close(result.step.network, network)
    assert_close(result.ema[0.9], averages[0.9])
    assert [r["loss"] for r in records] == pytest.approx(errors, rel=1e-12)
    assert [r["masked_rows"] for r in records] == [0, 0, 0, 2, 9, 9, 9, 9, 9, 9]
    assert records[-1]["skipped_steps"] == 0


def test_a_masked_row_draws_the_same_dropout_as_before():
    """The second evaluation of a step starts from the generators of the first."""
    draws = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small.Network()

        def forward(self, *args, **condition):
            draws.append(torch.rand(()).item())
            return self.inner(*args, **condition)

    train(small.step(network=Watched()), small.Stream(poison={1: [0]}), steps=2)
    assert len(draws) == 4 and draws[1] == draws[2] == draws[3] != draws[0]


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_a_step_without_good_rows_changes_nothing(mode):
    rows = range(8) if mode == "mask" else [2]
    step = small.step()
    seen = []
    train(
        step,
        small.Stream(poison={3: rows}),
        steps=6,
        on_nonfinite=mode,
        callback=lambda r: seen.append((r, small.weights(step))),
    )
    assert all(torch.equal(a, b) for a, b in zip(seen[2][1].values(), seen[3][1].values()))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3][1].values(), seen[4][1].values()))
    assert [r["skipped_steps"] for r, _ in seen] == [0, 0, 0, 1, 1, 1]
    assert all(r["masked_rows"] == 0 for r, _ in seen)


def test_a_skipped_step_is_no_step_of_the_average():
    result, _ = train(stream=small.Stream(poison={9: range(8)}), steps=10, ema=(0.9, 0.99))
    for decay, average in by_hand(9, clip=1.0, decays=(0.9, 0.99))[2].items():
        assert_close(result.ema[decay], average)


def test_a_gradient_that_is_not_finite_though_the_loss_is_skips_the_step():
    def objective(flow_map, x1, *, condition, seed):
        t = torch.zeros(len(x1), dtype=x1.dtype)
        out = flow_map.network(x1, t, t, condition["label"])
        error = (out - x1).square().sum(1)
        if flow_map.network.at == 2:
            error = error + (0.0 * out).square().sum(1).sqrt()  # 0, with the derivative 0 * inf
        flow_map.network.at += 1
        return Loss(error, error.detach())

    step = small.step(objective)
    step.network.at = 0
    result, records = train(step, steps=5)
    assert records[2]["skipped_steps"] == 1 and math.isfinite(records[2]["loss"])
    assert all(p.isfinite().all() for p in result.step.parameters())


def test_patience_ends_the_run_and_says_where():
    with pytest.raises(FloatingPointError, match=r"step 6: 2 of 8 samples .* 3 steps in a row"):
        train(stream=small.Stream(poison={k: [0, 1] for k in (1, 3, 4, 5, 6)}), patience=3)
    with pytest.raises(FloatingPointError, match="step 2: 1 of 8"):
        train(stream=small.Stream(poison={1: [0]}), on_nonfinite="raise")


def test_float16_gradients_that_overflow_are_the_scalers_business():
    """A loss times 65536 overflows in float16 at first; the scaler lowers its factor, nothing is called a bad row."""
    step = small.step(dtype=torch.float32, scale=100.0)
    _, records = train(step, small.Stream(dtype=torch.float32), steps=40, precision="float16", patience=2)
    assert records[-1]["skipped_steps"] == records[-1]["masked_rows"] == 0
    assert records[-1]["loss"] < records[0]["loss"]
    assert not math.isfinite(records[0]["gradient_norm"]) and math.isfinite(records[-1]["gradient_norm"])


def test_dropped_conditions_depend_on_the_place_in_the_global_batch():
    condition = {"label": torch.arange(1000) % 4, "mask": torch.ones(1000, 2, 2), "kept": torch.ones(1000)}
    dropout = {"label": (4, 0.3), "mask": (0.0, 0.5)}
    ids = torch.arange(1000)
    whole = drop(condition, dropout, ids, 1000, 5)
    assert 250 < (whole["label"] == 4).sum() < 350  # 300 +- 3.5 sigma
    gone = whole["mask"].flatten(1).sum(1) == 0
    assert 430 < gone.sum() < 570 and ((whole["mask"] == 0) == gone[:, None, None]).all()
    assert torch.equal(whole["kept"], condition["kept"]) and (condition["mask"] == 1).all()
    half = {k: v[1::2] for k, v in condition.items()}
    for key, x in drop(half, dropout, ids[1::2], 1000, 5).items():
        assert torch.equal(x, whole[key][1::2])
    assert not torch.equal(drop(condition, dropout, ids, 1000, 6)["label"], whole["label"])
    with pytest.raises(ValueError, match="'class'; the data has label, mask, kept"):
        drop(condition, {"class": (0, 0.1)}, ids, 1000, 5)
