"""Other storage and other outputs of the same kernel, beside a copy of the same bytes: bfloat16 inputs, the chunks of a
network's output, a Gram matrix, an editing mask."""

from __future__ import annotations

import torch

import pyflowmap as pfm

from .case import Case, Contestant, case
from .peers import bytes_of, copy_of

SHAPE = (8, 16, 256, 256)  # 32 MB in float32
GUIDANCE, STEP = 3.0, 0.05


@case("storage", "bf16_inputs", "guided update, bfloat16 network outputs, float32 state")
def bf16_inputs() -> Case:
    x, o = torch.randn(SHAPE), torch.empty(SHAPE)
    c, u = (torch.randn(SHAPE).bfloat16() for _ in range(2))
    wide = torch.empty(SHAPE)

    def ours():
        lx, lc, lu = pfm.lazy(x), pfm.lazy(c), pfm.lazy(u)
        return pfm.evaluate(lx + STEP * (lu + GUIDANCE * (lc - lu)), out=o)

    def eager():
        torch.add(x, u, alpha=STEP * (1.0 - GUIDANCE), out=wide)
        return torch.add(wide, c, alpha=STEP * GUIDANCE, out=o)

    traffic = bytes_of(x, c, u, o)
    return Case(
        [Contestant("evaluate(out=)", ours), copy_of(traffic, (x, c, o, wide)), Contestant("eager out=, 2 ops", eager)],
        {"x, o (float32); c, u (bfloat16)": SHAPE},
        traffic,
    )


@case("storage", "chunks", "guided update, c and u are chunk(2, 1) of the network's output")
def chunks() -> Case:
    x, o = torch.randn(SHAPE), torch.empty(SHAPE)
    both = torch.randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])
    c, u = both.chunk(2, 1)

    def ours():
        lx, lc, lu = pfm.lazy(x), pfm.lazy(c), pfm.lazy(u)
        return pfm.evaluate(lx + STEP * (lu + GUIDANCE * (lc - lu)), out=o)

    def eager():
        torch.add(x, u, alpha=STEP * (1.0 - GUIDANCE), out=o)
        return torch.add(o, c, alpha=STEP * GUIDANCE, out=o)

    traffic = bytes_of(x, c, u, o)
    return Case(
        [Contestant("evaluate(out=)", ours), copy_of(traffic, (both, x, o)), Contestant("eager out=, 2 ops", eager)],
        {"x, o": SHAPE, "network output": both.shape},
        traffic,
        note="Each operand has its own stride between samples: nothing is copied.",
    )


@case("storage", "gram_of_4", "Gram matrix of four tensors, nothing stored")
def gram_of_4() -> Case:
    tensors = tuple(torch.randn(SHAPE) for _ in range(4))
    identity = tuple(tuple(1.0 if i == j else 0.0 for j in range(4)) for i in range(4))
    flat = [x.view(SHAPE[0], -1) for x in tensors]

    def ours():
        return pfm.ops.combine(tensors, identity, store=(False,) * 4, gram=True).gram

    def eager():
        products = [[None] * 4 for _ in range(4)]
        for i in range(4):
            for j in range(i, 4):
                products[i][j] = products[j][i] = torch.linalg.vecdot(flat[i], flat[j])
        return torch.stack([torch.stack(row, 1) for row in products], 1)  # type: ignore[arg-type]

    def read():
        for x in tensors:
            x.sum()

    traffic = bytes_of(*tensors)
    return Case(
        [
            Contestant("ops.combine(gram=True)", ours),
            copy_of(traffic, tensors),
            Contestant("torch.sum of the same bytes", read, role="limit", note="reads only, as ours does"),
            Contestant("eager, 10 vecdot", eager, note="20 passes against 4"),
        ],
        {"x (4 of them)": SHAPE},
        traffic,
        tolerance=1e-4,
    )


@case("storage", "mask", "editing: keep what the mask covers, update the rest")
def mask() -> Case:
    x, v, known, o = (torch.randn(SHAPE) for _ in range(4))
    m = (torch.rand(SHAPE[0], 1, *SHAPE[2:]) > 0.5).float()
    work = torch.empty(SHAPE)

    def ours():
        # x + STEP v where m = 0, known where m = 1
        return pfm.ops.combine((x, v, known), ((1.0, STEP, 0.0),), out=(o,), mask=(m, ((-1.0, -STEP, 1.0),)))

    def eager():
        torch.add(x, v, alpha=STEP, out=work)
        return torch.lerp(work, known, m, out=o)

    traffic = bytes_of(x, v, known, m, o)
    return Case(
        [
            Contestant("ops.combine(mask=)", ours),
            copy_of(traffic, (x, v, known, o)),
            Contestant("eager out=, add and lerp", eager),
        ],
        {"x, v, known, o": SHAPE, "mask": m.shape},
        traffic,
    )
