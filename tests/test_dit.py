"""The diffusion transformer: counts by hand, symmetries of its positions, derivatives against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyflowmap as pfm
from pyflowmap.nn import DiT, DiTConfig, build, describe, rope_2d, sincos_2d

CONFIG = DiTConfig(image=(3, 8, 12), patch=2, depth=2, width=32, heads=2, labels=10)
KINDS = pytest.mark.parametrize("positions", ["rope", "learned", "sincos"])


def trained(config=CONFIG, dtype=torch.float64, seed=0):
    """Every parameter away from its start, where most of the network is multiplied by zero."""
    torch.manual_seed(seed)
    network = DiT(config).to(dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.25)
    return network


def arguments(rows=3, config=CONFIG, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x, dx = torch.randn(2, rows, *config.image, generator=rng, dtype=torch.float64).to(dtype)
    s, t = torch.rand(2, rows, generator=rng, dtype=torch.float64).sort(0).values.to(dtype)
    return (x, s, t), dx, torch.arange(rows) * 5 % (config.labels + 1)


@pytest.mark.parametrize("name, millions, literature", [("S", 33, 12), ("B", 130, 12), ("L", 458, 24), ("XL", 675, 28)])
def test_parameters_by_hand(name, millions, literature):
    with torch.device("meta"):
        network = DiT(DiTConfig.size(name, patch=2, image=(4, 32, 32)))
    depth, D = network.config.depth, network.config.width
    assert depth == literature
    E = D // network.config.heads
    attention = (3 * D * D + 3 * D) + (D * D + D) + 2 * E  # q, k, v; out; the two head norms
    mlp = (4 * D * D + 4 * D) + (4 * D * D + D)
    modulation = 6 * D * D + 6 * D
    times = 2 * 64 * D + D  # start with a bias, span without
    embedding = times + 1001 * D + (D * D + D)  # 1000 labels and none; mix
    ends = (16 * D + D) + (D * 16 + 16) + (2 * D * D + 2 * D)  # patches in, patches out, last modulation
    count = sum(p.numel() for p in network.parameters())
    assert count == depth * (attention + mlp + modulation) + embedding + ends
    # One time of 256 channels, no head norms, 2 x 4 channels out: the model of the literature.
    theirs = count - depth * 2 * E - times + (256 * D + D) + (D * 16 + 16)
    assert round(theirs / 1e6) == millions


def test_sizes_are_those_of_the_table():
    heads = {name: DiTConfig.size(name).heads for name in ("S", "B", "L", "XL")}
    assert heads == {"S": 6, "B": 12, "L": 16, "XL": 16}
    assert DiTConfig.size("B", patch=4, labels=0).patch == 4


@KINDS
def test_an_untrained_map_is_the_identity(positions):
    network = DiT(DiTConfig(image=(3, 8, 8), depth=1, width=32, heads=2, positions=positions))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pfm.FlowMap(network).jump(x, 0.0, 1.0), x)


def test_an_untrained_block_is_the_identity_and_every_parameter_learns():
    torch.manual_seed(0)
    network = DiT(CONFIG)
    h, e = torch.randn(2, 24, 32), torch.randn(2, 32)
    assert torch.equal(network.blocks[0](h, e, None, None), h)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    (x, s, t), dx, label = arguments(dtype=torch.float32)
    for _ in range(3):  # zeros open one after the other: the last layer, its modulation, the gates
        optimiser.zero_grad()
        (network(x, s, t, label) - dx).square().mean().backward()
        optimiser.step()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_patches():
    """Token k holds patch (k // columns, k % columns), and the picture comes back."""
    network = DiT(CONFIG)
    x = torch.arange(3 * 8 * 12.0).reshape(1, 3, 8, 12)
    tokens = network._tokens(x)
    assert torch.equal(tokens[0, 7], x[0, :, 2:4, 2:4].reshape(-1))  # 6 columns: 7 is row 1, column 1
    assert torch.equal(network._picture(tokens), x)


def test_samples_do_not_mix_and_labels_count():
    network, ((x, s, t), _, label) = trained(), arguments()
    y = network(x, s, t, label)
    torch.testing.assert_close(network(x[1:2], s[1:2], t[1:2], label[1:2]), y[1:2], rtol=1e-12, atol=1e-12)
    none = torch.full((3,), 10)
    assert torch.equal(network(x, s, t), network(x, s, t, none)) and not torch.allclose(y[0], network(x, s, t, none)[0])
    assert not torch.allclose(network(x, s, s, label), y) and not torch.allclose(network(x, t, t, label), y)


def test_without_positions_tokens_are_a_set():
    network, ((x, s, t), _, label) = trained(DiTConfig(**{**CONFIG.__dict__, "positions": "learned"})), arguments()
    turn = lambda x: x.reshape(-1, 3, 4, 2, 12).roll(1, 2).reshape(-1, 3, 8, 12)  # rolls rows of patches  # noqa: E731
    assert not torch.allclose(network(turn(x), s, t, label), turn(network(x, s, t, label)))
    nn.init.zeros_(network.position)
    torch.testing.assert_close(network(turn(x), s, t, label), turn(network(x, s, t, label)), rtol=1e-9, atol=1e-9)


def test_rope_sees_differences_of_positions():
    """q . k after rotation depends on the difference of rows and of columns alone, and on both."""
    cos, sin = (each.double() for each in rope_2d(4, 6, 16))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(16, dtype=torch.float64)
    q, k = (pfm.ops.norm_rope(z.expand(1, 1, 24, 16), ones, cos, sin)[0, 0] for z in (q, k))
    logits = (q @ k.T).reshape(4, 6, 4, 6)
    torch.testing.assert_close(logits[0, 0, 2, 3], logits[1, 2, 3, 5], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[2, 5, 0, 1], logits[3, 4, 1, 0], rtol=0, atol=1e-5)
    assert abs(float(logits[0, 0, 2, 3] - logits[0, 0, 3, 2])) > 1e-3
    assert abs(float(logits[0, 0, 0, 1] - logits[0, 0, 1, 0])) > 1e-3
    assert abs(float(logits[0, 0, 0, 1] - logits[0, 0, 0, 2])) > 1e-3  # columns alone, and rows alone
    assert abs(float(logits[0, 0, 1, 0] - logits[0, 0, 2, 0])) > 1e-3
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(24), rtol=1e-6, atol=0)


