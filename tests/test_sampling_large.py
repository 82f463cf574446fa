"""Chunks and memory limits; the same bits in any batch; what `sample` must not ignore, overwrite or alias."""

import gc
import warnings
import weakref

import pytest
import torch
from oracles import Gaussian
from torch.utils._python_dispatch import TorchDispatchMode

from pyflowmap import chunks, solvers
from pyflowmap.algebra import evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import Guidance, cfg
from pyflowmap.interpolants import VariancePreserving
from pyflowmap.sampling import sample
from pyflowmap.tangents import jvp

ORACLE = Gaussian()
FLOW = FlowMap(ORACLE.mean_velocity)


def churn(velocity, x, s, t, memory):
    """A stochastic step with two fields and memory: a sum over the fields seen."""
    noise = velocity.noise()
    v = velocity(evaluate_and_wrap(x + 0.1 * noise), s)
    seen = v if memory is None else 0.5 * v + 0.5 * memory
    return x + (t - s) * seen + 0.05 * velocity.noise(), seen


def evaluate_and_wrap(x):
    return lazy(evaluate(x))


def labelled(x, s, t, label):
    return torch.where(label.reshape(-1, 1) == 10, 0.5, label.reshape(-1, 1).to(x)) * x.sin() + s.reshape(-1, 1)


STEPS = {"flow_map": "flow_map", "heun": "heun", "churn": churn}


# ---- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_sample_is_the_same_in_any_batch(step):
    run = lambda shape, **k: sample(FLOW, shape, 5, solver=STEPS[step], seed=11, **k)  # noqa: E731
    whole = run((64, 7))
    for i in (0, 17, 63):
        assert torch.equal(run((1, 7), sample_ids=torch.tensor([i]))[0], whole[i])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run((64, 7), sample_ids=order), whole[order])
    for chunk in (1, 5, 64, 100):
        assert torch.equal(run((64, 7), chunk=chunk), whole)
        assert torch.equal(run((64, 7), chunk=chunk, sample_ids=order), whole[order])
    assert torch.equal(run((64, 7), memory_limit="1MB"), whole)


@pytest.mark.parametrize("step", STEPS)
def test_chunks_of_unseeded_runs_and_of_given_noise(step):
    options = {"solver": STEPS[step]}
    for start in ((9, 4), torch.randn(9, 4)):
        torch.manual_seed(5)
        whole = sample(FLOW, start, 3, **options)
        torch.manual_seed(5)
        assert torch.equal(sample(FLOW, start, 3, chunk=2, **options), whole)
    repeated = sample(FLOW, (8, 4), 3, chunk=4, **options)
    assert not torch.equal(repeated[:4], repeated[4:])  # chunks do not repeat each other's noise


@pytest.mark.parametrize("null", [10, torch.tensor(10), torch.full((9,), 10)], ids=["number", "0-d", "rows"])
@pytest.mark.parametrize("batched", [True, False])
def test_chunks_cut_conditions(null, batched):
    label = torch.arange(9) % 5
    guide = cfg(2.0, null={"label": null}, batched=batched)
    run = lambda **k: sample(FlowMap(labelled), (9, 4), 3, condition={"label": label}, guidance=guide, seed=0, **k)  # noqa: E731
    assert torch.equal(run(chunk=4), run())
    states = run(trajectory=True, chunk=2)
    assert states.shape == (4, 9, 4) and torch.equal(states, run(trajectory=True))


def test_chunks_cut_nested_conditions_and_refuse_the_ambiguous():
    def network(x, s, t, extra, flag, scale):
        assert flag == "on"
        return x * scale + extra["rows"][0]

    tensors = {"rows": [torch.randn(6, 3)]}
    condition = {"extra": tensors, "flag": "on", "scale": torch.tensor(0.5)}
    run = lambda **k: sample(FlowMap(network), (6, 3), 2, seed=0, **k)  # noqa: E731
    assert torch.equal(run(condition=condition, chunk=4), run(condition=condition))
    with pytest.raises(ValueError, match="'extra' holds a tensor of 5 rows for 6 samples"):
        run(condition={**condition, "extra": {"rows": [torch.randn(5, 3)]}}, chunk=4)
    with pytest.raises(TypeError, match="'flag' is a list of 6 entries"):
        run(condition={**condition, "flag": ["on"] * 6}, chunk=4)


def test_chunks_with_gradients_callback_and_channels_last():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    grads = []
    for chunk in (None, 2):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        fm = FlowMap(lambda x, s, w=w: torch.tanh(w * x), prediction="velocity")
        sample(fm, x, 3, solver="heun", grad=True, chunk=chunk).square().sum().backward()
        grads.append((x.grad.clone(), w.grad))
        x.grad = None
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)
    z, records = x.detach(), []
    out = sample(FLOW, z, 2, solver="heun", chunk=2, callback=records.append)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert [(r["rows"], r["step"]) for r in records] == [((a, min(a + 2, 5)), k) for a in (0, 2, 4) for k in (1, 2)]
    assert torch.equal(torch.cat([r["x"] for r in records if r["step"] == 2]), out)


