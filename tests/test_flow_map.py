"""FlowMap: every prediction and call against the closed-form Gaussian; files."""

import json
import types

import numpy as np
import pytest
import torch
from oracles import GOLDEN, MIXTURE_GOLDEN, Gaussian, Mixture
from safetensors.torch import save_file

from pyflowmap import calls, checkpoint
from pyflowmap.flow_map import FlowMap
from pyflowmap.interpolants import Linear, Trigonometric, VariancePreserving
from pyflowmap.nn import MLP, MLPConfig, UNet, UNetConfig, build, describe
from pyflowmap.nn.gaussian import gaussian_mean_velocity

ORACLE = Gaussian()


def exact():
    return FlowMap(ORACLE.mean_velocity)


@pytest.mark.parametrize(("s", "t", "x", "b_s", "X", "v", "b_t"), GOLDEN)
def test_golden_values(s, t, x, b_s, X, v, b_t):
    state = torch.full((2, 3), x, dtype=torch.float64)
    fm = exact()
    for result, expected in (
        (fm.velocity(state, s), b_s),
        (fm.jump(state, s, t), X),
        (fm.mean_velocity(state, s, t), v),
        (fm.velocity(fm.jump(state, s, t), t), b_t),
    ):
        # float times reach a network as float32, so a float64 oracle is right to 1e-7 only
        torch.testing.assert_close(result, torch.full_like(state, expected), rtol=0, atol=5e-7)


def prediction_of(kind, oracle, path, x, t):
    """A perfect network of each kind for data N(m, S^2) on any path: E[x1|x] and E[x0|x] in closed form."""
    a, g, da, dg = path.alpha(t), path.sigma(t), path.alpha_derivative(t), path.sigma_derivative(t)
    variance = (a * oracle.S) ** 2 + g**2
    data = oracle.m + a * oracle.S**2 / variance * (x - a * oracle.m)
    noise = g / variance * (x - a * oracle.m)
    return {
        "data": data,
        "noise": noise,
        "velocity": da * data + dg * noise,
        "ddpm_v": a * noise - g * data,
        "score": -(x - a * oracle.m) / variance,
    }[kind]


KINDS = ["velocity", "data", "noise", "ddpm_v", "score"]
PATHS = [Linear(), Trigonometric(), VariancePreserving()]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_every_prediction_gives_the_velocity_and_ddim(kind, path, as_tensor):
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    s, t = (
        (0.3, 0.8)
        if not as_tensor
        else (torch.full((4,), 0.3, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64))
    )
    fm = FlowMap(lambda x, time: prediction_of(kind, ORACLE, path, x, 0.3), prediction=kind, interpolant=path)
    velocity = prediction_of("velocity", ORACLE, path, x, 0.3)
    torch.testing.assert_close(fm.velocity(x, s), velocity, rtol=1e-9, atol=1e-9)
    if kind == "velocity":
        jump = x + 0.5 * velocity
    else:  # DDIM: both estimates held fixed, moved along the path
        jump = path.alpha(0.8) * prediction_of("data", ORACLE, path, x, 0.3) + path.sigma(0.8) * prediction_of(
            "noise", ORACLE, path, x, 0.3
        )
    torch.testing.assert_close(fm.jump(x, s, t), jump, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fm.mean_velocity(x, s, t), (jump - x) / 0.5, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fm.mean_velocity(x, s, s), velocity, rtol=1e-9, atol=1e-9)  # the limit, not 0/0


@pytest.mark.parametrize(("x", "t", "data", "velocity", "noise", "score"), MIXTURE_GOLDEN)
def test_conversions_of_a_mixture(x, t, data, velocity, noise, score):
    state = torch.full((1, 1), x, dtype=torch.float64)
    torch.testing.assert_close(Mixture().velocity(state, t).item(), velocity, rtol=0, atol=1e-11)
    for kind, value in (("data", data), ("noise", noise), ("score", score)):
        fm = FlowMap(lambda x, s, value=value: torch.full_like(x, value), prediction=kind)
        torch.testing.assert_close(fm.velocity(state, t).item(), velocity, rtol=0, atol=2e-11)


def test_mixed_rows_of_equal_and_unequal_times_have_finite_gradients():
    s = torch.tensor([0.2, 0.5], requires_grad=True)
    fm = FlowMap(lambda x, s: 0.1 * x, prediction="data", interpolant=Trigonometric())
    out = fm.mean_velocity(torch.ones(2, 3), s, torch.tensor([0.2, 0.9]))
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(s.grad.isfinite().all())


def test_jump_from_data_prediction_reaches_the_end():
    fm = FlowMap(lambda x, s: torch.full_like(x, 3.0), prediction="data")
    torch.testing.assert_close(fm.jump(torch.randn(2, 2), 0.25, 1.0), torch.full((2, 2), 3.0))
    with pytest.raises(ValueError, match="data end"):
        fm.velocity(torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match="noise end"):
        FlowMap(lambda x, s: x, prediction="noise").jump(torch.zeros(2, 2), 0.0, 1.0)