def test_sincos_by_hand():
    """Row 1, column 2 of a grid, 8 channels: frequencies 1 and 1/100 of each axis."""
    angle = torch.tensor([1.0, 0.01])
    want = torch.cat([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()])
    torch.testing.assert_close(sincos_2d(2, 3, 8)[5], want)


# ---- derivatives --------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("moves", ["x, s", "t"])
def test_derivatives(positions, moves):
    """MeanFlow's and LSD's directions against torch.func.jvp, which forms attention from its matrices."""
    network = trained(DiTConfig(**{**CONFIG.__dict__, "positions": positions}))
    (x, s, t), dx, label = arguments()
    tangents = (dx, 1.0, None) if moves == "x, s" else (None, None, 1.0)
    y, dy = pfm.jvp(network, (x, s, t), tangents, kwargs={"label": label})
    full = [
        torch.zeros_like(p) if d is None else d if isinstance(d, torch.Tensor) else torch.full_like(p, d)
        for p, d in zip((x, s, t), tangents, strict=True)
    ]
    want, d_want = torch.func.jvp(lambda x, s, t: network(x, s, t, label), (x, s, t), tuple(full))
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dy, d_want, rtol=1e-9, atol=1e-9)
    assert bool((dy != 0).all())


@pytest.mark.parametrize("through", ["value", "derivative"])
def test_gradients_through_value_and_derivative(through):
    """Against autograd of a central difference, and of torch.func.jvp."""
    network, ((x, s, t), dx, label) = trained(), arguments()
    f = lambda x, s: network(x, s, t, label)  # noqa: E731
    tracked, which, h = through == "derivative", through == "derivative", 2e-6
    ours = pfm.jvp(network, (x, s, t), (dx, 1.0, None), kwargs={"label": label}, track_tangent=tracked)[which]
    theirs = torch.func.jvp(f, (x, s), (dx, torch.ones_like(s)))[which]
    difference = (f(x + h * dx, s + h) - f(x - h * dx, s - h)) / (2 * h) if tracked else f(x, s)
    parameters = list(network.parameters())
    grads = [
        torch.autograd.grad(y.square().mean(), parameters, materialize_grads=True) for y in (ours, theirs, difference)
    ]
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert float((a - c).norm()) <= 1e-6 * float(c.norm())


