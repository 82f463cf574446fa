"""Runs under guidance: by hand, zero-init, launches, gradients, rows, half precision, memory."""

import dataclasses

import pytest
import torch
from guidance_cases import (
    CLOSE,
    CURVED,
    EVERY,
    LABEL,
    NULL,
    ab2,
    curved,
    dot,
    flat,
    labelled,
    paper_apg,
    paper_cfg_zero,
    run,
)  # fmt: skip

from pyflowmap import solvers
from pyflowmap.algebra import evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import apg, autoguidance, cfg, cfg_zero, erk, rescale, skip_layer
from pyflowmap.guidance import space as space_module
from pyflowmap.interpolants import Trigonometric
from pyflowmap.sampling import sample
from pyflowmap.solvers import driver

every = pytest.mark.parametrize("guide", EVERY.values(), ids=EVERY)


@pytest.mark.parametrize("solver", ["flow_map", "euler", "heun"])
@pytest.mark.parametrize("batched", [True, False])
def test_cfg_by_hand(solver, batched):
    guide = cfg(3.0, null=NULL, batched=batched)
    out = sample(FlowMap(labelled), torch.zeros(2, 3), 4, solver=solver, condition={"label": LABEL}, guidance=guide)
    expected = 1.0 + 3.0 * (2.0 + LABEL.float() - 1.0)  # null + w (cond - null), integrated over [0, 1]
    torch.testing.assert_close(out, expected[:, None].expand(2, 3))


def test_jumps_are_guided_in_their_mean_velocities():
    """Constant fields, parallel: s* b_null is b_cond, and so is the guided velocity."""
    for guide in (cfg_zero(3.0, NULL), apg(3.0, NULL, eta=0.0, space="velocity")):
        out = sample(FlowMap(labelled), torch.zeros(2, 3), 4, condition={"label": LABEL}, guidance=guide)
        torch.testing.assert_close(out, (2.0 + LABEL.float())[:, None].expand(2, 3))
    for guide in (cfg_zero(3.0, NULL, space="data"), apg(3.0, NULL), rescale(cfg(3.0, NULL), space="noise")):
        with pytest.raises(ValueError, match="flow_map takes jumps"):
            sample(FlowMap(labelled), torch.zeros(2, 3), 4, condition={"label": LABEL}, guidance=guide)
        with pytest.raises(ValueError, match=r"jump from 0.1 to 0.3"):
            guide(lambda *which: [lazy(torch.ones(2, 3))] * len(which), lazy(torch.zeros(2, 3)), 0.1, 0.3)


def test_cfg_is_the_same_on_every_prediction():
    """At one (x, t) all predictions are affine in each other, so guidance commutes with the conversion."""
    x, outs = torch.randn(2, 3, dtype=torch.float64), []
    for kind in ("velocity", "data", "noise"):

        def network(x, s, label, kind=kind):
            velocity = (label.double() + 1).reshape(-1, 1) * x.tanh()
            return {"velocity": velocity, "data": x + 0.75 * velocity, "noise": x - 0.25 * velocity}[kind]

        fm = FlowMap(network, prediction=kind)
        guide = cfg(2.0, null=NULL)
        outs.append(sample(fm, x, grid=[0.25, 0.5], solver="euler", condition={"label": LABEL}, guidance=guide))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cfg_zero-data", "apg"])
def test_data_is_that_of_the_linear_path_on_any_other(name):
    table = torch.randn(11, 3, dtype=torch.float64)
    path, x, r = Trigonometric(), torch.randn(2, 3, dtype=torch.float64), [0.1, 0.3, 0.6]
    options = {"solver": "euler", "condition": {"label": LABEL}, "guidance": EVERY[name]}
    network = lambda x, s, label: table[label]  # noqa: E731
    linear = FlowMap(network, prediction="data")
    straight = sample(linear, x / path.scale(r[0]), grid=[path.linear_time(each) for each in r], **options)
    bent = sample(FlowMap(network, prediction="data", interpolant=path), x, grid=r, **options)
    torch.testing.assert_close(bent, straight * path.scale(r[-1]), **CLOSE)


