"""The gradient and the tangent of `combine`, written as `combine`s. Formulas: combine_operator.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflowmap.ops.combine_call import MAX_INPUTS, MAX_OUTPUTS, Call, Entry, Matrix
from pyflowmap.ops.combine_split import dispatch_wide
from pyflowmap.reference import Combined, per_row

_ONE: Entry = (1.0, None)
_ZERO: Entry = (0.0, None)


def _dense(call: Call) -> Tensor:
    """C as float64 numbers (*leading, K, T) on the operands' device."""
    lead = call.like.shape[: call.leading]

    def number(entry: Entry) -> Tensor:
        scalar, vector = entry
        factor = (
            torch.ones(lead, dtype=torch.float64, device=call.like.device)
            if vector is None
            else vector.to(torch.float64).expand(lead)
        )
        if isinstance(scalar, Tensor):
            scalar = scalar.to(call.like.device)
        return scalar * factor

    return torch.stack([torch.stack([number(e) for e in row], -1) for row in call.matrix], -2)


def _unclamped(call: Call) -> tuple[Tensor, ...]:
    """The combinations before the clamp: recomputed, not saved."""
    K = len(call.matrix)
    return dispatch_wide(call._replace(clamp=None, store=(True,) * K, dtypes=(call.accumulator,) * K)).outputs


def _inside(value: Tensor, bounds: tuple[float, float]) -> Tensor:
    return (value >= bounds[0]) & (value <= bounds[1])


def _reach(
    call: Call, grads: Combined
) -> tuple[Callable[[int, int], Entry] | None, Callable[[int, int], Entry] | None]:
    """P[k, i] and M[j, i]: how much of X_i is in L_k, and in the cotangent of X_j, by the inner products."""
    if grads.gram is None and grads.cross is None:
        return None, None
    if len(call.matrix) == 1 and grads.cross is None:  # one squared norm: no matrix to form, 2 g C_j C_i
        row, g = call.matrix[0], grads.gram[..., 0, 0]  # type: ignore[index]
        products: dict[tuple[int, ...], Tensor] = {}

        def factor(*which: Tensor | None) -> Tensor:
            found = [v for v in which if v is not None]
            key = tuple(sorted(map(id, found)))
            if key not in products:
                value = g
                for v in found:
                    value = value * v
                products[key] = value
            return products[key]

        return (
            lambda k, i: (2.0 * row[i][0], factor(row[i][1])),
            lambda j, i: (2.0 * row[j][0] * row[i][0], factor(row[j][1], row[i][1])),
        )
    C = _dense(call)
    P = torch.zeros_like(C)
    if grads.gram is not None:
        P = P + (grads.gram + grads.gram.mT).to(torch.float64) @ C
    if grads.cross is not None:
        P = P + grads.cross.to(torch.float64)
    M = C.mT @ P
    if grads.cross is not None:
        M = M + grads.cross.to(torch.float64).mT @ C
    return lambda k, i: (1.0, P[..., k, i]), lambda j, i: (1.0, M[..., j, i])