@pytest.mark.parametrize("what", ["whole", pytest.param("by block", marks=pytest.mark.slow)])
def test_compiled(what):
    config = DiTConfig(**{**CONFIG.__dict__, "depth": 1})
    network, ((x, s, t), dx, label) = trained(config, torch.float32), arguments(dtype=torch.float32)
    run = lambda x, s, t, dx: pfm.jvp(network, (x, s, t), (dx, 1.0, None), kwargs={"label": label})  # noqa: E731
    want = run(x, s, t, dx)
    torch._dynamo.reset()
    if what == "whole":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    else:
        network.blocks[0].compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(run(x, s, t, dx), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", ["bfloat16", "autocast"])
def test_low_precision(cast):
    """Near the float64 network; bfloat16 has 8 bits, and the angles of times and positions keep their 24."""
    (x, s, t), dx, label = arguments()
    network = trained()
    y, dy = pfm.jvp(network, (x, s, t), (dx, 1.0, None), kwargs={"label": label})
    network = network.to(torch.bfloat16 if cast == "bfloat16" else torch.float32)
    dtype = next(network.parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        low, d_low = pfm.jvp(
            network, (x.to(dtype), s.float(), t.float()), (dx.to(dtype), 1.0, None), kwargs={"label": label}
        )
    assert low.dtype == d_low.dtype == torch.bfloat16
    for a, b in ((low.detach(), y.detach()), (d_low.detach(), dy.detach())):
        assert float((a - b).norm() / b.norm()) < 0.06


def test_a_flow_map_learns_with_it():
    torch.manual_seed(0)
    x1, label = torch.randn(4, 3, 8, 12), torch.tensor([1, 2, 3, 10])
    for objective in (pfm.objectives.lagrangian, pfm.objectives.mean_flow):
        step = pfm.training.Step(trained(dtype=torch.float32), objective)
        loss, _ = step(x1, label=label)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in step.parameters())


# ---- files and bad input ------------------------------------------------------------------------------------------


@KINDS
def test_a_file_can_rebuild_it(tmp_path, positions):
    network = trained(DiTConfig(**{**CONFIG.__dict__, "positions": positions}), dtype=torch.float32)
    (x, s, t), _, label = arguments(dtype=torch.float32)
    assert build(describe(network)).config == network.config
    path = pfm.FlowMap(network).save(tmp_path / "dit.safetensors")
    assert torch.equal(pfm.load(path).mean_velocity(x, s, t, label=label), network(x, s, t, label))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": (4, 30, 32), "patch": 4}, "multiples of the patch"),
        ({"width": 30}, "multiple of 4"),
        ({"width": 36, "heads": 6}, "multiple of 4"),
        ({"positions": "none"}, "'none'"),
        ({"depth": 1000}, "from 1 to 256"),
        ({"width": 10**9}, "width = 1000000000"),
        ({"labels": -1}, "labels = -1"),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ValueError, match=words):
        DiTConfig(**options)