# ---- calls -------------------------------------------------------------------------------------------------------


def test_meanflow_time_and_sign_are_translated():
    seen = {}

    def meanflow_network(z, tau, r):  # their convention: 1 = noise, average velocity points to the noise
        seen.update(tau=tau, r=r)
        return -ORACLE.mean_velocity(z, 1 - tau, 1 - r)

    x = torch.randn(4, 3, dtype=torch.float64)
    fm = FlowMap(meanflow_network, call="meanflow")
    torch.testing.assert_close(fm.jump(x, 0.2, 0.9), ORACLE.jump(x, 0.2, 0.9), rtol=1e-5, atol=1e-6)
    assert float(seen["tau"][0]) == pytest.approx(0.8) and float(seen["r"][0]) == pytest.approx(0.1)
    torch.testing.assert_close(fm.velocity(x, 0.2), ORACLE.velocity(x, 0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda v: (v,), lambda v: types.SimpleNamespace(sample=v), lambda v: {"sample": v}])
def test_diffusers_timestep_sign_and_outputs(wrap):
    def transformer(x, timestep, encoder):
        assert float(timestep[0]) == pytest.approx(750.0)
        return wrap(-ORACLE.velocity(x, 0.25) * encoder)

    x = torch.randn(4, 3, dtype=torch.float64)
    fm = FlowMap(transformer, prediction="velocity", call="diffusers")
    torch.testing.assert_close(fm.velocity(x, 0.25, encoder=1.0), ORACLE.velocity(x, 0.25))


def test_a_data_prediction_keeps_its_sign_under_reversed_time():
    fm = FlowMap(lambda x, timestep: torch.full_like(x, 3.0), prediction="data", call=calls.diffusers(scale=1.0))
    torch.testing.assert_close(fm.velocity(torch.ones(2, 2), 0.5), torch.full((2, 2), 4.0))


