"""`cuda_graph=True`: what is copied, what is captured anew, what is refused; with a recorder in place of CUDA, and on
CUDA where there is one."""

import functools
import gc
import warnings

import pytest
import torch
from oracles import Gaussian

from pyflowmap import graphs, solvers
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import Guidance, cfg
from pyflowmap.sampling import sample

ORACLE = Gaussian()
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder:
    """Replays by running the function again, from the same static inputs into the same static result."""

    def __init__(self, holds=True):
        self.captures = self.replays = 0
        self.holds = holds

    def refuses(self, like):
        return None

    def capture(self, function, device):
        self.captures += 1
        function()  # the warm-up, which fills the table of times
        static = function()
        function = function if self.holds else None

        def replay(update):
            self.replays += 1
            update()
            if function is not None:
                with warnings.catch_warnings():  # a replay of kernels warns of nothing
                    warnings.simplefilter("ignore", RuntimeWarning)
                    static.copy_(function())
            return static.clone()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    fake = Recorder()
    made = graphs.Graphs(fake)
    fake.graphs = made
    monkeypatch.setattr(graphs, "check", made.check)
    monkeypatch.setattr(graphs, "default", made)
    return fake


def noisy(velocity, x, s, t, memory):
    return x + (t - s) * velocity(x, s) + 0.1 * velocity.noise(), memory


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.tensor(0.1))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, s, t, label=None):
        scale = 1.0 if label is None else label.reshape(-1, 1).to(x)
        return self.w * x * scale + self.shift + (s * t).reshape(-1, 1)


def net():
    return Net().eval()


# ---- with the recorder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["flow_map", "heun", noisy])
def test_replays_equal_plain_runs(recorder, solver):
    fm = FlowMap(net())
    for seed in (0, 7, 2**64 - 1, torch.tensor(3)):
        for ids in (torch.arange(4), torch.tensor([9, 1, 2, 5])):
            label = torch.randint(0, 5, (4,))
            options = {
                "seed": seed, "sample_ids": ids, "solver": solver, "condition": {"label": label},
                "guidance": cfg(2.0, null={"label": 10}),
            }  # fmt: skip
            assert torch.equal(sample(fm, (4, 3), 3, cuda_graph=True, **options), sample(fm, (4, 3), 3, **options))
    assert (recorder.captures, recorder.replays) == (1, 8)


def test_given_noise_is_copied_and_results_are_the_callers_own(recorder):
    fm, first, second = FlowMap(net()), torch.randn(4, 3), torch.randn(4, 3)
    kept = first.clone()
    a = sample(fm, first, 3, cuda_graph=True)
    held = a.clone()
    b = sample(fm, second, 3, cuda_graph=True)
    assert torch.equal(a, held) and torch.equal(first, kept) and recorder.captures == 1
    assert torch.equal(b, sample(fm, second, 3)) and not torch.equal(a, b)
    states = sample(fm, first, 3, cuda_graph=True, trajectory=True)
    assert torch.equal(states, sample(fm, first, 3, trajectory=True)) and recorder.captures == 2


def test_unseeded_replays_differ_and_follow_torchs_generator(recorder):
    fm = FlowMap(net())
    for start in ((4, 3), torch.zeros(4, 3)):
        runs = [sample(fm, start, 3, solver=noisy, cuda_graph=True) for _ in range(3)]
        assert not torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])
        torch.manual_seed(1)
        again = sample(fm, start, 3, solver=noisy, cuda_graph=True)
        torch.manual_seed(1)
        assert torch.equal(again, sample(fm, start, 3, solver=noisy))
    assert recorder.captures == 2


def test_new_values_in_the_same_parameters_are_seen_and_moved_parameters_captured_anew(recorder):
    network = net()
    fm, x = FlowMap(network), torch.randn(4, 3)
    run = lambda: sample(fm, x, 2, cuda_graph=True)  # noqa: E731
    before = run()
    with torch.no_grad():
        network.w.add_(1.0)
    assert not torch.equal(run(), before) and torch.equal(run(), sample(fm, x, 2)) and recorder.captures == 1
    network.w.data = torch.tensor(0.2)
    assert torch.equal(run(), sample(fm, x, 2)) and recorder.captures == 2
    network.shift = torch.tensor(0.9)
    assert torch.equal(run(), sample(fm, x, 2)) and recorder.captures == 3
    network.drop.train()
    run()
    assert recorder.captures == 4


def decayed(velocity, x, s, t, memory):
    return 0.5 * x + (t - s) * velocity(x, s), memory