def gradients(
    call: Call,
    vectors: Sequence[Tensor],
    index: Sequence[int],  # K x T: which vector a coefficient has, -1 for none
    grads: Combined,  # cotangents, None where there is none
    need_inputs: Sequence[bool],
    need_vectors: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Cotangents of the inputs and of the per-row factors."""
    K, J, T = len(call.matrix), len(call.inputs), len(call.inputs) + (call.noise is not None)
    given = iter(grads.outputs)
    g: list[Tensor | None] = [next(given) if kept else None for kept in call.store]
    if call.clamp is not None:
        before = _unclamped(call)
        for k, bounds in enumerate(call.clamp):
            if bounds is not None and g[k] is not None:
                g[k] = torch.where(_inside(before[k], bounds), g[k], 0.0)  # type: ignore[arg-type]
    if grads.sums is not None:
        for k in range(K):
            every = per_row(grads.sums[..., k], call.like.ndim).to(call.accumulator).expand(call.like.shape)
            own = g[k]
            g[k] = every if own is None else own + every
    present = [k for k in range(K) if g[k] is not None]
    cotangents = tuple(y for y in g if y is not None)

    P, M = _reach(call, grads)
    if P is None and not present:
        return (None,) * (J + len(vectors))

    inputs: list[Tensor | None] = [None] * J
    wanted = [j for j in range(J) if need_inputs[j]]
    base = call._replace(
        inputs=(*cotangents, *(call.inputs if P is not None else ())),
        noise=call.noise if P is not None else None,
        mask=None,
        mask_matrix=None,
        clamp=None,
        gram=False,
        cross=False,
        sums=False,
    )
    if wanted:
        rows: Matrix = tuple(
            (*(call.matrix[k][j] for k in present), *(() if M is None else (M(j, i) for i in range(T)))) for j in wanted
        )
        masked = (
            None if call.mask_matrix is None else tuple(tuple(call.mask_matrix[k][j] for k in present) for j in wanted)
        )
        result = dispatch_wide(
            base._replace(
                matrix=rows,
                mask=call.mask,
                mask_matrix=masked,
                dtypes=tuple(call.inputs[j].dtype for j in wanted),
                store=(True,) * len(wanted),
            )
        )
        for j, value in zip(wanted, result.outputs, strict=True):
            inputs[j] = value

    factors: list[Tensor | None] = [None] * len(vectors)
    if any(need_vectors):
        if call.mask is not None:
            raise ValueError(
                "combine: a per-row coefficient under a mask has no gradient; detach it, or write the mask as an "
                "operand"
            )
        # L_k and all X_j in one launch; <L_k, X_j> is read off the cross Gram.
        reach = base._replace(
            inputs=(*cotangents, *call.inputs),
            noise=call.noise,
            dtypes=(call.accumulator,) * K,
            store=(False,) * K,
            cross=True,
        )
        rows = tuple(
            (
                *(_ONE if k == l else _ZERO for l in present),
                *((_ZERO if P is None else P(k, i)) for i in range(T)),
            )
            for k in range(K)
        )
        if len(reach.inputs) <= MAX_INPUTS and K <= MAX_OUTPUTS:
            cross = dispatch_wide(reach._replace(matrix=rows)).cross[..., len(present) :]  # type: ignore[index]
        else:
            left = dispatch_wide(reach._replace(matrix=rows, cross=False, store=(True,) * K)).outputs
            cross = products(left, call)
        for place, vector in enumerate(vectors):
            if not need_vectors[place]:
                continue
            total: Tensor | None = None
            for k in range(K):
                for j in range(T):
                    if index[k * T + j] == place:
                        scalar = call.matrix[k][j][0]
                        scalar = scalar.to(call.like.device) if isinstance(scalar, Tensor) else scalar
                        part = scalar * cross[..., k, j].to(torch.float64)
                        total = part if total is None else total + part
            factors[place] = None if total is None else total.to(vector.dtype)
    return (*inputs, *factors)


def products(left: Sequence[Tensor], call: Call) -> Tensor:
    """(*leading, len(left), T): inner products with every input (and the noise), at most 4 and 4 in one launch."""
    blocks = []
    inputs: list[tuple[Tensor, ...]] = [call.inputs[i : i + 4] for i in range(0, len(call.inputs), 4)]
    for first in range(0, len(left), 4):
        group = tuple(left[first : first + 4])
        row = []
        for number, right in enumerate(inputs or [()]):
            noise = call.noise if number == len(inputs or [()]) - 1 else None
            width = len(group) + len(right) + (noise is not None)
            step = call._replace(
                inputs=(*group, *right),
                noise=noise,
                mask=None,
                mask_matrix=None,
                clamp=None,
                gram=False,
                cross=True,
                sums=False,
                matrix=tuple(tuple(_ONE if i == k else _ZERO for i in range(width)) for k in range(len(group))),
                dtypes=(call.accumulator,) * len(group),
                store=(False,) * len(group),
            )
            row.append(dispatch_wide(step).cross[..., len(group) :])  # type: ignore[index]
        blocks.append(torch.cat(row, -1))
    return torch.cat(blocks, -2)


def tangent(
    call: Call, index: Sequence[int], d_inputs: Sequence[Tensor | None], d_vectors: Sequence[Tensor | None]
) -> Combined:
    """dY_k = sum_j C[k, j] dX_j + dC[k, j] X_j, and the tangents of the inner products."""
    K, J, T = len(call.matrix), len(call.inputs), len(call.inputs) + (call.noise is not None)
    if call.mask is not None and any(d is not None for d in d_vectors):
        raise ValueError(
            "combine: a per-row coefficient under a mask has no tangent; detach it, or write the mask as an operand"
        )
    moving = [j for j in range(J) if d_inputs[j] is not None]
    d_factor = lambda k, j: d_vectors[index[k * T + j]] if index[k * T + j] >= 0 else None  # noqa: E731

    def d_coefficient(k: int, j: int) -> Entry:
        factor = d_factor(k, j)
        return _ZERO if factor is None else (call.matrix[k][j][0], factor)

    shift = tuple(tuple(d_coefficient(k, j) for j in range(T)) for k in range(K))
    reduced = call.gram or call.cross or call.sums
    steady = [j for j in range(J) if reduced or any(shift[k][j] is not _ZERO for k in range(K))]
    noise = call.noise if T > J and (reduced or any(shift[k][J] is not _ZERO for k in range(K))) else None

    def row(k: int, which: Matrix | None, moved: Matrix | None) -> tuple[Entry, ...]:
        return (
            *(_ZERO if which is None else which[k][j] for j in steady),
            *(_ZERO if moved is None else moved[k][j] for j in moving),
            *(() if noise is None else (_ZERO if which is None else which[k][J],)),
        )

    moved = [d for d in d_inputs if d is not None]
    inputs = (*(call.inputs[j] for j in steady), *moved)
    velocity = tuple(row(k, shift, call.matrix) for k in range(K))
    zeros = tuple((_ZERO,) * len(call.matrix[0]) for _ in range(K))
    mask_rows = None if call.mask_matrix is None else tuple(row(k, zeros, call.mask_matrix) for k in range(K))
    linear = call._replace(
        inputs=inputs,
        matrix=velocity,
        noise=noise,
        mask_matrix=mask_rows,
        clamp=None,
        gram=False,
        cross=False,
        sums=False,
    )
    if not reduced:
        outputs = dispatch_wide(linear).outputs
        if call.clamp is not None:
            before = [y for y, kept in zip(_unclamped(call), call.store, strict=True) if kept]
            bounds = [b for b, kept in zip(call.clamp, call.store, strict=True) if kept]
            outputs = tuple(
                d if b is None else torch.where(_inside(z, b), d, 0.0)
                for d, z, b in zip(outputs, before, bounds, strict=True)
            )
        return Combined(outputs)

    value = tuple(row(k, call.matrix, None) for k in range(K))
    if 2 * K <= MAX_OUTPUTS and len(inputs) <= MAX_INPUTS:
        both = dispatch_wide(
            linear._replace(
                matrix=(*value, *velocity),
                dtypes=call.dtypes * 2,
                store=(False,) * K + call.store,
                gram=call.gram,
                cross=call.cross,
                sums=call.sums,
            )
        )
        outputs, gram, cross, sums = both
    else:
        every = dispatch_wide(
            linear._replace(matrix=(*value, *velocity), store=(True,) * (2 * K), dtypes=(call.accumulator,) * (2 * K))
        ).outputs
        outputs = tuple(d.to(t) for d, t, kept in zip(every[K:], call.dtypes, call.store, strict=True) if kept)
        gram = products(every, call._replace(inputs=every, noise=None)) if call.gram else None
        cross = products(every, linear) if call.cross else None
        sums = torch.cat([_sums(every[i : i + 8], call) for i in range(0, 2 * K, 8)], -1) if call.sums else None
    d_gram = None if gram is None else gram[..., :K, K:] + gram[..., K:, :K]
    d_cross = None
    if cross is not None:
        d_cross = torch.stack(
            [
                cross[..., K:, steady.index(j) if j < J else len(inputs)]
                + (cross[..., :K, len(steady) + moving.index(j)] if j in moving else 0.0)
                for j in range(T)
            ],
            -1,
        )
    return Combined(outputs, d_gram, d_cross, None if sums is None else sums[..., K:])


def _sums(values: Sequence[Tensor], call: Call) -> Tensor:
    K = len(values)
    step = call._replace(
        inputs=tuple(values),
        matrix=tuple(tuple(_ONE if i == k else _ZERO for i in range(K)) for k in range(K)),
        noise=None,
        mask=None,
        mask_matrix=None,
        clamp=None,
        gram=False,
        cross=False,
        sums=True,
        dtypes=(call.accumulator,) * K,
        store=(False,) * K,
    )
    return dispatch_wide(step).sums  # type: ignore[return-value]