def test_bad_input():
    network, ((x, s, t), _, label) = trained(), arguments()
    with pytest.raises(ValueError, match=r"x has shape \(3, 3, 12, 8\).*\(B, 3, 8, 12\)"):
        network(x.transpose(2, 3), s, t, label)
    with pytest.raises(ValueError, match="name = 'M'"):
        DiTConfig.size("M")
    with pytest.raises(ValueError, match="without labels"):
        DiT(DiTConfig(image=(3, 8, 12), depth=1, width=32, heads=2, labels=0))(x.float(), s.float(), t.float(), label)
    for time, words in ((0.5, "s is 0.5"), (s[0], r"s has shape \(\)"), (s[:, None], r"s has shape \(3, 1\)")):
        with pytest.raises(ValueError, match=words):
            network(x, time, t, label)
    for make in (rope_2d, sincos_2d):
        with pytest.raises(ValueError, match="channels = 6"):
            make(2, 2, 6)


# ---- the functions that it calls ----------------------------------------------------------------------------------

X, V = torch.zeros(2, 5, 8), torch.zeros(2, 8)
Q = torch.randn(2, 4, 5, 8)


def test_heads_may_share_keys_and_values():
    k, v = Q[:, :2] * 0.5, Q[:, 2:]
    want = pfm.ops.attention(Q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True)
    torch.testing.assert_close(pfm.ops.attention(Q, k, v, causal=True), want)
    _, d_shared = torch.func.jvp(lambda k: pfm.ops.attention(Q, k, v), (k,), (v,))
    torch.testing.assert_close(pfm.jvp(lambda k: pfm.ops.attention(Q, k, v), (k,), (v,))[1], d_shared)


def test_angles_do_not_widen_half_precision():
    cos, sin = rope_2d(1, 5, 8)
    q = Q.bfloat16()
    assert pfm.ops.norm_rope(q, torch.ones(8), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda ops: ops.norm_modulate(X, V[:, :4], V),
            ValueError,
            r"scale has shape \(2, 4\).*x has shape \(2, 5, 8\)",
        ),
        (lambda ops: ops.norm_modulate(X, V, torch.zeros(5, 8)), ValueError, r"shift has shape \(5, 8\).*\(2, 8\)"),
        (lambda ops: ops.norm_modulate(X, V, V, kind="batch"), ValueError, "'batch'"),
        (lambda ops: ops.norm_modulate(V[0], V[0], V[0]), ValueError, r"\(B, ..., D\)"),
        (lambda ops: ops.norm_modulate(X.long(), V, V), TypeError, "x is torch.int64"),
        (lambda ops: ops.gated_residual(X, V, X[:, :1]), ValueError, r"h has shape \(2, 1, 8\)"),
        (lambda ops: ops.gated_residual(X, X[:1, :3], X), ValueError, "gate has shape"),
        (lambda ops: ops.gated_residual(X, 1.0, X), TypeError, "gate is a float"),
        (lambda ops: ops.attention(Q, Q[:, :3], Q[:, :3]), ValueError, r"\(2, 3, 5, 8\).*multiple"),
        (lambda ops: ops.attention(Q[0], Q[0], Q[0]), ValueError, "heads, tokens, channels"),
        (lambda ops: ops.attention(Q[:, :, :3], Q, Q, causal=True), ValueError, "3 queries and 5 keys"),
        (lambda ops: ops.norm_rope(Q, torch.ones(4), None, None), ValueError, r"weight has shape \(4,\)"),
        (lambda ops: ops.norm_rope(Q, torch.ones(8), *rope_2d(1, 5, 4)), ValueError, r"\(5, 2\) and \(5, 2\)"),
        (lambda ops: ops.norm_rope(Q, torch.ones(8), torch.ones(5, 4), None), ValueError, "None"),
    ],
)
def test_bad_operands(call, error, words):
    with pytest.raises(error, match=words):
        call(pfm.ops)
