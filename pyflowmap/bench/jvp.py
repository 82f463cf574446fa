"""What a Jacobian-vector product costs over a plain forward: 2.0 is the limit where matrix products are all."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyflowmap as pfm

from .case import Case, Contestant, Target, case
from .peers import compiled
from .plain import plain

BATCH, TOKENS, WIDTH, HEADS = 4, 256, 384, 6


def _block() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A DiT block whose gates are open, its inputs (x, e), and their tangents."""
    block = pfm.nn.DiTBlock(WIDTH, HEADS, 4)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    shapes = (BATCH, TOKENS, WIDTH), (BATCH, WIDTH)
    return block, tuple(torch.randn(shape) for shape in (*shapes, *shapes))


def _forward(run, slower: float) -> Contestant:
    return Contestant("forward alone", run, Target(slower=slower), role="limit", note="2.0 forwards are the limit")


@case("jvp", "jvp_dit_block", "JVP of a DiT block, eager, no grad")
def jvp_dit_block() -> Case:
    block, (x, e, dx, de) = _block()
    function = lambda x, e: block(x, e, None, None)  # noqa: E731
    twin = plain(block)
    in_torch = lambda x, e: twin(x, e, None, None)  # noqa: E731

    @torch.no_grad()
    def ours():
        return pfm.jvp(function, (x, e), (dx, de))

    @torch.no_grad()
    def unmodified():
        return pfm.jvp(in_torch, (x, e), (dx, de))

    @torch.no_grad()
    def forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(in_torch, (x, e), (dx, de))

    @torch.no_grad()
    def plain_forward():
        in_torch(x, e)

    @torch.no_grad()
    def forward():
        function(x, e)

    return Case(
        [
            Contestant("pfm.jvp", ours),
            _forward(forward, 2.3),
            Contestant("pfm.jvp of the block in plain torch", unmodified),
            Contestant("torch.func.jvp of the block in plain torch", forward_mode, note="math attention, the only one"),
            Contestant("forward of the block in plain torch", plain_forward, role="limit"),
        ],
        {"x": x.shape, "e": e.shape},
        tolerance=1e-4,
        note=f"{HEADS} heads, MLP ratio 4, qk-norm; tangents in x and in the embedding of the times.",
    )


@case("jvp", "jvp_dit_block_compiled", "JVP of a DiT block, torch.compile, no grad")
def jvp_dit_block_compiled() -> Case:
    block, (x, e, dx, de) = _block()
    function = lambda x, e: block(x, e, None, None)  # noqa: E731

    forward = []

    def with_compiler(compile):
        plain, dual = compile(function), compile(lambda x, e, dx, de: pfm.jvp(function, (x, e), (dx, de)))
        forward.append(torch.no_grad()(lambda: (plain(x, e), None)[1]))
        forward[0]()
        return torch.no_grad()(lambda: dual(x, e, dx, de))

    @torch.no_grad()
    def eager():
        return pfm.jvp(function, (x, e), (dx, de))

    made, skipped = compiled("pfm.jvp, compiled", with_compiler)
    limit = [_forward(forward[0], 2.2)] if made else []
    return Case(
        [*made, *limit, Contestant("pfm.jvp, eager", eager)],
        {"x": x.shape, "e": e.shape},
        skipped=skipped,
        tolerance=1e-4,
        note="The forward beside it is compiled, too.",
    )


def _mlp(grad: bool, slower: float) -> Case:
    network = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.SiLU())), nn.Linear(256, 256)
    )
    x, dx = torch.randn(1, 256), torch.randn(1, 256)

    @torch.set_grad_enabled(grad)
    def ours():
        y, dy = pfm.jvp(network, (x,), (dx,))
        return y.detach(), dy.detach()

    @torch.set_grad_enabled(grad)
    def forward_mode():
        y, dy = torch.func.jvp(network, (x,), (dx,))  # type: ignore[misc]
        return y.detach(), dy.detach()

    @torch.set_grad_enabled(grad)
    def forward():
        network(x)

    return Case(
        [Contestant("pfm.jvp", ours), _forward(forward, slower), Contestant("torch.func.jvp", forward_mode)],
        {"x": x.shape},
        threads=1,
        note="Four linear layers of width 256, SiLU between: what the calls cost.",
    )


@case("jvp", "jvp_mlp", "JVP of a small MLP, batch 1, no grad")
def jvp_mlp() -> Case:
    return _mlp(False, 2.3)


@case("jvp", "jvp_mlp_grad", "JVP of a small MLP, batch 1, value recorded for backward")
def jvp_mlp_grad() -> Case:
    return _mlp(True, 3.3)


@case("jvp", "mean_flow_step", "MeanFlow training step of a DiT, two blocks of width 384")
def mean_flow_step() -> Case:
    config = pfm.nn.DiTConfig(image=(4, 32, 32), patch=2, depth=2, width=WIDTH, heads=HEADS, labels=10)
    network = pfm.nn.DiT(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    parameters = [p for p in network.parameters() if p.requires_grad]
    x1, label = torch.randn(BATCH, *config.image), torch.arange(BATCH)
    s, t = pfm.times.uniform_pair(x1, seed=0)
    x, v = pfm.interpolants.Linear().draw(x1, s, seed=1)
    span = (t - s).reshape(-1, 1, 1, 1)
    ones, zeros = torch.ones_like(s), torch.zeros_like(t)

    def step(function, jvp, tangents):
        u, du = jvp(lambda x, s, t: function(x, s, t, label), (x, s, t), tangents)
        r = u - (v + span * du).detach()
        loss = r.square().mean()
        return (loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)[-4:])

    def ours():
        return step(network, pfm.jvp, (v, 1.0, None))

    in_torch = plain(network)

    def forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return step(in_torch, torch.func.jvp, (v, ones, zeros))

    def matching():
        r = in_torch(x, s, t, label) - v
        torch.autograd.grad(r.square().mean(), parameters, allow_unused=True)

    return Case(
        [
            Contestant("pfm.jvp", ours),
            Contestant("torch.func.jvp, math attention", forward_mode, Target(faster=1.6)),
            Contestant("a flow-matching step (no JVP) of the network in plain torch", matching, role="limit"),
        ],
        {"x": x.shape},
        tolerance=1e-3,
        note="Value, tangent, loss, gradients of all parameters; no optimiser.",
    )
