"""Calls wider than the kernel, by a fixed rule: a kernel reads at most 8 tensors and writes at most 8.

1. Outputs are taken 8 at a time.
2. With more than 8 inputs, outputs are taken 4 at a time; inputs that all of them multiply by a plain 0 are dropped.
3. The first launch reads the first 8 inputs and stores the partial sums; each further launch reads the partial sums and
   as many new inputs as fit beside them. Noise is drawn, results are clamped and reduced in the last launch.
"""

from __future__ import annotations

from pyflowmap.ops.combine_call import MAX_INPUTS, MAX_OUTPUTS, Call, Entry, Matrix
from pyflowmap.ops.combine_roads import dispatch, needs_operator
from pyflowmap.reference import Combined

_GROUP = 4
_ONE: Entry = (1.0, None)
_ZERO: Entry = (0.0, None)


def dispatch_wide(call: Call) -> Combined:
    """`dispatch` for any number of inputs and outputs."""
    K, J = len(call.matrix), len(call.inputs)
    if J <= MAX_INPUTS and K <= MAX_OUTPUTS:
        return _dispatch_decomposed(call)
    group = MAX_OUTPUTS if J <= MAX_INPUTS else _GROUP
    if call.cross or (group < K and (call.gram or call.sums)):
        raise ValueError(
            f"combine: inner products of {K} combinations of {J} tensors need more than one launch (the limit is "
            f"{MAX_INPUTS} inputs and "
            f"{MAX_OUTPUTS} outputs, or {_GROUP} outputs of any number of inputs without cross); store the "
            "combinations and reduce them in a second call"
        )
    parts = [_narrow(_outputs(call, range(first, min(first + group, K)))) for first in range(0, K, group)]
    if len(parts) == 1:
        return parts[0]
    return Combined(tuple(y for part in parts for y in part.outputs))


def _outputs(call: Call, wanted: range) -> Call:
    pick = lambda sequence: tuple(sequence[k] for k in wanted)  # noqa: E731
    return call._replace(
        matrix=pick(call.matrix),
        dtypes=pick(call.dtypes),
        store=pick(call.store),
        clamp=None if call.clamp is None else pick(call.clamp),
        mask_matrix=None if call.mask_matrix is None else pick(call.mask_matrix),
    )


def _is_zero(entry: Entry) -> bool:
    return isinstance(entry[0], float) and entry[0] == 0.0


def _columns(matrix: Matrix, columns: list[int], before: Matrix | None = None) -> Matrix:
    picked = tuple(tuple(row[j] for j in columns) for row in matrix)
    return picked if before is None else tuple((*a, *b) for a, b in zip(before, picked, strict=True))


def _narrow(call: Call) -> Combined:
    K, J = len(call.matrix), len(call.inputs)
    if J <= MAX_INPUTS:
        return _dispatch_decomposed(call)
    both = [m for m in (call.matrix, call.mask_matrix) if m is not None]
    left = [j for j in range(J) if not all(_is_zero(row[j]) for m in both for row in m)] or [0]
    noise = [J] if call.noise is not None else []
    identity = tuple(tuple(_ONE if i == k else _ZERO for i in range(K)) for k in range(K))
    nothing = tuple((_ZERO,) * K for _ in range(K))
    partial: tuple = ()
    while True:
        take, left = left[: MAX_INPUTS - len(partial)], left[MAX_INPUTS - len(partial) :]
        columns = take if left else take + noise
        step = call._replace(
            inputs=(*partial, *(call.inputs[j] for j in take)),
            matrix=_columns(call.matrix, columns, identity if partial else None),
            mask_matrix=None
            if call.mask_matrix is None
            else _columns(call.mask_matrix, columns, nothing if partial else None),
        )
        if not left:
            return _dispatch_decomposed(step)
        step = step._replace(
            noise=None, clamp=None, gram=False, sums=False, dtypes=(call.accumulator,) * K, store=(True,) * K
        )
        partial = _dispatch_decomposed(step).outputs


def _dispatch_decomposed(call: Call) -> Combined:
    """Inner products of masked or clamped combinations are differentiated in two steps; without gradients one
    launch does both."""
    reduced = call.gram or call.cross or call.sums
    if not (reduced and (call.mask is not None or call.clamp is not None) and needs_operator(call)):
        return dispatch(call)
    if call.cross:
        raise ValueError(
            "combine: the cross Gram of masked or clamped combinations has no gradient; store them and call "
            "combine again"
        )
    K = len(call.matrix)
    full = dispatch(call._replace(gram=False, sums=False, store=(True,) * K, dtypes=(call.accumulator,) * K))
    identity = tuple(tuple(_ONE if i == k else _ZERO for i in range(K)) for k in range(K))
    return dispatch(
        call._replace(
            inputs=full.outputs,
            matrix=identity,
            noise=None,
            mask=None,
            mask_matrix=None,
            clamp=None,
            like=full.outputs[0],
        )
    )
