"""iMF: gradients with and without a head and guidance, the variance it leaves, the law of omega."""

import math

import pytest
import torch
from objectives.plain import Tiny, assert_same, data, gradients, pairs
from oracles import Gaussian

from pyflowmap import FlowMap, weights
from pyflowmap.objectives import embedded_guidance, improved_mean_flow, mean_flow

ORACLE = Gaussian()
EXACT = FlowMap(lambda x, s, t: ORACLE.mean_velocity(x, s, t))
VELOCITY = FlowMap(lambda x, t: ORACLE.velocity(x, t[:, None]), prediction="velocity")
SUM = weights.constant(norm="sum")
HEAD = {"velocity_head": lambda output: output[1]}


def plain(network, x1, x0, s, t, n):
    """(|| V - b ||^2, || v - b ||^2) by torch.func.jvp with the predicted velocity as tangent; t = s in n rows."""
    x, b, t = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0, torch.cat([s[:n], t[n:]])
    two = isinstance(network(x, s, t), tuple)
    u_of = (lambda *args: network(*args)[0]) if two else network
    w = (network(x, s, s)[1] if two else network(x, s, s)).detach()
    u, du = torch.func.jvp(lambda x, s: u_of(x, s, t), (x, s), (w, torch.ones_like(s)))
    V = u - (t - s)[:, None] * du.detach()
    return (V - b).square().sum(1), (network(x, s, t)[1] - b).square().sum(1) if two else None


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients(outputs, adaptive):
    network, (x1, x0), (s, t) = Tiny(outputs=outputs), data(12), pairs(12)
    t[8] = s[8]
    weight = weights.adaptive(p=0.7, c=0.1) if adaptive else SUM
    ours = improved_mean_flow(FlowMap(network), x1, x0=x0, times=lambda x: (s, t), weight=weight, equal=0.25,
                              **(HEAD if outputs == 2 else {}))  # fmt: skip
    errors = plain(network, x1, x0, s, t, 3)
    want = [e / (e.detach() + 0.1) ** 0.7 if adaptive else e for e in errors if e is not None]
    torch.testing.assert_close(ours.raw_error, errors[0].detach() / 3, rtol=1e-10, atol=1e-10)
    assert_same(ours, sum(want), network)
    assert set(ours.parts) == {"flow_matching", "improved_mean_flow"} | ({"velocity_head"} if outputs == 2 else set())
    if outputs == 2:
        torch.testing.assert_close(ours.parts["velocity_head"], errors[1].detach().mean() / 3)


def test_a_network_whose_time_runs_backward():
    """MeanFlow's (1 - s, 1 - t) and the sign of both its velocities turned: the same losses and gradients."""
    network, (x1, x0), (s, t) = Tiny(outputs=2), data(12), pairs(12)
    turned = FlowMap(lambda x, a, r: tuple(-each for each in network(x, 1.0 - a, 1.0 - r)), call="meanflow")
    one, two = (improved_mean_flow(fm, x1, x0=x0, times=lambda x: (s, t), **HEAD) for fm in (FlowMap(network), turned))
    assert_same(one, two.per_sample, network)


