"""The Trainer against a loop written in plain torch, and each of its options against what it promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import small
import torch
from torch import nn

import pyflowmap as pfm
from pyflowmap import png
from pyflowmap.objectives.loss import Loss
from pyflowmap.training import Step, Trainer, inverse_sqrt, ramp
from pyflowmap.training.rows import drop
from pyflowmap.training.seeds import mix, restore, seed_all, snapshot


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


# ---- against plain torch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.3])
def test_it_is_the_loop_one_would_write(clip):
    result, records = train(clip=clip, ema=(0.9, 0.99))
    network, errors, averages = by_hand(10, clip=clip, decays=(0.9, 0.99))
    assert_close(result.step.network, network)
    for decay, average in averages.items():
        assert_close(result.ema[decay], average)
        assert not result.ema[decay].training
    assert [r["loss"] for r in records] == pytest.approx(errors, rel=1e-12)
    assert [r["error"] for r in records] == pytest.approx([e / 3 for e in errors], rel=1e-12)
    assert records[0]["half"] == pytest.approx(errors[0] / 2)


def test_weighted_and_raw_error_are_both_logged():
    _, plain = train(steps=1)
    _, scaled = train(small.step(scale=100.0), steps=1)
    assert scaled[0]["loss"] == pytest.approx(100 * plain[0]["loss"])
    assert scaled[0]["error"] == pytest.approx(plain[0]["error"])


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda k: 1.0),
        ("cosine", lambda k: 0.5 + 0.5 * math.cos(math.pi * k / 10)),
        ("inverse_sqrt", lambda k: math.sqrt(4 / max(k, 4))),
        (inverse_sqrt(after=2), lambda k: math.sqrt(2 / max(k, 2))),
        (lambda step, progress: 1 - progress, lambda k: 1 - k / 10),
    ],
)
def test_schedules(schedule, factor):
    law = lambda k: 0.01 * factor(k) * min(1.0, (k + 1) / 4)  # noqa: E731
    result, records = train(schedule=schedule, warmup=4, lr=0.01)
    assert [r["lr"] for r in records] == pytest.approx([law(k) for k in range(10)], rel=1e-12)
    assert_close(result.step.network, by_hand(10, rate=law, clip=1.0)[0])


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


# ---- when it ends ---------------------------------------------------------------------------------------------------


def test_a_diverged_raw_error_ends_the_run_though_the_loss_is_small(tmp_path):
    step = small.step(scale=1e-9)
    result, records = train(step, steps=50, stop_above=1e-3, patience=4, folder=tmp_path, save_every=3)
    assert result.stopped == "diverged" and len(records) == 4 and records[-1]["loss"] < 1e-3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]
    result, _ = train(steps=10, stop_above=1e3, patience=2)
    assert result.stopped == "done"


def test_seconds_end_the_run_and_anneal_the_rate():
    result, records = train(steps=10**6, seconds=0.5, schedule="cosine")
    assert result.stopped == "seconds" and result.steps == len(records) < 10**6
    assert 0.4 < records[-1]["seconds"] < 2.0 and records[-1]["lr"] < 0.1 * records[0]["lr"]


# ---- options --------------------------------------------------------------------------------------------------------


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


def test_low_precision_computes_the_network_in_it_and_its_tangents_in_float32():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pfm.nn.MLP(pfm.nn.MLPConfig(features=3, labels=5))

        def forward(self, x, s, t, label):
            out = self.inner(x, s, t, label)
            dual = isinstance(out, pfm.Dual)
            seen.append((dual, (out.primal if dual else out).dtype))
            return out

    def run(**options):
        seen.clear()
        step = Step(Watched(), pfm.objectives.mean_flow, equal=0.5, **options)
        result, records = train(step, small.Stream(dtype=torch.float32), steps=3, precision="bfloat16")
        assert all(p.dtype == torch.float32 for p in result.step.parameters()) and math.isfinite(records[-1]["loss"])
        return set(seen)

    assert run() == {(False, torch.bfloat16), (True, torch.float32)}
    assert run(tangents="autocast") == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_a_teachers_evaluation_under_autocast_does_not_take_the_students_gradient():
    """torch's cache of casts would keep those made without gradient, and every weight would stay where it is."""

    def objective(flow_map, x1, *, condition, seed):
        t = torch.zeros(len(x1))
        with torch.no_grad():
            target = flow_map.network(x1, t, t, condition["label"])
        error = (flow_map.network(x1 + 1, t, t, condition["label"]) - target).float().square().sum(1)
        return Loss(error, error.detach())

    step = small.step(objective, dtype=torch.float32)
    before = small.weights(step)
    train(step, small.Stream(dtype=torch.float32), steps=1, precision="bfloat16")
    assert all(not torch.equal(p, before[n]) for n, p in step.named_parameters() if "layers" in n)