@solvers.solver(order=1)
def scaled(velocity, x, s, t, memory, *, by=1.0):
    return x + (by * (t - s)) * velocity(x, s), memory


BASE = {"steps": 3, "condition": {"label": torch.arange(4)}, "solver": scaled}
OTHERS = {
    "steps": {"steps": 4},
    "grid": {"steps": None, "grid": [0.0, 0.1, 0.5, 1.0]},
    "solver": {"solver": "heun"},
    "step": {"solver": decayed},
    "option": {"solver": scaled.using(by=0.5)},
    "no condition": {"condition": {}},
    "condition's dtype": {"condition": {"label": torch.arange(4.0)}},
    "guidance": {"guidance": cfg(2.0, null={"label": 10})},
    "scale": {"guidance": cfg(2.5, null={"label": 10})},
    "null": {"guidance": cfg(2.5, null={"label": 9})},
    "null tensor": {"guidance": cfg(2.5, null={"label": torch.tensor(9)})},
    "interval": {"guidance": cfg(2.5, null={"label": 9}, interval=(0.0, 0.5))},
    "trajectory": {"trajectory": True},
    "dtype": {"dtype": torch.float64},
}


def test_the_key(recorder):
    recorder.graphs.size = 100  # nothing is captured anew for want of room
    network = net().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    fm = FlowMap(network)
    run = lambda noise=x, model=fm, **options: sample(model, noise, cuda_graph=True, **{**BASE, **options})  # noqa: E731
    run()
    count = 1
    for options in OTHERS.values():
        for _ in range(2):
            assert torch.equal(run(**options), sample(fm, x, **{**BASE, **options}))
        count += options != {"dtype": torch.float64} or 1
        assert recorder.captures == count
    for other in (x[:3], x.T.contiguous().T):
        label = torch.arange(len(other))
        run(noise=other, condition={"label": label})
        count += 1
        assert recorder.captures == count
    run(model=FlowMap(network, call="start_and_span"))
    run(model=FlowMap(network, prediction="velocity", call="start_and_end"))
    run(model=FlowMap(net().double()))
    assert recorder.captures == count + 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run()
    assert recorder.captures == count + 4


def test_equal_guidances_share_a_capture_and_changed_ones_do_not(recorder):
    class Own(Guidance):
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, ask, x, s, t):
            return self.scale * ask(0)[0]

    fm, x, guide = FlowMap(net()), torch.randn(4, 3), Own(1.0)
    run = lambda g: sample(fm, x, 2, guidance=g, cuda_graph=True)  # noqa: E731
    one = run(guide)
    assert torch.equal(run(Own(1.0)), one) and recorder.captures == 1
    guide.scale = 2.0
    assert torch.equal(run(guide), sample(fm, x, 2, guidance=guide)) and not torch.equal(run(guide), one)
    assert recorder.captures == 2


def test_the_cache_is_bounded_and_goes_with_the_network(recorder):
    fm = FlowMap(net())
    for rows in range(1, 13):
        sample(fm, (rows, 3), 1, seed=0, cuda_graph=True)
    assert len(recorder.graphs.entries) == graphs.Graphs.size
    sample(fm, (12, 3), 1, seed=0, cuda_graph=True)
    assert recorder.captures == 12
    recorder.graphs.clear()
    assert not recorder.graphs.entries
    recorder.holds = False
    x = torch.randn(2, 3)
    short = FlowMap(net())
    sample(short, x, 1, cuda_graph=True, solver=lambda v, x, s, t, m: (x + v(x, s), m))
    assert len(recorder.graphs.entries) == 1
    del short
    gc.collect()
    sample(fm, x, 1, cuda_graph=True)
    assert len(recorder.graphs.entries) == 1


def test_networks_that_are_functions_show_the_modules_they_hold(recorder):
    network, x = net(), torch.randn(4, 3)
    for wrapped in (
        lambda x, s, t: network(x, s, t),
        network.forward,
        functools.partial(network.forward, label=torch.ones(4)),
        functools.partial(lambda n, x, s, t: n(x, s, t), network),
    ):
        fm, count = FlowMap(wrapped), recorder.captures
        for _ in range(2):
            sample(fm, x, 2, cuda_graph=True)
        assert recorder.captures == count + 1
        network.w.data = torch.rand(())
        assert torch.equal(sample(fm, x, 2, cuda_graph=True), sample(fm, x, 2))
        assert recorder.captures == count + 2


