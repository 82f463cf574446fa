"""FlowEdit against plain loops in float64, and against two Gaussians, between which the edit is known exactly."""

import sys

import pytest
import torch
from oracles import Gaussian
from scipy.integrate import solve_ivp

import pyflowmap as pfm
from pyflowmap.editing import flow_edit
from pyflowmap.interpolants import Trigonometric, VariancePreserving

S = 0.5


def rows(value, x):
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


def gaussian(x, s, mean):
    """Velocity of data N(mean, S^2), one mean per row."""
    t, m = rows(s.double(), x), rows(mean, x)
    return m + (x - t * m) * (t * S**2 - (1 - t)) / ((1 - t) ** 2 + (t * S) ** 2)


def nonlinear(x, s, label, calls=None):
    if calls is not None:
        calls.append(len(x))
    return torch.sin(3.0 * x + rows(label, x)) - rows(s, x) * x


def model(network=nonlinear, **options):
    return pfm.FlowMap(network, prediction="velocity", **options)


def fields(x, count, seed, ids=None):
    return [pfm.evaluate(pfm.noise(x, seed=seed, sample_ids=ids, stream=k + 1)) for k in range(count)]


def by_hand(velocity, x_source, grid, c_source, c_target, seed, ordinary=0, draws=1, w=(1.0, 1.0), ids=None):
    """Algorithm 1, line by line. velocity(x, t, label)."""
    guided = lambda x, t, c, w: velocity(x, t, 0 * c) + w * (velocity(x, t, c) - velocity(x, t, 0 * c))  # noqa: E731
    noise, z, x = iter(fields(x_source, 200, seed, ids)), x_source, None
    for k, (t, t_next) in enumerate(zip(grid, grid[1:])):
        h = t_next - t
        if k < len(grid) - 1 - ordinary:
            total = 0.0
            for _ in range(draws):
                n = next(noise)
                z_source = t * x_source + (1 - t) * n
                z_target = z + z_source - x_source
                total = total + guided(z_target, t, c_target, w[1]) - guided(z_source, t, c_source, w[0])
            z = z + h * total / draws
        else:
            if x is None:
                x = z + (t * x_source + (1 - t) * next(noise)) - x_source
            x = x + h * guided(x, t, c_target, w[1])
    return z if x is None else x


def plain(x, t, label):
    return nonlinear(x, torch.full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32)), label)


LABELS = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 1.0])


def conditions():
    return {"source": {"label": LABELS[0]}, "target": {"label": LABELS[1]}}


@pytest.mark.parametrize("skip, ordinary, draws", [(0, 0, 1), (2, 0, 3), (1, 3, 2), (2, 6, 1), (0, 8, 1)])
@pytest.mark.parametrize("w", [(1.0, 1.0), (1.5, 1.5), (1.5, 4.0)])
def test_algorithm_1_line_by_line(skip, ordinary, draws, w):
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    cfgs = [pfm.guidance.cfg(each, null={"label": 0.0}) if each != 1.0 else None for each in w]
    got = flow_edit(
        model(), x, 8, skip=skip, ordinary=ordinary, draws=draws, seed=7, **conditions(),
        guidance_source=cfgs[0], guidance_target=cfgs[1],
    )  # fmt: skip
    grid = [k / 8 for k in range(skip, 9)]
    expected = by_hand(plain, x, grid, *LABELS, 7, ordinary, draws, w)
    # Sine of 3x makes rounding grow; times reach the network in float32, as here.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_condition_changes_nothing(dtype):
    x = torch.randn(3, 8, dtype=dtype)
    run = lambda cfg: flow_edit(  # noqa: E731
        model(), x, 12, skip=2, draws=2, source={"label": LABELS[0]}, target={"label": LABELS[0]}, seed=1,
        guidance_source=cfg, guidance_target=cfg,
    )  # fmt: skip
    assert torch.equal(run(None), x)
    guided = run(pfm.guidance.cfg(3.0, null={"label": 0.0}))  # four terms that cancel up to the order of their sum
    torch.testing.assert_close(guided, x, rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("path", [None, Trigonometric(), VariancePreserving()])
@pytest.mark.parametrize("prediction", ["velocity", "data", "ddpm_v"])
def test_any_path_and_prediction_is_the_same_edit(path, prediction):
    """The exact predictions of one Gaussian on each path, on the grid that is one grid in linear time."""
    path = path or pfm.interpolants.Linear()

    def network(X, r, mean):
        r = r.double()[0].item()
        a, g = path.alpha(r), path.sigma(r)
        x, t = X / (a + g), a / (a + g)
        b = gaussian(x, torch.full((len(x),), t, dtype=torch.float64), mean)
        x1, x0 = x + (1 - t) * b, x - t * b
        if prediction == "velocity":
            return path.alpha_derivative(r) * x1 + path.sigma_derivative(r) * x0
        return x1 if prediction == "data" else a * x0 - g * x1

    x = torch.randn(3, 5, dtype=torch.float64)
    linear = [0.1, 0.3, 0.55, 0.8, 1.0]
    means = torch.tensor([0.2, -0.4, 1.0]), torch.tensor([1.0, 0.5, -0.3])
    fm = pfm.FlowMap(network, prediction=prediction, interpolant=path)
    grid = [path.model_time(t) for t in linear[:-1]] + [1.0]
    got = flow_edit(fm, x, grid=grid, ordinary=1, source={"mean": means[0]}, target={"mean": means[1]}, seed=3)

    def velocity(x, t, mean):
        return gaussian(x, torch.full((len(x),), t, dtype=torch.float64), mean)

    expected = by_hand(velocity, x, linear, *means, 3, ordinary=1)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)  # r reaches the network in float32


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_gaussians_of_one_width_are_carried_exactly(start):
    """The noise drops out of the difference, d' = b(d | mean = m_b - m_a) with d(start) = 0: d(1) = X_{start,1}(0)."""
    x = torch.randn(2, 4, dtype=torch.float64)
    means = torch.tensor([0.2, -0.4]), torch.tensor([1.0, 0.5])
    errors = []
    for n in (100, 200, 400):
        grid = [start + (1.0 - start) * k / n for k in range(n + 1)]
        got = flow_edit(model(gaussian), x, grid=grid, source={"mean": means[0]}, target={"mean": means[1]}, seed=0)
        exact = Gaussian((means[1] - means[0]).double()[:, None], S).jump(torch.zeros_like(x), start, 1.0)
        errors.append(float((got - x - exact).abs().max()))
    if start == 0.0:  # a straight line, d = t (m_b - m_a): exact in any number of steps, up to times in float32
        assert max(errors) < 1e-6
    else:
        assert errors[-1] < 3e-3
        assert errors[0] / errors[2] == pytest.approx(4.0, rel=0.1)  # Euler: order 1


