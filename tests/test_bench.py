"""The benches measure what they say: results are compared, ratios follow the clock, and nothing hides."""

import importlib.util
import json
import pathlib

import pytest
import torch

from pyflowmap import bench
from pyflowmap.bench import case as cases
from pyflowmap.bench.case import Case, Contestant, Skipped, Target
from pyflowmap.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def define(monkeypatch):
    """define(contestants, ...) registers a case for this test and returns its name."""
    monkeypatch.setattr(cases, "_builders", dict(cases._builders))

    def run(contestants, **options):
        name = f"test_{len(cases._builders)}"
        cases.case("test", name, "a test")(lambda: Case(contestants, {"x": (3,)}, **options))
        return name

    return run


def filling(value, name="peer", target=None, role="peer"):
    out = torch.empty(1000)
    return Contestant(name, lambda: out.fill_(value), target, role)


def spinning(calls, name, target=None):
    """Takes time in proportion to `calls`."""
    x, out = torch.ones(4096), torch.empty(4096)

    def run():
        for _ in range(calls):
            torch.mul(x, 2.0, out=out)
        return out

    return Contestant(name, run, target)


def test_a_peer_that_computes_something_else_raises(define):
    with pytest.raises(RuntimeError, match="slow and ours differ in result 0"):
        bench.measure(define([filling(1.0, "ours"), filling(1.0 + 1e-4, "slow")]), 0.01)
    bench.measure(define([filling(1.0, "ours"), filling(1.0 + 1e-4, "slow")], tolerance=1e-3), 0.01)


def test_a_contestant_that_writes_nothing_raises(define):
    idle = torch.ones(1000)
    with pytest.raises(RuntimeError, match="differ in result 0"):
        bench.measure(define([filling(1.0, "ours"), Contestant("idle", lambda: idle)]), 0.01)
    with pytest.raises(RuntimeError, match="differ in result 0"):
        bench.measure(define([Contestant("idle", lambda: idle), filling(1.0)]), 0.01)
    with pytest.raises(RuntimeError, match="computes 0 tensors, ours 1"):
        bench.measure(define([filling(1.0, "ours"), Contestant("idle", lambda: None)]), 0.01)


def test_a_limit_is_not_compared(define):
    bench.measure(define([filling(1.0, "ours"), filling(2.0, "copy", role="limit")]), 0.01)


def test_ratios_follow_the_clock_and_targets_the_ratios(define):
    name = define(
        [
            spinning(20, "ours"),
            spinning(100, "slow", Target(faster=2.0)),
            spinning(20, "same", Target(faster=2.0)),
            spinning(4, "fast", Target(slower=2.0)),
            spinning(20, "equal", Target(slower=2.0)),
        ]
    )
    rows = bench.measure(name, 0.3)["contestants"]
    assert [row["role"] for row in rows] == ["ours", "peer", "peer", "peer", "peer"]
    assert 3.0 < rows[1]["ratio"]["median"] < 8.0
    assert 0.6 < rows[2]["ratio"]["median"] < 1.7
    assert [row["target"]["met"] for row in rows[1:]] == [True, False, False, True]
    for row in rows[1:]:
        ratio = row["ratio"]
        assert ratio["min"] <= ratio["low"] <= ratio["median"] <= ratio["high"] <= ratio["max"]


def test_every_sample_is_kept_and_every_contestant_takes_part_in_each_round(define):
    result = bench.measure(define([spinning(1, "ours"), spinning(3, "peer")]), 0.02)
    assert result["rounds"] >= 15
    assert [len(row["samples_s"]) for row in result["contestants"]] == [result["rounds"]] * 2
    json.dumps(result)


def test_what_is_not_met_and_what_did_not_run_is_shown(define):
    name = define(
        [spinning(50, "ours"), spinning(5, "peer", Target(faster=1.0))], skipped=[Skipped("other", "not installed")]
    )
    text = bench.table([bench.measure(name, 0.02)])
    assert "NOT met" in text and "not installed" in text


def test_inputs_are_the_same_in_every_run_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, _, one = cases.build("call_combine")
    _, _, two = cases.build("call_combine")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.contestants[0].run()[0], two.contestants[0].run()[0])


@pytest.mark.parametrize("name", [*bench.names("call"), "loss_32x2", "dpm_2m_small", "euler_driver", "normals_64k"])
def test_the_small_cases_agree_with_their_peers(name, monkeypatch):
    monkeypatch.setattr("pyflowmap.bench.loss.compiled", lambda *_: ([], []))  # tests/ops compiles; here it takes time
    assert bench.measure(name, 0.01)["rounds"] >= 15


def test_a_wrong_number_of_seconds_is_one_line(monkeypatch):
    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv("PYFLOWMAP_BENCH_SECONDS", text)
        with pytest.raises(ValueError, match=r"PYFLOWMAP_BENCH_SECONDS=.* try 5"):
            bench.measure("call_combine")


def test_the_command_lists_measures_and_writes(tmp_path, capsys):
    assert main(["bench", "--list"]) == 0
    assert "call_combine" in capsys.readouterr().out
    assert main(["bench", "nothing"]) == 1
    assert "'nothing'" in capsys.readouterr().err
    file = tmp_path / "out.json"
    assert main(["bench", "call_combine", "--seconds", "0.01", "--out", str(file)]) == 0
    assert "torch.add(out=)" in capsys.readouterr().out
    assert json.loads(file.read_text())["results"][0]["case"] == "call_combine"


def test_the_page_says_machine_shapes_ratio_and_verdict(define):
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    name = define([spinning(50, "ours"), spinning(5, "peer", Target(faster=1.0))], note="A remark.")
    machine = {**bench.describe(), "processor": "Some CPU (R) 42", "cores": 7}
    data = {"machine": machine, "results": [bench.measure(name, 0.02)]}
    page = report.page(json.loads(report.dumped(data)), "results.json")
    for part in ("Some CPU", "7 cores", f"torch {torch.__version__}", "x 3", "**NOT met**", ">= 1", "A remark."):
        assert part in page, part
    assert bench.file_name(machine) == "some-42-7cores.json"


def test_each_group_has_its_file_under_bench():
    for group in bench.groups():
        assert f'bench.names("{group}")' in (ROOT / f"bench/bench_{group}.py").read_text()
    assert {file.stem for file in ROOT.glob("bench/bench_*.py")} == {f"bench_{group}" for group in bench.groups()}
