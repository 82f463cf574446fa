"""Where a run starts and what is said of it: the noise that is drawn, derivatives that would be lost, reports."""

import math
from dataclasses import dataclass

import pytest
import torch

from pyflowmap import solvers
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import cfg_zero
from pyflowmap.interpolants import Interpolant, Linear, Trigonometric, VariancePreserving
from pyflowmap.sampling import sample

STILL = FlowMap(lambda x, t: 0 * x, prediction="velocity")

# ---- the noise that is drawn --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exploding(Interpolant):
    """x_t = t x1 + 10 (1 - t) x0."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 10.0 * (1.0 - t)

    def alpha_derivative(self, t):
        return 0.0 * t + 1.0

    def sigma_derivative(self, t):
        return 0.0 * t - 10.0


@pytest.mark.parametrize(
    ("path", "start", "sigma"),
    [
        (Linear(), 0.0, 1.0),
        (Linear(), 0.04, 0.96),
        (Trigonometric(), 0.01, math.cos(0.005 * math.pi)),
        (VariancePreserving(), 0.0, math.sqrt(1.0 - math.exp(-0.5 * (0.1 + 20.0)))),
        (Exploding(), 0.0, 10.0),
    ],
)
@pytest.mark.parametrize("chunk", [None, 3])
def test_what_is_drawn_has_the_paths_standard_deviation(path, start, sigma, chunk):
    fm = FlowMap(lambda x, t: 0 * x, prediction="data", interpolant=path)
    options = {"solver": "euler", "seed": 3, "trajectory": True, "chunk": chunk}
    unit = sample(STILL, (8, 5), grid=[0.0, 0.5], **options)[0]
    first = sample(fm, (8, 5), grid=[start, 0.5], **options)[0]
    torch.testing.assert_close(first, sigma * unit, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([0.9, 1.0], r"begins at t = 0\.9, where the state is 0\.9 data.*; pass the state"),
        ([1.0, 0.0], r"begins at t = 1, the data end, and noise alone would be drawn; pass the state"),
        ([0.02, 0.0], r"falls from t = 0\.02"),
    ],
)
def test_noise_is_not_drawn_where_the_state_is_more(grid, words):
    with pytest.raises(ValueError, match=words):
        sample(STILL, (2, 3), grid=grid, solver="euler", seed=0)
    assert sample(STILL, torch.zeros(2, 3), grid=grid, solver="euler").shape == (2, 3)


# ---- derivatives that would be lost -------------------------------------------------------------------------------


def test_torch_func_grad_of_what_is_not_recorded_is_refused_whatever_it_is_by():
    x, q = torch.ones(2, 3), torch.tensor(1.5)

    def by_closure(q, **options):
        return sample(FlowMap(lambda x, t: q * x, prediction="velocity"), x, 3, solver="heun", **options).sum()

    def by_condition(q):
        fm = FlowMap(lambda x, t, q: q[:, None] * x, prediction="velocity")
        return sample(fm, x, solver="heun", condition={"q": q.expand(2)}).sum()

    network = torch.nn.Linear(3, 3)

    def by_parameters(parameters):
        call = lambda x, t: torch.func.functional_call(network, parameters, (x,))  # noqa: E731
        return sample(FlowMap(call, prediction="velocity"), x, solver="heun").sum()

    for f, at in ((by_closure, q), (by_condition, q), (by_parameters, dict(network.named_parameters()))):
        for derivative in (
            torch.func.grad(f),
            torch.func.jacrev(f),
            torch.func.grad(lambda p, f=f: torch.func.vjp(f, p)[0]),
        ):
            with pytest.raises(ValueError, match=r"grad=False would be zero; .*torch\.no_grad"):
                derivative(at)
    h = 1 / 3  # Heun: x' = (1 + h q + (h q)^2 / 2) x
    exact = 6 * 3 * (1 + h * 1.5 + (h * 1.5) ** 2 / 2) ** 2 * (h + h * h * 1.5)
    assert torch.func.grad(lambda q: by_closure(q, grad=True))(q).item() == pytest.approx(exact, rel=1e-5)

    def constant(q):
        with torch.no_grad():
            drawn = by_closure(torch.tensor(1.0))
        return q * drawn

    assert torch.func.grad(constant)(q).item() == pytest.approx(by_closure(torch.tensor(1.0)).item(), rel=1e-6)


@pytest.mark.parametrize("control", ["sample", "batch"])
def test_derivatives_through_adaptive_steps(control):
    """dx/dt = -x^2: x(1) = x/(1 + x), whose derivative is 1/(1 + x)^2."""
    fm = FlowMap(lambda x, t: -x * x, prediction="velocity")
    solver = solvers.dopri5.using(rtol=1e-7, atol=1e-7, control=control)
    x = torch.tensor([[0.2, 0.7], [1.1, 0.4]], dtype=torch.float64)
    exact, twice = (1 + x) ** -2, -2 * (1 + x) ** -3
    run = lambda x: sample(fm, x, solver=solver, grad=True)  # noqa: E731
    close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)  # noqa: E731
    close(torch.func.grad(lambda x: run(x).sum())(x), exact)
    close(torch.func.jvp(run, (x,), (torch.ones_like(x),))[1], exact)
    close(torch.func.grad(lambda x: torch.func.grad(lambda x: run(x).sum())(x).sum())(x), twice)
    with pytest.raises(RuntimeError, match=r"torch\.vmap of an adaptive solver"):
        torch.vmap(run)(x[None])


# ---- chunks of adaptive runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"chunk": 2}, {"memory_limit": "1MB"}])
def test_adaptive_runs_in_chunks(options):
    fm = FlowMap(lambda x, t: -x * x * x, prediction="velocity")
    x = torch.linspace(-3, 3, 10).reshape(5, 2)
    close = 0.0 if "chunk" in options else 1e-6  # memory is measured on another road, which rounds differently
    whole = sample(fm, x, solver="dopri5")
    torch.testing.assert_close(sample(fm, x, solver="dopri5", **options), whole, rtol=close, atol=close)
    with pytest.raises(ValueError, match='chunks would change the result; with control="sample" they do not'):
        sample(fm, x, solver=solvers.dopri5.using(control="batch"), **options)


# ---- reports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()])
@pytest.mark.parametrize("grad", [False, True])
def test_reports_speak_of_the_models_own_times(path, grad):
    fm = FlowMap(lambda x, t: torch.where(t[:, None] > 0.6, float("nan"), -x), prediction="velocity", interpolant=path)
    with pytest.raises(FloatingPointError, match=r"in step 4 of 4 \(from t = 0\.7 to 0\.9\)"):
        sample(fm, torch.ones(2, 2), grid=[0.1, 0.2, 0.4, 0.7, 0.9], solver="euler", grad=grad)
    with pytest.raises(FloatingPointError, match=r"before the first step \(t = 0\.1\)"):
        sample(fm, torch.full((2, 2), math.inf), grid=[0.1, 0.9], solver="euler", grad=grad)


def test_reports_count_idle_steps():
    fm = FlowMap(lambda x, t, label: torch.where(t[:, None] > 0.6, float("nan"), -x), prediction="velocity")
    with pytest.raises(FloatingPointError, match=r"in step 4 of 4 \(from t = 0\.7 to 1\)"):
        sample(
            fm,
            torch.ones(2, 2),
            grid=[0.0, 0.2, 0.4, 0.7, 1.0],
            solver="euler",
            condition={"label": torch.ones(2)},
            guidance=cfg_zero(2.0, null={"label": 0}, zero_init=1),
        )


def test_a_report_after_the_start_was_written_over():
    z = torch.ones(2, 3)
    with pytest.raises(FloatingPointError, match=r"became NaN or infinite by the last step \(out= has written over x"):
        solvers.euler(lambda x, t: x * (math.inf if t > 0.4 else 1.0), z, [0.0, 0.5, 1.0], out=z)
    z = torch.ones(2, 3)  # another out: the step is found
    with pytest.raises(FloatingPointError, match="in step 2 of 2"):
        solvers.euler(lambda x, t: x * (math.inf if t > 0.4 else 1.0), z, [0.0, 0.5, 1.0], out=torch.empty(2, 3))