def test_interval_and_scale_one_cost_one_evaluation():
    rows = []

    def network(x, s, label):
        rows.append(len(x))
        return curved(x, s, label)

    x, fm, options = torch.zeros(2, 3), FlowMap(network, prediction="velocity"), {"condition": {"label": LABEL}}
    inside = {"interval": (0.2, 0.6)}
    for guide in (cfg(3.0, NULL, **inside), apg(3.0, NULL, **inside), rescale(cfg_zero(3.0, NULL, **inside))):
        rows.clear()
        sample(fm, x, 4, solver="euler", guidance=guide, **options)
        assert rows == [2, 4, 4, 2]  # starts 0, .25, .5, .75; two conditions in one call of twice the rows
    for guide, calls in (
        (cfg(1.0, NULL), [2] * 4),
        (cfg_zero(1.0, NULL, zero_init=1), [2] * 3),
        (apg(1.0, NULL), [2] * 4),
        (apg(1.0, NULL, base="null"), [4] * 4),  # not the conditional: d is projected
        (autoguidance(1.0, flat), [2] * 4),
        (skip_layer(2.0, network, interval=(0.2, 0.6)), [2, 2, 2, 2, 2, 2]),
        (skip_layer(2.0, network, of=cfg(3.0, NULL)), [4, 2] * 4),
    ):
        rows.clear()
        sample(fm, x, 4, solver="euler", guidance=guide, **options)
        assert rows == calls, guide
        starts = (0.25, 0.5, 0.75) if isinstance(guide, cfg_zero) else (0.0, 0.25, 0.5, 0.75)
        assert sum(2 * guide.evaluations(s) for s in starts) == sum(rows)


def test_apg_with_momentum_over_a_run():
    """Three steps of Heun: six evaluations, one running average, in data predictions D = x + (1-t) v."""
    x, before = torch.randn(2, 5, dtype=torch.float64), 0.0
    times = [0.1, 0.3, 0.5, 0.8]

    def velocity(x, s):
        nonlocal before
        c, u = (x + (1 - s) * curved(x, torch.tensor([s]), label) for label in (LABEL, torch.tensor([10, 10])))
        D, before = paper_apg(c, u, 3.0, 0.1, 1.5, -0.6, before)
        return (D - x) / (1 - s)

    guide = apg(3.0, NULL, eta=0.1, momentum=-0.6, threshold=1.5)
    for _ in range(2):  # the object keeps nothing from one run to the next
        got, before, state = run(x, guide, grid=times), 0.0, x
        for s, t in zip(times, times[1:]):
            k1 = velocity(state, s)
            state = state + (t - s) / 2 * (k1 + velocity(state + (t - s) * k1, t))
        torch.testing.assert_close(got, state, rtol=1e-6, atol=1e-6)  # the network's times are float32
    # At t = 1 data is the state and no velocity can make the remembered part of it: Heun ends with Euler there.
    assert guide.singular == {1.0} and run(x, guide).isfinite().all()
    assert dataclasses.replace(guide, momentum=0.0).singular == frozenset()
    with pytest.raises(ValueError, match="no velocity at t = 1"):
        sample(CURVED, x, grid=[0.5, 1.0], solver=late, condition={"label": LABEL}, guidance=guide)


def late(velocity, x, s, t, memory):
    return x + (t - s) / 2 * (velocity(x, s) + velocity(x, t)), memory


@pytest.mark.parametrize(("space", "threshold"), [("velocity", 0.0), ("velocity", 0.5), ("noise", 0.0), ("noise", 0.8)])
def test_erk_is_heun_and_the_papers_correction(space, threshold):
    """In the noise space as in the authors' code: y = x/t, S = (1-t)/t, d = dy/dS."""
    torch.manual_seed(9)
    x = torch.randn(2, 5, dtype=torch.float64)
    times, w, active = [0.1, 0.3, 0.5, 0.8, 0.95], 0.7, []
    velocity = lambda x, t: curved(x, torch.tensor([t], dtype=torch.float32), LABEL)  # noqa: E731
    state, pair = x, None
    for s, t in zip(times, times[1:]):
        k1 = velocity(state, s)
        euler = state + (t - s) * k1
        k2 = velocity(euler, t)
        after = state + (t - s) / 2 * (k1 + k2)
        if space == "velocity":
            y, d, h, sign, unit = state, k1, t - s, 1.0, 1.0
        else:
            y, d, h, sign, unit = state / s, state - s * k1, (1 - s) / s - (1 - t) / t, -1.0, t
        if pair is not None:
            difference = d - pair[1]
            steep = dot(difference, difference).sqrt()
            rho = steep / (dot(y - pair[0], y - pair[0]).sqrt() + 1e-8)
            e = difference / (steep + 1e-8)
            active += (rho > threshold).flatten().tolist()
            after = after + unit * sign * h * (rho > threshold) * (w * h * rho) ** 2 * dot(e, d) * e
        pair = (euler, k2) if space == "velocity" else (euler / t, euler - t * k2)
        state = after
    got = run(x, erk(w, threshold, space=space), grid=times)
    torch.testing.assert_close(got, state, rtol=1e-6, atol=1e-6)
    assert any(active) and all(active) == (threshold == 0.0)
    assert float((state - run(x, None, grid=times)).abs().max()) > 1e-4
    assert torch.equal(run(x, erk(0.0), grid=times), run(x, None, grid=times))
    assert torch.equal(run(x, erk(w, 1e9), grid=times), run(x, None, grid=times))