def test_distillation_is_that_of_mean_flow():
    x1, x0 = data(64)
    options = {"x0": x0, "times": lambda x: pairs(64), "equal": 0.25, "teacher": VELOCITY}
    assert float(improved_mean_flow(EXACT, x1, **options).raw_error.max()) < 1e-20
    network = Tiny()
    ours, other = (each(FlowMap(network), x1, **options) for each in (improved_mean_flow, mean_flow))
    torch.testing.assert_close(ours.per_sample, other.per_sample, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(network, ours.mean()), gradients(network, other.mean()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_exact_map_leaves_the_variance_of_b_and_no_mean_gradient():
    """V = v of the exact map, so the loss is Var(b | x_s) = (S / sd_s)^2, without MeanFlow's (sd_t / sd_s)^2."""
    n, (s, t) = 200_000, (0.3, 0.8)
    x1, x0 = data(n, 1, seed=4)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def perturbed(x, s, t):
        features = (torch.ones_like(x), x, x * x, torch.sin(3 * x))
        return ORACLE.mean_velocity(x, s, t) + sum(w * f for w, f in zip(theta, features))

    def gradient(m, S):
        times = lambda x: (torch.full((n,), s).double(), torch.full((n,), t).double())  # noqa: E731
        loss = improved_mean_flow(FlowMap(perturbed), m + S * x1, x0=x0, times=times, equal=0.0, weight=SUM).per_sample
        parts = [torch.autograd.grad(part.mean(), theta, retain_graph=True)[0] for part in loss.chunk(100)]
        return loss.detach(), torch.stack(parts)

    loss, parts = gradient(0.7, 0.5)
    assert abs(float(loss.mean()) - (ORACLE.S / ORACLE.sd(s)) ** 2) < 4 * float(loss.std()) / math.sqrt(n)
    assert float((parts.mean(0) / (parts.std(0) / 10)).abs().max()) < 4.0
    _, wrong = gradient(0.7, 0.6)
    assert float((wrong.mean(0) / (wrong.std(0) / 10)).abs().max()) > 20.0


def test_the_tangent_is_the_predicted_velocity():
    """u = x x: V = u - h (2 x w) with w = u_{s,s} = x x, wherever b points."""
    (x1, x0), (s, t) = data(8), pairs(8)
    ours = improved_mean_flow(FlowMap(lambda x, s, t: x * x), x1, x0=x0, times=lambda x: (s, t), equal=0.0, weight=SUM)
    x = (1 - s[:, None]) * x0 + s[:, None] * x1
    want = (x * x - (t - s)[:, None] * 2 * x * x * x - (x1 - x0)).square().sum(1)
    torch.testing.assert_close(ours.per_sample, want, rtol=1e-10, atol=1e-10)


# ---- guidance as an input -----------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """u that depends on label and on all it is told; a head that is another function."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = Tiny(outputs=2), []

    def forward(self, x, s, t, label, omega, lo=None, hi=None):
        self.seen.append((label, omega, lo, hi))
        told = 1.0 - 1.0 / omega + (0.0 if lo is None else 0.2 * lo - 0.1 * hi)
        u, v = self.net(x, s, t, label)
        return u * (1.0 + told[:, None]), v * (1.0 - told[:, None])


@pytest.mark.parametrize("interval", [None, ("lo", "hi")])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_guided_gradients_by_hand(interval, drop):
    network, (x1, x0), (s, t) = Told(), data(40), pairs(40)
    label = torch.arange(40) % 4
    guidance = embedded_guidance(null={"label": 9}, interval=interval, drop=drop)
    ours = improved_mean_flow(FlowMap(network), x1, x0=x0, times=lambda x, seed: (s, t), condition={"label": label},
                              weight=SUM, equal=0.25, guidance=guidance, seed=3, **HEAD)  # fmt: skip
    kept, omega, lo, hi = network.seen[0]
    dropped = kept == 9
    assert (0.2 < float(dropped.double().mean()) < 0.8) if drop else not bool(dropped.any())
    end = torch.cat([s[:10], t[10:]])
    guided = ~dropped if interval is None else ~dropped & (s >= lo) & (s <= hi)
    told = (omega,) if interval is None else (omega, lo, hi)
    assert bool(guided.any()) and (interval is None or bool((~guided & ~dropped).any()))

    x, b = (1 - s[:, None]) * x0 + s[:, None] * x1, x1 - x0
    with torch.no_grad():
        w = network(x, s, s, kept, *told)[1]
        null = network(x, s, s, torch.full_like(label, 9), *told)[1]
        b = b + torch.where(guided, 1 - 1 / omega, 0.0)[:, None] * (w - null)
    u, du = torch.func.jvp(lambda x, s: network(x, s, end, kept, *told)[0], (x, s), (w, torch.ones_like(s)))
    V = u - (end - s)[:, None] * du.detach()
    v = network(x, s, end, kept, *told)[1]
    assert_same(ours, (V - b).square().sum(1) + (v - b).square().sum(1), network)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.0 + 1e-7, 2.5])
def test_the_law_of_omega(beta):
    """P(omega < z) = integral of y^-beta from 1 to z over that to 8, by quadrature."""
    guidance = embedded_guidance(null={"label": 9}, beta=beta)
    grid = torch.linspace(1.0, 8.0, 200_001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid(grid**-beta, grid)
    for share in (0.1, 0.5, 0.9):
        omega = guidance.law(torch.tensor(share, dtype=torch.float64))
        place = int(torch.searchsorted(cumulative, share * cumulative[-1]))
        assert float(omega) == pytest.approx(float(grid[place]), abs=1e-4)
    drawn = guidance.inputs(torch.zeros(50_000, 1), 3, None)["omega"].double()
    below = (drawn < float(guidance.law(torch.tensor(0.3)))).double().mean()
    assert abs(float(below) - 0.3) < 4 * math.sqrt(0.21 / 50_000)
    assert float(drawn.min()) >= 1.0 and float(drawn.max()) <= 8.0


def test_the_guided_solution_is_classifier_free_guidance():
    """Where v(c, omega) = v_null + omega (b - v_null), the regressed b_g averages to v(c, omega) itself."""

    def network(x, s, t, label, omega):
        null = -x
        return torch.where((label == 9)[:, None], null, null + omega[:, None] * (0.7 - null))

    _, x0 = data(64)
    loss = improved_mean_flow(FlowMap(network), x0 + 0.7, x0=x0, condition={"label": torch.zeros(64)}, weight=SUM,
                              equal=1.0, guidance=embedded_guidance(null={"label": 9}, drop=0.0), seed=1)  # fmt: skip
    assert float(loss.raw_error.max()) < 1e-10


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda **k: embedded_guidance(), ValueError, "null"),
        (lambda **k: embedded_guidance(null={"label": 9}, largest=0.5), ValueError, "largest = 0.5"),
        (lambda **k: embedded_guidance(null={"label": 9}, drop=2), ValueError, "drop = 2"),
        (lambda **k: embedded_guidance(null={"label": 9}, interval=("a", "a")), ValueError, "interval = "),
        (lambda **k: improved_mean_flow(guidance=2.0, **k), TypeError, "guidance is float.*embedded_guidance"),
        (
            lambda **k: improved_mean_flow(guidance=embedded_guidance(null={"label": 9}), teacher=VELOCITY, **k),
            ValueError,
            "both given",
        ),
        (lambda **k: improved_mean_flow(velocity_head=1, **k), TypeError, "velocity_head is int"),
        (lambda **k: improved_mean_flow(velocity_head=lambda o: o[:, :1], **k), ValueError, r"gave shape \(.*, 1\)"),
        (
            lambda **k: improved_mean_flow(
                guidance=embedded_guidance(null={"label": 9}), condition={"label": torch.zeros(4), "omega": 2.0}, **k
            ),
            ValueError,
            "'omega' is given",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(flow_map=FlowMap(Tiny()), x1=torch.zeros(4, 3).double())