def test_chunks_share_a_capture(recorder):
    fm, label = FlowMap(net()), torch.arange(10)
    options = {
        "condition": {"label": label}, "guidance": cfg(2.0, null={"label": 10}), "seed": 3, "solver": noisy,
    }  # fmt: skip
    whole = sample(fm, (10, 3), 2, **options)
    assert torch.equal(sample(fm, (10, 3), 2, cuda_graph=True, chunk=4, **options), whole)
    assert (recorder.captures, recorder.replays) == (2, 3)  # two of four rows, one of two


def test_nan_is_reported_after_a_replay(recorder):
    class Spoiled(Net):
        def forward(self, x, s, t, label=None):
            return super().forward(x, s, t) + torch.where(label == 3, torch.nan, 0.0).reshape(-1, 1)

    fm = FlowMap(Spoiled().eval())
    run = lambda label, **k: sample(  # noqa: E731
        fm, (3, 2), 2, seed=0, condition={"label": torch.tensor(label)}, cuda_graph=True, **k
    )
    run([0, 1, 2])
    with pytest.raises(FloatingPointError, match=r"sample 1 \(of 3\).*step 1 of 2"):
        run([0, 3, 2])
    with pytest.warns(RuntimeWarning, match=r"sample 1 \(of 3\)"):
        out = run([0, 3, 2], on_nan="keep")
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    recorder.graphs.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run([0, 3, 2], on_nan="keep")  # the capture itself meets the NaN
    assert len(caught) == 1


def test_refusals(recorder):
    fm, x = FlowMap(net()), torch.zeros(2, 3)
    adaptive = solvers.Solver(solvers.euler.step, "adaptive", 1, 1, loop=lambda *a: None)
    for options, words in (
        ({"grad": True}, "grad=True"),
        ({"grad": "checkpoint"}, "grad='checkpoint'"),
        ({"callback": print}, "callback="),
        ({"progress": True}, "progress=True"),
        ({"memory_limit": "1GB"}, "use chunk="),
        ({"solver": adaptive}, "adaptive chooses"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(fm, x, 2, cuda_graph=True, **options)
    assert recorder.captures == 0


def test_without_a_device_it_says_so():
    with pytest.raises(ValueError, match="needs a CUDA device, the noise is on cpu"):
        sample(FlowMap(net()), torch.zeros(2, 3), cuda_graph=True)


# ---- on CUDA ---------------------------------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("solver", ["flow_map", "heun", noisy])
@pytest.mark.parametrize("guided", [False, True])
def test_cuda_replays_equal_plain_runs(solver, guided):
    fm = FlowMap(net().cuda())
    guide = cfg(2.0, null={"label": 10}) if guided else None
    for seed in (0, 5):
        label = torch.randint(0, 5, (4,), device="cuda")
        options = {"seed": seed, "condition": {"label": label}, "guidance": guide, "solver": solver}
        assert torch.equal(sample(fm, (4, 3), 3, cuda_graph=True, **options), sample(fm, (4, 3), 3, **options))
    first, second = (sample(fm, (4, 3), 3, solver=solver, cuda_graph=True) for _ in range(2))
    assert not torch.equal(first, second)


@cuda
def test_cuda_autocast_and_streams():
    fm = FlowMap(torch.nn.Linear(64, 64).cuda(), prediction="velocity", call=lambda n, x, s, t, c: n(x).float())
    x = torch.randn(16, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = sample(fm, x, 4, solver="heun")
        for _ in range(3):
            assert torch.equal(sample(fm, x, 4, solver="heun", cuda_graph=True), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    results = []
    for k in range(20):
        with torch.cuda.stream(side if k % 2 else torch.cuda.current_stream()):
            results.append(sample(fm, x * 1.0, 4, solver="heun", cuda_graph=True))
    torch.cuda.synchronize()
    assert all(torch.equal(each, results[0]) for each in results)


@cuda
def test_cuda_says_what_cannot_be_captured():
    fm = FlowMap(lambda x, s, t: x * float(x.sum()))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        sample(fm, torch.ones(2, 3, device="cuda"), 2, cuda_graph=True)
    torch.cuda.synchronize()


@cuda
def test_cuda_memory_limit():
    fm = FlowMap(lambda x, s, t: x[:, None].expand(-1, 50, -1).sin().mean(1))
    run = lambda **k: sample(fm, torch.ones(2000, 2500, device="cuda"), 3, **k)  # noqa: E731
    whole = run()
    x = torch.ones(2000, 2500, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sample(fm, x, 3, memory_limit="100MB")
    assert torch.cuda.max_memory_allocated() - before <= 100_000_000
    assert torch.equal(out, whole)