def test_gaussians_of_two_widths_are_carried_as_fine_integration_says():
    """The difference is linear in the noise, so its mean over noises follows the ODE with the noise's mean, 0."""
    a, b, source, start = Gaussian(0.2, 0.5), Gaussian(1.0, 0.8), 0.6, 0.2

    def network(x, s, which):
        t, w = rows(s, x), rows(which, x)
        return (1 - w) * a.velocity(x, t) + w * b.velocity(x, t)

    def slope(t, z):
        return b.velocity(z + t * source - source, t) - a.velocity(t * source, t)

    exact = solve_ivp(slope, (start, 1.0), [source], rtol=1e-10, atol=1e-12).y[0, -1]
    x = torch.full((2000, 10), source)
    grid = [start + (1.0 - start) * k / 60 for k in range(61)]
    none, all_ = torch.zeros(2000), torch.ones(2000)
    got = flow_edit(model(network), x, grid=grid, source={"which": none}, target={"which": all_}, seed=0)
    spread = float(got.std()) / 20000**0.5
    assert float(got.mean()) == pytest.approx(exact, abs=4 * spread + 0.01)  # 0.01: 60 Euler steps
    assert abs(exact - source) > 0.3  # it went somewhere
    averaged = flow_edit(
        model(network), x[:200], grid=grid, draws=16, source={"which": none[:200]}, target={"which": all_[:200]}, seed=0
    )
    assert float(averaged.std()) == pytest.approx(float(got.std()) / 4, rel=0.1)


def test_a_sample_depends_on_its_seed_and_id_not_on_its_batch():
    x = torch.randn(3, 6)
    run = lambda rows, ids, seed=5: flow_edit(  # noqa: E731
        model(), x[rows], 6, source={"label": LABELS[0][rows]}, target={"label": LABELS[1][rows]}, seed=seed,
        sample_ids=None if ids is None else torch.tensor(ids),
    )  # fmt: skip
    together = run([0, 1, 2], None)
    torch.testing.assert_close(run([2, 0], [2, 0]), together[[2, 0]], rtol=1e-6, atol=1e-6)
    assert (run([2], [0]) - together[[2]]).abs().max() > 1e-3
    assert (run([0, 1, 2], None, seed=6) - together).abs().max() > 1e-3


def calls_of(source=None, guidance_source=None, guidance_target=None, **options):
    calls = []
    fm = model(lambda x, s, **c: nonlinear(x, s, c.get("label", torch.zeros(len(x))), calls))
    both = conditions()
    source = both["source"] if source is None else source
    got = flow_edit(fm, torch.zeros(3, 4), 4, source=source, target=both["target"],
                    guidance_source=guidance_source, guidance_target=guidance_target, seed=0, **options)  # fmt: skip
    return calls, got