def test_start_and_span():
    fm = FlowMap(lambda x, s, span: ORACLE.mean_velocity(x, s, s + span), call="start_and_span")
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(fm.jump(x, 0.25, 0.75), ORACLE.jump(x, 0.25, 0.75), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FlowMap(3), TypeError, "int"),
        (lambda: FlowMap(abs, prediction="eps"), ValueError, "'eps'.*noise"),
        (lambda: FlowMap(abs, call="mine"), ValueError, "start_and_end"),
        (lambda: FlowMap(abs, call="diffusers"), ValueError, "both times"),
        (lambda: FlowMap(abs, interpolant="linear"), TypeError, "Linear"),
        (
            lambda: FlowMap(lambda x, s, t: x[:, :1]).jump(torch.zeros(2, 2), 0.0, 1.0),
            ValueError,
            r"\(2, 1\).*\(2, 2\)",
        ),
        (lambda: FlowMap(lambda x, s, t: None).jump(torch.zeros(2, 2), 0.0, 1.0), TypeError, "NoneType"),
        (lambda: exact().jump(torch.zeros(2, 3), torch.zeros(3), 1.0), ValueError, "s has shape"),
        (lambda: exact().jump(torch.zeros(2, 3), 0.0, float("nan")), ValueError, "t = nan"),
    ],
)
def test_bad_flow_maps(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- networks ----------------------------------------------------------------------------------------------------


def test_gaussian_mean_velocity_is_the_oracle():
    x = torch.randn(50, 1, dtype=torch.float64)
    s, t = torch.rand(2, 50, 1, dtype=torch.float64)
    s[:10] = t[:10]
    s[10], t[10], s[11], t[11] = 0.0, 1.0, 1.0, 0.0
    m, S = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    result = gaussian_mean_velocity(x, s, t, m, S)
    torch.testing.assert_close(result, ORACLE.mean_velocity(x, s[:, 0], t[:, 0]), rtol=1e-9, atol=1e-9)


def test_untrained_unet_is_the_gaussian_of_the_data():
    images = 0.3 + 0.5 * torch.randn(200, 1, 28, 28)
    network = UNet().fit(images)
    z, y = torch.randn(3, 1, 28, 28), torch.tensor([0, 4, 10])
    expected = network.mean + network.std * z
    torch.testing.assert_close(FlowMap(network).jump(z, 0.0, 1.0, label=y).detach(), expected, rtol=1e-4, atol=1e-4)


def randomised(network):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("network", [UNet(), MLP(MLPConfig(features=5, labels=3))], ids=["UNet", "MLP"])
def test_networks_use_both_times_and_labels_row_by_row(network):
    randomised(network)
    shape = (3, 1, 28, 28) if isinstance(network, UNet) else (3, 5)
    x, s, t, y = (
        torch.randn(shape),
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([0.2, 0.6, 1.0]),
        torch.tensor([0, 1, 2]),
    )
    with torch.no_grad():
        out = network(x, s, t, y)
        for i in range(3):  # a row does not depend on its batch
            torch.testing.assert_close(
                network(x[i : i + 1], s[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i], rtol=1e-4, atol=1e-4
            )
        for changed in ((x, s + 0.05, t, y), (x, s, t + 0.05, y), (x, s, t, (y + 1) % 3)):
            assert float((network(*changed) - out).abs().max()) > 1e-4
        none = torch.full((3,), network.config.labels)
        torch.testing.assert_close(network(x, s, t), network(x, s, t, none))


def test_unet_rejects_other_pictures():
    with pytest.raises(ValueError, match=r"\(2, 3, 28, 28\)"):
        UNet()(torch.zeros(2, 3, 28, 28), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="multiples of 4"):
        UNetConfig(image=(1, 30, 30))
    with pytest.raises(ValueError, match="channels"):
        UNetConfig(channels=10**9)
    with pytest.raises(ValueError, match="label given"):
        MLP()(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_and_load(tmp_path, dtype):
    network = randomised(UNet(UNetConfig(channels=8, blocks=1, multipliers=(1, 2))))
    fm = FlowMap(network, interpolant=Trigonometric())
    path = fm.save(tmp_path / "net.safetensors", dtype=dtype, notes={"accuracy": 0.5})
    back = checkpoint.load(path)
    assert (back.prediction, back.interpolant, back.call) == (fm.prediction, fm.interpolant, fm.call)
    assert back.network.config == network.config and not back.network.training
    for key, value in network.state_dict().items():
        torch.testing.assert_close(
            back.network.state_dict()[key], value.to(dtype or value.dtype).float(), rtol=0, atol=0
        )
    assert checkpoint.notes(path) == {"accuracy": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert build(describe(network)).config == network.config


def tampered(path, **changes):
    """The same tensors under another description."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["pyflowmap"])
    description.update(changes)
    save_file(tensors, path, {"pyflowmap": json.dumps(description)})


def test_damaged_and_foreign_files(tmp_path):
    path = FlowMap(MLP()).save(tmp_path / "net.safetensors")
    whole = path.read_bytes()

    def fails(words, error=ValueError):
        with pytest.raises(error, match=words) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)

    for data in (b"", b"hello", whole[:100], whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        fails("not a whole safetensors file")
    save_file({"w": torch.zeros(2)}, path)
    fails("not written by pyflowmap")
    path.write_bytes(whole)
    tampered(path, format=7)
    fails("format 7")
    path.write_bytes(whole)
    tampered(path, network={"name": "os.system", "config": {}})
    fails("'os.system' is unknown")
    tampered(path, network={"name": "MLP", "config": {"features": 2, "width": 10**12}})
    fails("width = 1000000000000")
    tampered(path, network={"name": "MLP", "config": {"colour": 1}})
    fails("unknown option 'colour'")
    tampered(path, network={"name": "MLP", "config": {"features": "2"}})
    fails("features")
    tampered(
        path, network={"name": "MLP", "config": {"features": 2, "width": 65536, "depth": 256}}
    )  # 4 TB if it were made
    fails("by its config")
    path.write_bytes(whole)
    tampered(path, prediction="eps")
    fails("prediction = 'eps'")
    path.write_bytes(whole)
    tampered(path, interpolant={"name": "Cubic", "options": {}})
    fails("Cubic")
    broken = MLP()
    torch.nn.init.constant_(broken.last.bias, float("nan"))
    FlowMap(broken).save(path)
    fails("NaN")
    path.unlink()
    fails("no file", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="neither a shipped"):
        checkpoint.load("no-such-model")


def test_a_file_is_renamed_not_overwritten(tmp_path, monkeypatch):
    path = FlowMap(MLP()).save(tmp_path / "net.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        FlowMap(MLP(MLPConfig(width=8))).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_nothing_is_half_written(tmp_path):
    path = FlowMap(MLP()).save(tmp_path / "net.safetensors")
    before = path.read_bytes()
    with pytest.raises(TypeError, match="own function"):
        FlowMap(MLP(), call=lambda n, x, s, t, c: n(x, s, t)).save(path)
    with pytest.raises(TypeError, match="not a registered network"):
        FlowMap(torch.nn.Linear(2, 2), prediction="velocity").save(path)
    with pytest.raises(TypeError):  # notes that are no JSON fail after the checks, before the rename
        FlowMap(MLP()).save(path, notes={"x": np.zeros(2)})
    with pytest.raises(ValueError, match="safetensors"):
        FlowMap(MLP()).save(tmp_path / "net.pt")
    with pytest.raises(FileNotFoundError, match="create it first"):
        FlowMap(MLP()).save(tmp_path / "missing" / "net.safetensors")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