def test_erk_with_other_solvers_raises():
    guide, x = erk(1.0), torch.randn(2, 3)
    for solver in ("euler", "flow_map", ab2):
        with pytest.raises(ValueError, match='solver="heun"'):
            run(x, guide, solver=solver)
    fresh = guide.begin()
    ask = lambda *which: [lazy(x)]  # noqa: E731
    fresh(ask, lazy(x), 0.0, 0.0), fresh(ask, lazy(x), 0.5, 0.5)
    with pytest.raises(ValueError, match=r"asked at t = 1 after t = 0\.5"):
        fresh(ask, lazy(x), 1.0, 1.0)


# ---- zero-init ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero_init", "dropped"), [(0, 0), (1, 1), (3, 3), (0.04, 0), (0.3, 3), (0.29, 2)])
def test_zero_init_drops_steps_and_no_history_holds_them(zero_init, dropped):
    times, asked = [k / 10 for k in range(11)], []

    def network(x, s, label):
        asked.append(round(float(s[0]), 6))
        return curved(x, s, label)

    guide = cfg_zero(3.0, NULL, zero_init=zero_init)
    options = {"solver": ab2, "condition": {"label": LABEL}, "guidance": guide}
    x = torch.randn(2, 4, dtype=torch.float64)
    states = sample(FlowMap(network, prediction="velocity"), x, grid=times, trajectory=True, **options)
    assert asked == times[dropped:-1] and len(states) == 11
    assert all(torch.equal(each, x) for each in states[: dropped + 1])
    # Had ab2 remembered a zero, its next step would be 1.5 h v.
    label = torch.tensor([10, 10])
    first, s = [curved(x, torch.tensor([times[dropped]]), each) for each in (LABEL, label)], times[dropped]
    expected = x + (times[dropped + 1] - s) * paper_cfg_zero(*first, 3.0)
    torch.testing.assert_close(states[dropped + 1], expected, rtol=1e-6, atol=1e-6)


def test_zero_init_is_only_where_it_can_be():
    x, options = torch.randn(2, 4), {"condition": {"label": LABEL}, "solver": "euler"}
    guide = cfg_zero(3.0, NULL, zero_init=2)
    with pytest.raises(ValueError, match="leaves none of 2 steps"):
        sample(CURVED, x, 2, guidance=guide, **options)
    with pytest.raises(ValueError, match=r"falls from 1 to 0; .*zero_init=0"):
        sample(CURVED, x, grid=[1.0, 0.6, 0.3, 0.0], guidance=rescale(guide), **options)
    with pytest.raises(ValueError, match="leaves out 2 of 5 steps"):
        sample(CURVED, x, nfe=5, guidance=guide, **options)
    few = dataclasses.replace(guide, zero_init=0.04)  # a share of a falling grid's few steps is none
    assert sample(CURVED, x, grid=[1.0, 0.5, 0.0], guidance=few, **options).shape == x.shape


# ---- what a run promises --------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_two_launches_per_evaluation_at_most(guide, solver, monkeypatch):
    if isinstance(guide, erk) and solver == "euler":
        pytest.skip("erk goes with heun")
    updates, reductions = [], []
    monkeypatch.setattr(driver, "evaluate", lambda *c, **k: updates.append(c) or evaluate(*c, **k))
    combine = space_module.combine
    monkeypatch.setattr(space_module, "combine", lambda *a, **k: reductions.append(a) or combine(*a, **k))
    steps = 3
    run(torch.randn(2, 5), guide, steps, solver)
    evaluations = steps * (1 if solver == "euler" else 2)
    if isinstance(guide, erk):
        assert len(reductions) == steps - 1  # one a step, none in the first
    else:
        assert len(reductions) == (0 if isinstance(guide, (cfg, autoguidance, skip_layer)) else evaluations)
    halves = guide.slots({}) - 1  # one launch more where the first argument holds the batch twice
    assert len(updates) == evaluations + halves
    assert all(len({id(x) for each in c for x in each.operands}) <= 8 for c in updates)


def test_guided_arguments_are_written_into_slots(monkeypatch):
    """Two conditions share a call without a copy: the launch that makes the state makes both halves."""
    launches = []
    monkeypatch.setattr(driver, "evaluate", lambda *c, **k: launches.append(len(c)) or evaluate(*c, **k))
    seen = []

    def network(x, s, t, label):
        seen.append(x.data_ptr())
        assert torch.equal(x[:2], x[2:]) and torch.equal(label, torch.tensor([0, 3, 10, 10]))
        return labelled(x, s, t, label)

    sample(FlowMap(network), torch.randn(2, 3), 4, guidance=cfg(3.0, null={"label": 10}), condition={"label": LABEL})
    assert launches == [2, 2, 2, 2, 1]  # the first argument; then state and both halves; the last state alone
    assert len(set(seen)) <= 3