def test_chunks_name_samples_of_the_whole_batch():
    def network(x, s, t, which):
        return torch.where(which.reshape(-1, 1) == 6, torch.nan, 1.0) * torch.ones_like(x)

    options = {"condition": {"which": torch.arange(9)}, "chunk": 4}
    with pytest.raises(FloatingPointError, match=r"sample 6 \(of 9\).*step 1 of 2"):
        sample(FlowMap(network), torch.zeros(9, 2), 2, **options)
    with pytest.warns(RuntimeWarning, match=r"sample 6 \(of 9\)") as caught:
        out = sample(FlowMap(network), torch.zeros(9, 2), 2, on_nan="keep", **options)
    assert caught[0].filename == __file__
    assert out[6].isnan().all() and torch.equal(out[[0, 5, 7]], torch.ones(3, 2))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Wide(torch.nn.Module):
    """Elementwise, with 50 times its argument in between, and 40 kB that belong to no row."""

    def forward(self, x, s, t):
        table = torch.ones(10_000)
        wide = x[:, None].expand(-1, 50, -1) * torch.linspace(0, 1, 50)[:, None]
        return wide.sin().mean(1) * table[0]


def peak_of(function):
    """Bytes alive at once by torch's own memory profiler; independent of what the library uses."""
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("step", ["heun", "churn"])
def test_the_peak_stays_under_the_limit(step):
    fm = FlowMap(Wide())
    sizes = []
    hook = fm.network.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    run = lambda **k: sample(fm, (200, 250), 3, solver=STEPS[step], seed=1, **k)  # noqa: E731
    whole = run()
    free = peak_of(run)
    sizes.clear()
    limit = 2_000_000
    assert free > 10 * limit
    out = []
    assert peak_of(lambda: out.append(run(memory_limit=limit))) <= limit
    assert torch.equal(out[0], whole)
    # One row: argument and velocity, and twice 50 kB; the result takes 200 kB and the table 40 kB.
    assert 8 <= max(sizes) <= 17 and sizes[0] == 1
    hook.remove()


def test_the_smallest_limit_is_named_and_works():
    run = lambda limit: sample(FlowMap(Wide()), (20, 250), 2, seed=1, memory_limit=limit)  # noqa: E731
    with pytest.raises(ValueError, match=r"the smallest limit that works is (\d+)") as error:
        run(100_000)
    least = int(str(error.value).rsplit(" ", 1)[1])
    assert 160_000 < least < 200_000
    assert torch.equal(run(least), sample(FlowMap(Wide()), (20, 250), 2, seed=1))
    with pytest.raises(ValueError, match=f"smallest limit that works is {least}"):
        run(least - 1)


def test_measuring_leaves_nothing_behind():
    parameter = torch.nn.Parameter(torch.ones(3))
    before = weakref.getweakrefcount(parameter.untyped_storage())
    function = lambda: (parameter * torch.ones(1000, 3)).detach()  # noqa: E731
    result, peak, left = chunks.measured(function, torch.device("cpu"))
    assert left == 12_000 and 24_000 <= peak < 25_000
    del result
    gc.collect()
    assert weakref.getweakrefcount(parameter.untyped_storage()) == before


def test_units_and_errors():
    assert [chunks.bytes_of(b) for b in (5, "5B", "2GB", "1.5 MiB", "3kB")] == [5, 5, 2 * 10**9, 3 * 2**19, 3000]
    for bad in ("2G", "much", "-1GB", 0, -5, True, 1.5):
        with pytest.raises(ValueError, match="memory_limit"):
            chunks.bytes_of(bad)
    run = lambda **k: sample(FLOW, (4, 2), 2, **k)  # noqa: E731
    for bad in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="chunk = "):
            run(chunk=bad)
    with pytest.raises(ValueError, match="one of them"):
        run(chunk=2, memory_limit="1GB")
    with pytest.raises(ValueError, match="memory_limit with grad"):
        run(memory_limit="1GB", grad=True)


@pytest.mark.parametrize("how", [{"chunk": 4}, {"memory_limit": "1MB"}])
def test_empty_and_single_batches_in_chunks(how, capsys):
    assert sample(FLOW, (0, 5), 2, seed=0, **how).shape == (0, 5)
    assert torch.equal(sample(FLOW, (1, 5), 2, seed=0, **how), sample(FLOW, (1, 5), 2, seed=0))
    sample(FLOW, (5, 5), 2, seed=0, progress=True, **how)
    assert "sample" in capsys.readouterr().err


# ---- what must not be ignored ----------------------------------------------------------------------------------------


