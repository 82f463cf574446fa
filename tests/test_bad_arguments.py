"""What callers get wrong: one line that says what, its value and the cure; nothing is silently something else."""

import warnings

import pytest
import torch
from oracles import Gaussian

import pyflowmap as pfm
from pyflowmap import objectives

FM = pfm.FlowMap(lambda x, s, t: torch.ones_like(x))
Z = torch.zeros(2, 3)


def heun(velocity, x, s, t, memory):
    k = velocity(x, s)
    return x + (t - s) / 2 * (k + velocity(x + (t - s) * k, t)), memory


CALLS = [
    (lambda: pfm.log_likelihood(FM, Z, 5, grid=[0.0, 0.5, 1.0]), ValueError, "steps = 5 beside a grid"),
    (lambda: pfm.sample("digits", (2, 3)), TypeError, r"pfm.load\('digits'\)"),
    (lambda: pfm.sample(FM, 4), TypeError, "noise_or_shape is int"),
    (lambda: pfm.sample(FM, Z.numpy()), TypeError, "torch.from_numpy"),
    (lambda: pfm.sample(FM, (2, 3), seed=2**64), ValueError, "more than 64 bits"),
    (lambda: pfm.sample(FM, (2, 3), seed=True), TypeError, "seed is bool"),
    (lambda: pfm.sample(FM, (2, 3), seed=1.5), TypeError, "seed is float"),
    (lambda: pfm.sample(FM, (2, 3), sample_ids=torch.arange(2)), ValueError, "sample_ids without a seed"),
    (lambda: pfm.sample(FM, (2, 3), grid=[1.0, 0.0]), ValueError, "begins at t = 1, the data end"),
    (lambda: pfm.sample(FM, (2, 3), dtype="bfloat16"), TypeError, "dtype = 'bfloat16'"),
    (lambda: pfm.sample(FM, Z, solver=heun, nfe=8), ValueError, r"pfm.solvers.solver\(nfe=2\)"),
    (lambda: pfm.sample(FM, Z, solver=pfm.solvers.Solver), TypeError, "solver is the class Solver"),
    (lambda: pfm.sample(FM, Z, solver=lambda v, x, s, t, m: x), TypeError, "the step returned Lazy; return a lazy"),
    (lambda: pfm.sample(FM, Z, solver=lambda v, x, s, t, m: None), TypeError, "the step returned NoneType"),
    (lambda: pfm.solvers.heun(lambda x, t: 1.0, Z, [0.0, 1.0]), TypeError, "the field returned float"),
    (
        lambda: pfm.solvers.heun_alpha(lambda x, t: x, Z, [0.0, 1.0], beta=1),
        TypeError,
        "no option 'beta'; it has alpha",
    ),
    (lambda: FM.jump(Z, 0, 1000), ValueError, "t = 1000; times run from 0 = noise to 1 = data; a network that wants"),
    (lambda: FM.velocity(Z, torch.full((2,), 500.0)), ValueError, "t contains 500"),
    (lambda: FM.velocity(Z, torch.tensor([0.5, -3.0])), ValueError, "t contains -3"),
    (lambda: FM.velocity(Z, torch.tensor([0.5, float("nan")])), ValueError, "t contains NaN"),
    (lambda: FM(Z), TypeError, r"ask .jump\(x, s, t\)"),
    (lambda: FM.eval(), AttributeError, "flow_map.network.eval"),
    (lambda: objectives.flow_matching(FM, Z, times="uniform"), TypeError, "times is str; it is a law"),
    (lambda: objectives.mean_flow(FM, Z, condition=torch.arange(2)), TypeError, "condition is Tensor"),
    (
        lambda: objectives.mean_flow(FM, Z, condition={"y": torch.arange(3)}),
        ValueError,
        "'y' has 3 rows for a batch of 2",
    ),
    (lambda: objectives.mean_flow(FM, Z[0]), ValueError, r"x1 has shape \(3,\)"),
    (lambda: objectives.mean_flow(FM, Z).backward(), AttributeError, r"loss.mean\(\).backward\(\)"),
    (lambda: objectives.flow_matching(FM, Z, times=lambda x: 1e3 * torch.rand(2)), ValueError, "times run from 0"),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_gradients_that_nothing_would_record():
    with torch.no_grad(), pytest.raises(ValueError, match="records nothing"):
        pfm.sample(FM, Z, grad=True)
    with pytest.raises(ValueError, match="grid requires grad"):
        pfm.sample(FM, Z, grad=True, grid=torch.tensor([0.0, 1.0], requires_grad=True))


def test_a_bad_row_of_the_noise_does_not_harm_the_others():
    z = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.warns(RuntimeWarning, match="sample 1 .of 2. is not finite before the first step"):
        result = pfm.sample(FM, z, 2, on_nan="keep")
    assert torch.equal(result[0], z[0] + 1.0)
    with pytest.raises(FloatingPointError, match="keep"):
        pfm.sample(FM, z, 2)


def test_times_of_different_dimensions_align_by_leading_ones():
    x, s, t = torch.zeros(2, 2, 1), torch.zeros(2, 2), torch.tensor([1.0, 0.5])
    expected = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    assert torch.equal(FM.jump(x, s, t)[..., 0], expected)
    seen = []
    fm = pfm.FlowMap(lambda x, s, t: seen.append((s, t)) or torch.ones_like(x))
    assert torch.equal(fm.jump(x, s, t)[..., 0], expected)
    assert torch.equal(seen[0][1] - seen[0][0], expected)
    data = pfm.FlowMap(lambda x, s: torch.ones_like(x), prediction="data", interpolant=pfm.interpolants.Trigonometric())
    whole = data.mean_velocity(x, s + 0.1, t[:, None].expand(2, 2).contiguous())
    torch.testing.assert_close(data.mean_velocity(x, s + 0.1, t), whole)


@pytest.mark.parametrize("prediction", ["data", "noise", "score", "ddpm_v"])
@pytest.mark.parametrize("path", [pfm.interpolants.VariancePreserving(), pfm.interpolants.Trigonometric()])
def test_the_mean_velocity_of_a_short_jump_is_the_velocity(prediction, path):
    fm = pfm.FlowMap(lambda x, s: torch.sin(x), prediction=prediction, interpolant=path)
    x, s = torch.ones(4, 1), torch.full((4,), 0.5)
    t = s + torch.tensor([1e-2, 1e-4, 1e-5, 1e-6])
    wide = fm.mean_velocity(x.double(), s.double(), t.double())
    torch.testing.assert_close(fm.mean_velocity(x, s, t).double(), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n, s in pfm.solvers.named.items() if s.takes == "velocity" and not s.stochastic]
)
def test_every_deterministic_solver_gives_a_density(name):
    gauss = Gaussian()
    fm = pfm.FlowMap(lambda x, t: gauss.velocity(x, t[:, None]), prediction="velocity")
    x1 = torch.tensor([[0.3], [1.1]], dtype=torch.float64)
    exact = torch.distributions.Normal(gauss.m, gauss.S).log_prob(x1)[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = pfm.log_likelihood(fm, x1, solver=name, exact=True, grid=torch.linspace(0.0, 1.0, 201).double())
    torch.testing.assert_close(got, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", ["unet", "mlp"])
def test_a_network_of_another_dtype_than_the_noise(make, dtype):
    torch.manual_seed(0)
    if make == "unet":
        config = pfm.nn.UNetConfig(image=(1, 8, 8), channels=8, labels=0)
        network, shape = pfm.nn.UNet(config), (2, 1, 8, 8)
    else:
        network, shape = pfm.nn.MLP(pfm.nn.MLPConfig(features=3, width=16, depth=1)), (2, 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = pfm.sample(pfm.FlowMap(network), shape, 2, seed=0)
    cast = pfm.sample(pfm.FlowMap(network.to(dtype)), shape, 2, seed=0)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.1, atol=0.1)


def test_nested_conditions_follow_their_rows():
    def network(x, s, t, extra):
        return extra["scale"][:, None] * x + extra["pair"][0][:, None]

    x1 = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    extra = {"scale": torch.arange(8.0), "pair": (torch.arange(8.0), 3)}
    for objective in (objectives.mean_flow, objectives.lagrangian, objectives.progressive):
        share = {"equal" if objective is objectives.mean_flow else "diagonal": 0.5}
        whole = objective(pfm.FlowMap(network), x1, condition={"extra": extra}, seed=1, **share).per_sample
        flat = lambda x, s, t, scale, pair: network(x, s, t, {"scale": scale, "pair": (pair, 3)})  # noqa: E731
        plain = {"scale": extra["scale"], "pair": extra["pair"][0]}
        assert torch.equal(whole, objective(pfm.FlowMap(flat), x1, condition=plain, seed=1, **share).per_sample)


def test_a_network_in_training_mode_is_warned_of():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, s, t):
            return self.drop(x)

    with pytest.warns(RuntimeWarning, match=r"drop .Dropout. is in training mode; network.eval"):
        pfm.sample(pfm.FlowMap(Noisy()), Z, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pfm.sample(pfm.FlowMap(Noisy().eval()), Z, 2)


def test_a_loss_under_inference_mode():
    loss = pfm.editing.Loss(lambda x1, y: (x1 - y).square().sum(1))
    data = pfm.FlowMap(lambda x, s: torch.zeros_like(x) + 0.5, prediction="data")
    arguments = (data, Z, torch.ones(2, 3), loss)
    plain = pfm.editing.flow_chef(*arguments, steps=4, strength=0.1)
    with torch.inference_mode():
        inside = pfm.editing.flow_chef(data, torch.zeros(2, 3), torch.ones(2, 3), loss, steps=4, strength=0.1)
    assert torch.equal(plain, inside)