@every
def test_gradients_flow_through_the_coefficients(guide):
    torch.manual_seed(5)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(x, w):
        fm = FlowMap(lambda x, s, label: w * curved(x, s, label), prediction="velocity")
        return sample(fm, x, 3, solver="heun", condition={"label": LABEL}, guidance=guide, grad=True)

    assert torch.autograd.gradcheck(loss, (x, w), atol=1e-6)
    torch.testing.assert_close(loss(x, w), sample_without_gradient(w.detach(), x.detach(), guide), **CLOSE)


def sample_without_gradient(w, x, guide):
    fm = FlowMap(lambda x, s, label: w * curved(x, s, label), prediction="velocity")
    return sample(fm, x, 3, solver="heun", condition={"label": LABEL}, guidance=guide)


@every
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(guide):
    torch.manual_seed(6)
    x, label = torch.randn(5, 700), torch.tensor([0, 3, 1, 2, 0])
    whole = run(x, guide, label=label)
    assert whole.isfinite().all()
    for i in (0, 3, 4):
        assert torch.equal(run(x[i : i + 1], guide, label=label[i : i + 1])[0], whole[i])


@every
def test_one_network_call_or_two(guide):
    torch.manual_seed(7)
    x = torch.randn(2, 33)
    if isinstance(guide, (cfg, cfg_zero, apg)):
        two = dataclasses.replace(guide, batched=False)
    elif isinstance(getattr(guide, "of", None), cfg):
        two = dataclasses.replace(guide, of=dataclasses.replace(guide.of, batched=False))
    else:
        pytest.skip("one condition")
    torch.testing.assert_close(run(x, two), run(x, guide), rtol=1e-6, atol=1e-6)


@every
def test_half_precision_networks(guide):
    """The network sees bfloat16; the state, the reductions and what is remembered stay float32."""
    torch.manual_seed(8)
    network, weak = (torch.nn.Linear(6, 6).bfloat16() for _ in range(2))
    table = torch.linspace(-1, 1, 11)[:, None].bfloat16()

    def call(network, x, s, t, condition):
        assert x.dtype == torch.bfloat16
        return network(x) + table[condition["label"]]

    def wide(network, x, s, t, condition):  # the same numbers, in float64 everywhere else
        return (network(x.bfloat16()) + table[condition["label"]]).double()

    if isinstance(guide, (autoguidance, skip_layer)):
        guide = dataclasses.replace(guide, **{"weak" if isinstance(guide, autoguidance) else "skipped": weak})
    options = {"solver": "heun" if isinstance(guide, erk) else "euler", "condition": {"label": LABEL}}
    x, options = torch.randn(2, 6), {**options, "guidance": guide}
    half = sample(FlowMap(network, "velocity", call=call), x, grid=[0.1, 0.3, 0.4], **options)
    exact = FlowMap(network, "velocity", call=wide)
    exact = sample(exact, x.double(), grid=[0.1, 0.3, 0.4], dtype=torch.float64, **options)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["apg-momentum", "erk"])
def test_what_remembers_starts_afresh_and_says_what_it_cannot(name):
    guide, x = EVERY[name], torch.randn(2, 5)
    assert torch.equal(run(x, guide), run(x, guide)) and guide._before == []
    with pytest.raises(ValueError, match='grad="checkpoint"'):
        run(x, guide, grad="checkpoint")
    with pytest.raises(ValueError, match='grad="checkpoint"'):  # also inside another
        run(x, rescale(guide), grad="checkpoint")
    adaptive = dataclasses.replace(solvers.heun, loop=lambda *a: None)
    with pytest.raises(ValueError, match="heun has a loop of its own"):
        run(x, guide, solver=adaptive)

    def network(x, s, label):  # bad from t = 0.5 on; the search for the first bad step must not remember the bad ones
        return torch.where(s.reshape(-1, 1) >= 0.5, torch.nan, 1.0) * curved(x, s, label)

    fm = FlowMap(network, prediction="velocity")
    with pytest.raises(FloatingPointError, match="step 2 of 4"):
        sample(fm, x, 4, solver="heun", condition={"label": LABEL}, guidance=guide)


def test_another_flow_map_may_predict_something_else_but_on_the_same_path():
    x = torch.randn(2, 5, dtype=torch.float64)
    data = FlowMap(lambda x, s, label: x + (1 - s.to(x).reshape(-1, 1)) * flat(x, s, label), prediction="data")
    options = {"grid": [0.1, 0.4, 0.7]}
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(
        run(x, autoguidance(2.0, data), **options), run(x, autoguidance(2.0, flat), **options), **close
    )
    with pytest.raises(ValueError, match="both must be on one path"):
        run(x, autoguidance(2.0, FlowMap(flat, "velocity", Trigonometric())))