def test_one_network_call_per_draw_where_conditions_can_be_stacked():
    cfg = lambda w, **o: pfm.guidance.cfg(w, null={"label": 0.0}, **o)  # noqa: E731
    assert calls_of()[0] == [6] * 4
    assert calls_of(draws=2)[0] == [6] * 8
    assert calls_of(ordinary=1)[0] == [6, 6, 6, 3]
    assert calls_of(guidance_source=cfg(2.0), guidance_target=cfg(5.0))[0] == [12] * 4
    assert calls_of(guidance_target=cfg(5.0))[0] == [9] * 4
    assert calls_of(guidance_source=cfg(5.0), ordinary=1)[0] == [9, 9, 9, 3]
    # Guidance from t = 0.5 on: the first call reckons with all, the one at which it begins lacks one.
    interval = cfg(5.0, interval=(0.4, 1.0))
    assert calls_of(guidance_target=interval)[0] == [9, 6, 6, 3, 9]
    apart, got = calls_of(guidance_source=cfg(2.0), guidance_target=cfg(5.0, batched=False))
    assert apart == [3] * 16
    torch.testing.assert_close(got, calls_of(guidance_source=cfg(2.0), guidance_target=cfg(5.0))[1])
    assert calls_of(source={})[0] == [3] * 8  # other keys


def test_two_launches_per_draw(monkeypatch):
    branches, module, launches = (
        sys.modules["pyflowmap.editing.branches"],
        sys.modules["pyflowmap.editing.flow_edit"],
        [],
    )

    def spy(*combinations, out=None, dtype=None):
        launches.append(max(len(c.operands) for c in combinations))
        return pfm.evaluate(*combinations, out=out, dtype=dtype)

    monkeypatch.setattr(module, "evaluate", spy)
    monkeypatch.setattr(branches, "evaluate", spy)
    cfg = pfm.guidance.cfg(2.0, null={"label": 0.0})
    calls_of(guidance_source=cfg, guidance_target=cfg)
    assert len(launches) == 4 * 2 + 1 and max(launches) <= 8  # and x_source + moved at the end


def test_callback_and_dtypes():
    seen = []
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    got = flow_edit(model(), x, 4, skip=1, ordinary=1, draws=2, **conditions(), seed=0, callback=seen.append)
    assert got.dtype == torch.bfloat16
    assert [r["nfe"] for r in seen] == [4, 8, 9] and [r["t"] for r in seen] == [0.5, 0.75, 1.0]
    assert all(r["x"].dtype == torch.float32 for r in seen)  # z is not rounded at every step
    assert torch.equal(seen[-1]["x"].bfloat16(), got)
    half = torch.nn.Linear(4, 4).to(torch.bfloat16)
    fm = pfm.FlowMap(lambda x, s, label: half(x), prediction="velocity")
    object.__setattr__(fm, "network", Half(half))
    assert flow_edit(fm, x.float(), 4, **conditions(), seed=0).dtype == torch.float32


class Half(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, s, label):
        assert x.dtype == torch.bfloat16
        return self.inner(x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"skip": 8}, "leaves none of 8 steps"),
        ({"skip": 9}, "leaves none of 8 steps"),
        ({"skip": 3, "ordinary": 6}, "skip = 3 and ordinary = 6 are more than 8 steps; ordinary is at most 5"),
        ({"skip": -1}, "number of steps"),
        ({"ordinary": 1.5}, "number of steps"),
        ({"draws": 0}, "at least 1"),
        ({"grid": [0.0, 0.5], "steps": None}, "rise to 1"),
        ({"grid": [1.0, 0.0], "steps": None}, "rise to 1"),
        ({"grid": [0.0, 0.5, 1.0]}, "steps = 8 with a grid of 2 steps"),
        (
            {"source": {"label": torch.zeros(2)}},
            "source: condition 'label' has 2 rows but x_source has 3; give one row per image",
        ),
        ({"guidance_target": pfm.guidance.erk(1.0)}, "guidance_target: erk compares .* flow_edit makes no such pair"),
        ({"guidance_source": pfm.guidance.rescale(pfm.guidance.erk(1.0))}, "guidance_source: erk compares"),
    ],
)
def test_errors(change, message):
    arguments = {"steps": 8, **conditions(), **change}
    with pytest.raises(ValueError, match=message):
        flow_edit(model(), torch.zeros(3, 4), **arguments)


def test_more_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="wrap the network"):
        flow_edit(nonlinear, x, **conditions())
    with pytest.raises(TypeError, match="guidance_target is float"):
        flow_edit(model(), x, guidance_target=3.0, **conditions())
    with pytest.raises(TypeError, match="floating-point"):
        flow_edit(model(), x.long(), **conditions())
    with pytest.raises(ValueError, match="requires grad"):
        flow_edit(model(), x.requires_grad_(), **conditions())
    broken = model(lambda x, s, label: x / 0.0 * (s[:, None] > 0.4))
    with pytest.raises(FloatingPointError, match="step 1 of 4"):
        flow_edit(broken, torch.ones(3, 4), 4, **conditions(), seed=0)
