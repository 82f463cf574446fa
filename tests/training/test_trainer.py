"""The Trainer against a loop written in plain torch, and each of its options against what it promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import small
import torch
from by_hand import assert_close, by_hand, train
from torch import nn

import pyflowmap as pfm
from pyflowmap import png
from pyflowmap.objectives.loss import Loss
from pyflowmap.training import Step, inverse_sqrt, ramp
from pyflowmap.training.seeds import mix, restore, seed_all, snapshot

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


def test_the_trained_flow_map_can_be_saved_as_it_is(tmp_path):
    step = Step(pfm.nn.MLP(pfm.nn.MLPConfig(features=3, labels=5)), pfm.objectives.mean_flow)
    result, _ = train(step, small.Stream(dtype=torch.float32), steps=2)
    path = step.flow_map(result.ema[0.9]).save(tmp_path / "average.safetensors")
    x, y = torch.randn(4, 3), torch.arange(4)
    expected = step.flow_map(result.ema[0.9]).jump(x, 0.0, 1.0, label=y)
    torch.testing.assert_close(pfm.load(path).jump(x, 0.0, 1.0, label=y), expected)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Ending(small.Stream):
    def __next__(self):
        if self.position:
            raise StopIteration
        return super().__next__()


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
        ({"dropout": {"class": (4, 0.1)}}, "'class'; the data has label"),
        ({"distribution": "dp"}, "distribution = 'dp'"),
        ({"stream": Ending()}, "ended after 1 of 2"),
        ({"stream": iter([])}, "pass a pyflowmap.data.Stream"),
        ({"step": nn.Linear(1, 1)}, "wrap the network"),
        ({"step": Step(small.Network(), pfm.objectives.progressive, seed=1)}, "leave them out"),
    ],
)
def test_refusals(options, message):
    options = dict(options)
    with pytest.raises((TypeError, ValueError), match=message):
        train(options.pop("step", None), options.pop("stream", None), options.pop("steps", 2), **options)
