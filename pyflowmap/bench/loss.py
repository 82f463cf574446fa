"""A MeanFlow-style loss with its gradient: the residual's squared norm per sample, an adaptive weight, backward.

r = u - sg(v + h du),   loss = mean_b e_b / sg(e_b + c),   e_b = <r_b, r_b>
"""

from __future__ import annotations

import torch

import pyflowmap as pfm

from .case import Case, Contestant, Target, case
from .peers import bytes_of, compiled

C = 0.01


def _case(batch: int, size: int, target: Target | None) -> Case:
    from pyflowmap.weights import adaptive

    u, v, du = (torch.randn(batch, size) for _ in range(3))
    h = torch.rand(batch)
    u.requires_grad_()
    weight = adaptive(p=1.0, c=C, norm="sum")

    def ours():
        u.grad = None
        r = pfm.lazy(u) - (pfm.lazy(v) + h * pfm.lazy(du)).detach()
        loss = weight(pfm.inner(r)).mean()
        loss.backward()
        return loss.detach(), u.grad

    def weighted(e):
        return (e / (e.detach() + C)).mean()

    def eager():
        u.grad = None
        r = u - torch.addcmul(v, h[:, None], du)
        loss = weighted(torch.einsum("bi,bi->b", r, r))
        loss.backward()
        return loss.detach(), u.grad

    def eager_square():
        u.grad = None
        r = u - torch.addcmul(v, h[:, None], du)
        loss = weighted(r.square().sum(1))
        loss.backward()
        return loss.detach(), u.grad

    def eager_norm():
        u.grad = None
        r = u - torch.addcmul(v, h[:, None], du)
        loss = weighted(torch.linalg.vector_norm(r, dim=1) ** 2)
        loss.backward()
        return loss.detach(), u.grad

    def with_compiler(compile):
        def plain(u, v, du, h):
            r = u - (v + h[:, None] * du)
            return weighted(r.square().sum(1))

        function = compile(plain)

        def run():
            u.grad = None
            loss = function(u, v, du, h)
            loss.backward()
            return loss.detach(), u.grad

        return run

    made, skipped = compiled("torch.compile, then backward", with_compiler)
    return Case(
        [
            Contestant("inner(lazy)", ours),
            Contestant("eager, r.square().sum", eager_square, target),
            Contestant("eager, einsum", eager, target),
            Contestant("eager, vector_norm ** 2", eager_norm, target),
            *made,
        ],
        {"u, v, du": u.shape, "h": h.shape},
        2 * bytes_of(u, v, du) + bytes_of(u),
        skipped=skipped,
        tolerance=1e-4,
        note="u.grad is set to None before each run, so every side allocates its gradient. The eager sides form "
        "v + h du with addcmul, outside the graph.",
    )


@case("loss", "loss_256x3072", "inner-product loss with gradient, 256 x 3072")
def loss_256x3072() -> Case:
    return _case(256, 3072, Target(faster=2.0))


@case("loss", "loss_32x2", "inner-product loss with gradient, 32 x 2: what the calls cost")
def loss_32x2() -> Case:
    return _case(32, 2, None)


@case("loss", "loss_256x65536", "inner-product loss with gradient, 256 x 65 536, beyond the cache")
def loss_256x65536() -> Case:
    return _case(256, 65536, None)