def test_arguments_that_contradict_each_other():
    x = torch.zeros(2, 3)
    cases = [
        ({"steps": 3, "grid": [0.0, 1.0]}, ValueError, "steps = 3 with a grid of 1 steps"),
        ({"steps": 3, "nfe": 4, "solver": "heun"}, ValueError, "steps = 3 with nfe = 4"),
        ({"sample_ids": torch.arange(2)}, ValueError, "sample_ids = ... with the noise given"),
        ({"dtype": torch.int64}, TypeError, "dtype = torch.int64"),
        ({"condition": ["label"]}, TypeError, "condition is list"),
        ({"grid": [[0.0], [1.0]]}, ValueError, "one row of at least two times"),
        ({"grid": torch.tensor(0.5)}, ValueError, "one row of at least two times"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            sample(FLOW, x, **options)
    with pytest.raises(TypeError, match=r"sample_ids is torch\.int32"):
        sample(FLOW, (2, 3), seed=0, sample_ids=torch.arange(2).int())
    with pytest.raises(ValueError, match=r"sample_ids has shape \(3,\)"):
        sample(FLOW, (2, 3), seed=0, sample_ids=torch.arange(3))
    assert torch.equal(sample(FLOW, x, 2, grid=[0.0, 0.5, 1.0]), sample(FLOW, x, 2))


class Resting(Guidance):
    """Leaves the first steps idle (zero velocity), as CFG-Zero* does."""

    def __init__(self, count):
        self.count = count

    def idle(self, times):
        return self.count

    def __call__(self, ask, x, s, t):
        return ask(0)[0]


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_idle_steps_are_states_like_others(path):
    """Zero velocity on the linear path: x stands still, X moves with the path's scale, and every state is returned."""
    network = FlowMap(lambda x, s: ORACLE.velocity(x, 0.3), prediction="velocity")
    grid, x = [0.0, 0.25, 0.5, 1.0], torch.randn(4, 3, dtype=torch.float64)
    if path == "vp":
        vp = VariancePreserving()
        network = FlowMap(lambda x, s: 0.3 * x, prediction="noise", interpolant=vp)
        grid = [0.9, 0.7, 0.5, 0.3] if vp.linear_time(0.3) > vp.linear_time(0.9) else [0.3, 0.5, 0.7, 0.9]
    rest = x if path == "linear" else x * vp.scale(grid[1]) / vp.scale(grid[0])
    expected = sample(network, rest, grid=grid[1:], solver="heun", trajectory=True)
    records = []
    options = {"grid": grid, "solver": "heun", "guidance": Resting(1), "callback": records.append}
    states = sample(network, x, trajectory=True, **options)
    assert states.shape == (4, 4, 3) and torch.equal(states[0], x)
    torch.testing.assert_close(states[1:], expected, rtol=1e-12, atol=1e-12)
    assert [(r["step"], r["steps"], r["nfe"]) for r in records] == [(1, 3, 0), (2, 3, 2), (3, 3, 4)]
    for record, state, s, t in zip(records, states[1:], grid, grid[1:]):
        assert torch.equal(record["x"], state)
        assert (record["s"], record["t"]) == (pytest.approx(s, abs=1e-12), pytest.approx(t, abs=1e-12))
    with pytest.raises(ValueError, match="leaves the first 3 steps idle"):
        sample(network, x, grid=grid, solver="heun", guidance=Resting(3))


class Remembering(Guidance):
    remembers = True
    """Adds what the velocity was at the last step; NaN in the third of a run that is its first."""

    def __init__(self):
        self.before = 0

    def begin(self):
        return Remembering()

    def __call__(self, ask, x, s, t):
        self.before += 1
        return (float("nan") if self.before == 3 else 1.0) * ask(0)[0]


def test_a_guidance_that_remembers_starts_anew_where_a_run_does():
    fm, x = FlowMap(lambda x, s, t: torch.ones_like(x)), torch.zeros(2, 3)
    with pytest.raises(FloatingPointError, match="step 3 of 4"):
        sample(fm, x, 4, guidance=Remembering())
    with pytest.raises(ValueError, match="Remembering remembers earlier evaluations"):
        sample(fm, x, 4, guidance=Remembering(), grad="checkpoint")


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_returned_aliases_anything(grad):
    def still(velocity, x, s, t, memory):
        velocity(x, s)
        return x, memory

    x = torch.randn(3, 4)
    records = []
    out = sample(FLOW, x, 3, solver=still, grad=grad, callback=records.append)
    states = sample(FLOW, x, 3, solver=still, grad=grad, trajectory=True)
    kept = [x, out, *[r["x"] for r in records[:-1]], states]
    assert len({each.untyped_storage().data_ptr() for each in kept}) == len(kept)
    assert all(torch.equal(each, x) for each in (out, *states, *[r["x"] for r in records]))
    out.zero_()
    assert x.abs().min() > 0 and records[0]["x"].abs().min() > 0


def test_odd_noise():
    base = torch.randn(1, 3, 4, 4)
    for noise in (
        base.expand(5, -1, -1, -1),
        torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(4, 4, 3, 5).permute(3, 2, 0, 1),
        torch.randn(10, 3, 4, 4)[::2],
    ):
        dense = noise.clone(memory_format=torch.contiguous_format)
        for options in ({}, {"trajectory": True}, {"grad": True}, {"chunk": 2}):
            for guide in (None, cfg(2.0, null={"label": 10})):
                condition = {"label": torch.arange(5)} if guide is not None else {}
                network = lambda x, s, label=None: x.cos() * (1.0 if label is None else label.view(-1, 1, 1, 1))  # noqa: E731
                fm = FlowMap(network, prediction="velocity")
                run = lambda z, o=options, c=condition, g=guide, f=fm: sample(  # noqa: E731
                    f, z, 3, solver="heun", condition=c, guidance=g, **o
                )
                torch.testing.assert_close(run(noise), run(dense), rtol=1e-6, atol=1e-6)
        assert torch.equal(noise, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("guided", [False, True])
def test_the_state_keeps_the_dtype_of_the_noise(dtype, guided):
    seen = []

    def network(x, s, t, label):
        seen.append(x.dtype)
        return labelled(x, s.to(x), t, label).to(x)

    guide = cfg(2.0, null={"label": 10}) if guided else None
    x = torch.randn(4, 3, dtype=dtype)
    options = {"condition": {"label": torch.arange(4)}, "guidance": guide, "solver": "heun"}
    out = sample(FlowMap(network), x, 4, **options)
    again = sample(FlowMap(network), x, 4, grad=True, **options)
    wide = sample(FlowMap(network), x.double(), 4, **options)
    assert out.dtype == again.dtype == dtype and seen[0] == dtype
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wide, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again.double(), wide, rtol=tolerance, atol=tolerance)


def test_inference_mode_and_compile():
    x = torch.randn(4, 3)
    fm = FlowMap(lambda x, s, t: x.cos())
    for solver in ("flow_map", "heun"):
        plain = sample(fm, x, 3, solver=solver)
        with torch.inference_mode():
            assert torch.equal(sample(fm, x, 3, solver=solver), plain)
            assert torch.equal(sample(fm, x.clone(), 3, solver=solver, chunk=3), plain)
        for options in ({}, {"trajectory": True}):
            f = torch.compile(
                lambda x, o=options, s=solver: sample(fm, x, 3, solver=s, **o), fullgraph=True, backend="eager"
            )
            assert torch.equal(f(x), sample(fm, x, 3, solver=solver, **options))
        g = torch.compile(lambda s=solver: sample(fm, (4, 3), 3, solver=s, seed=2), fullgraph=True, backend="eager")
        assert torch.equal(g(), sample(fm, (4, 3), 3, solver=solver, seed=2))


@pytest.mark.parametrize("options", [{}, {"grad": True}, {"trajectory": True}, {"chunk": 2}], ids=str)
@pytest.mark.parametrize("solver", ["flow_map", "heun"])
def test_derivatives_are_right_or_refused(solver, options):
    fm = FlowMap(lambda x, s, t: x.sin())
    x, dx = torch.randn(2, 4, 3, dtype=torch.float64)
    f = lambda x: sample(fm, x, 3, solver=solver, **options)  # noqa: E731
    h = 1e-6
    difference = (f(x + h * dx) - f(x - h * dx)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (dx,))[1], difference, rtol=1e-7, atol=1e-7)
    total = lambda x: f(x).sum()  # noqa: E731
    if "grad" in options:
        torch.testing.assert_close((torch.func.grad(total)(x) * dx).sum(), difference.sum(), rtol=1e-7, atol=1e-7)
    else:
        assert not f(x.clone().requires_grad_()).requires_grad
        with pytest.raises(ValueError, match="pass grad=True"):
            torch.func.grad(total)(x)
    with pytest.raises(TypeError, match="the noise is a Dual"):
        jvp(f, (x,), (dx,))


def test_warnings_name_the_callers_line():
    fm = FlowMap(lambda x, s, t: x * torch.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(fm, torch.ones(2, 2), 1, on_nan="keep")
        solvers.euler(lambda x, t: x * torch.nan, torch.ones(2, 2), [0.0, 1.0], on_nan="keep")
    assert [w.filename for w in caught] == [__file__] * 2


def test_dispatch_modes_of_ones_own_see_the_run():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x = torch.randn(6, 3)
    plain = sample(FLOW, x, 2)
    with Count() as count:
        assert torch.equal(sample(FLOW, x, 2, memory_limit="1MB"), plain)
    assert count.calls > 0
