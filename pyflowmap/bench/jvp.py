"""What a Jacobian-vector product costs over a plain forward: 2.0 is the limit where matrix products are all."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyflowmap as pfm

from .case import Case, Contestant, Target, case
from .peers import compiled

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

    @torch.no_grad()
    def ours():
        return pfm.jvp(function, (x, e), (dx, de))

    @torch.no_grad()
    def forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(function, (x, e), (dx, de))

    @torch.no_grad()
    def forward():
        function(x, e)

    return Case(
        [
            Contestant("pfm.jvp", ours),
            _forward(forward, 2.9),
            Contestant("torch.func.jvp", forward_mode, note="attention by the math back end, which alone has it"),
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


def _mlp(grad: bool) -> Case:
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
        [Contestant("pfm.jvp", ours), _forward(forward, 3.3), Contestant("torch.func.jvp", forward_mode)],
        {"x": x.shape},
        threads=1,
        note="Four linear layers of width 256, SiLU between: what the calls cost.",
    )


@case("jvp", "jvp_mlp", "JVP of a small MLP, batch 1, no grad")
def jvp_mlp() -> Case:
    return _mlp(False)


@case("jvp", "jvp_mlp_grad", "JVP of a small MLP, batch 1, value recorded for backward")
def jvp_mlp_grad() -> Case:
    return _mlp(True)