def test_a_ramp_reaches_the_objective_as_a_number():
    seen = []

    def objective(*args, scale, **rest):
        seen.append(scale)
        return small.matching(*args, **rest)

    def named(flow_map, x1, *, condition, scale, seed, sample_ids):
        return objective(flow_map, x1, condition=condition, scale=scale, seed=seed, sample_ids=sample_ids)

    train(small.step(named, scale=ramp(0.0, 1.0, steps=4)), steps=6)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_every_step_and_process_has_a_seed_of_its_own():
    seeds: list = []

    def objective(flow_map, x1, *, condition, seed):
        seeds.append(seed)
        return small.matching(flow_map, x1, condition=condition, seed=seed, sample_ids=range(len(x1)))

    train(small.step(objective), steps=5)
    train(small.step(objective), steps=5, seed=1)
    assert len(set(seeds)) == 10 and all(0 <= s < 2**63 for s in seeds)
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500


def test_sample_pictures_use_the_average_and_do_not_touch_the_training(tmp_path):
    seen = []

    def sample(flow_map, step):
        seen.append((step, flow_map.network.training, torch.is_grad_enabled()))
        torch.rand(7)
        np.random.rand()  # noqa: NPY002
        return torch.rand(5, 3, 4, 4) * 2 - 1

    with_pictures, _ = train(small.step(dropout=0.5), sample=sample, sample_every=4, folder=tmp_path, steps=9)
    without, _ = train(small.step(dropout=0.5), steps=9)
    assert_close(with_pictures.step, without.step, atol=0)
    assert seen == [(4, False, False), (8, False, False)]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000000004.png", "step-000000008.png"]
    with pytest.raises(ValueError, match=r"pictures are a tensor of shape \(5, 3\)"):
        train(sample=lambda flow_map, step: torch.rand(5, 3), sample_every=1, folder=tmp_path / "x")


def test_colour_pictures_are_what_another_reader_reads(tmp_path):
    image = pytest.importorskip("PIL.Image")
    images = torch.rand(3, 3, 4, 5) * 2 - 1
    pixels = png.picture(images)
    png.write(pixels, tmp_path / "x.png")
    read = np.asarray(image.open(tmp_path / "x.png"))
    assert np.array_equal(read, pixels) and read.shape == (24, 28, 3)
    expected = ((images[1].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(read[0:8:2, 14:24:2], expected)  # second in the first row, twice as large


def test_compiling_changes_nothing_but_speed():
    plain, _ = train(steps=3)
    step = small.step()
    step.network.compile = lambda: nn.Module.compile(step.network, backend="eager")  # no C++ compiler needed
    compiled, _ = train(step, steps=3, compile=True)
    assert_close(compiled.step, plain.step)
    assert compiled.step.state_dict().keys() == plain.step.state_dict().keys()


def test_a_learned_weight_is_trained_and_saved(tmp_path):
    def make():
        torch.manual_seed(0)
        network = pfm.nn.MLP(pfm.nn.MLPConfig(features=3, labels=5))
        return Step(network, pfm.objectives.progressive, weight=pfm.weights.learned(channels=4))

    stream = lambda: small.Stream(dtype=torch.float32)  # noqa: E731
    first, _ = train(make(), stream(), steps=5, folder=tmp_path)
    again, _ = train(make(), stream(), steps=5, folder=tmp_path)
    assert torch.equal(first.step.weight.head.bias, again.step.weight.head.bias)
    assert float(again.step.weight.head.bias.detach()) != 0.0


def test_history_is_json_with_null_for_what_is_not_finite(tmp_path):
    train(stream=small.Stream(poison={1: range(8)}), steps=3, folder=tmp_path)
    text = (tmp_path / "history.jsonl").read_text()

    def refuse(word):
        raise AssertionError(word)

    records = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert records[1]["loss"] is None and records[2]["loss"] > 0


def test_generators_come_back():
    import random

    seed_all(3)
    random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    state = json.loads(json.dumps(snapshot()))
    first = [random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()]  # noqa: NPY002
    restore(state)
    assert first == [random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()]  # noqa: NPY002


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"keep": 0}, "keep = 0"),
        ({"warmup": -1}, "warmup = -1"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"clip": -1.0}, "clip = -1.0"),
        ({"precision": "int8"}, "precision = 'int8'"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd'"),
        ({"optimizer": lambda p: None}, "NoneType"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "lr": 0.1}, "leave lr away"),
        ({"optimizer": lambda p: torch.optim.SGD(p[:-1], lr=1.0)}, "does not train 'network.layers.2.bias'"),
        ({"schedule": "linear"}, "schedule = 'linear'"),
        ({"schedule": "inverse_sqrt"}, "end of warmup"),
        ({"ema": (1.0,)}, "ema = 1.0"),
        ({"ema": (0.9, 0.9)}, "each decay once"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite = 'ignore'"),
        ({"dropout": {"label": 0.1}}, "it is \\(null, share\\)"),
        ({"dropout": {"label": (4, 1.1)}}, "share 1.1"),
        ({"dropout": {"lable": (4, 0.1)}}, "'lable'; the data has label"),
        ({"distribution": "dp"}, "distribution = 'dp'"),
        ({"stream": iter([])}, "pass a pyflowmap.data.Stream"),
        ({"step": nn.Linear(1, 1)}, "wrap the network"),
        ({"step": Step(small.Network(), pfm.objectives.progressive, seed=1)}, "leave them out"),
    ],
    ids=str,
)
def test_refusals(options, message):
    options = dict(options)
    with pytest.raises((TypeError, ValueError), match=message):
        train(options.pop("step", None), options.pop("stream", None), options.pop("steps", 2), **options)
