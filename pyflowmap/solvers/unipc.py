"""UniPC: a predictor, and a corrector that costs no evaluation (Zhao et al. 2023, arXiv 2302.04867), in the data
prediction D = x + (1-s) b.

From s, with D_i = D(s_i) of the past (s_1 last), h = lambda_t - lambda_s, hh = -h, r_i = (lambda_{s_i} - lambda_s)/h,
r_p = 1 and B = hh ("bh1") or expm1(hh) ("bh2"):

    predicted = (1-t)/(1-s) x + (t-s)/(1-s) D - t B sum_{i<p} rho^p_i (D_i - D)/r_i
    corrected = the same with rho^c_i, and - t B rho^c_p (D(predicted, t) - D)

so corrected - predicted is a combination of data predictions alone: the state before the step need not be kept. The
driver's state is the predicted one; a step corrects it on its way to the next prediction, all in one launch.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain

from ..algebra import weighted
from .exponential import between, check, nodes, phi_rest, remaining, rk4
from .solver import solver

__all__ = ["unipc_1", "unipc_2", "unipc_3"]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """matrix^-1 right, by elimination with pivots, of 2 or 3 unknowns."""
    rows = [[*row, value] for row, value in zip(matrix, right)]
    size = len(rows)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k])]
    found = [0.0] * size
    for k in reversed(range(size)):
        found[k] = (rows[k][size] - sum(rows[k][j] * found[j] for j in range(k + 1, size))) / rows[k][k]
    return found


def rho(h: float, r: tuple[float, ...], variant: str) -> tuple[float, list[float], list[float]]:
    """(B, rho^p, rho^c) of order p = len(r) + 1, for r = (r_1, ..., r_{p-1}).

        sum_i rho_i r_i^(q-1) = q! (phi_q(hh) - 1/q!) / B,    q = 1, ..., p; for rho^p without r_p, q < p

    but rho^p of p = 2 and rho^c of p = 1 are 1/2, as published. (So B matters to them only; elsewhere it cancels.)
    """
    hh, p = -h, len(r) + 1
    B = hh if variant == "bh1" else math.expm1(hh)
    every = (*r, 1.0)
    beta = [phi_rest(hh, q) * math.factorial(q) / B for q in range(1, p + 1)]
    rows = [[each ** (q - 1) for each in every] for q in range(1, p + 1)]
    predictor = [] if p == 1 else [0.5] if p == 2 else _solve([row[:-1] for row in rows[:-1]], beta[:-1])
    return B, predictor, [0.5] if p == 1 else _solve(rows, beta)


@lru_cache(maxsize=4096)
def coefficients(
    s: float, t: float, past: tuple[float, ...], predict: int, correct: int, variant: str
) -> tuple[float, ...]:
    """(a, c_0, c_1, ...) of x' = a x + c_0 D(s) + sum_i c_i D(s_i): x, predicted by order `correct` (0: by something
    else, it stays), is corrected and taken to t by order `predict`. `past` holds s_1, s_2, ..., as far as needed."""
    a = (1.0 - t) / (1.0 - s)
    c = [0.0] * (1 + max(predict - 1, correct))
    c[0] = (t - s) / (1.0 - s)
    if predict > 1:
        h = between(s, t)
        r = tuple([between(s, each) / h for each in past[: predict - 1]])
        B, predictor, _ = rho(h, r, variant)
        for i, (weight, ratio) in enumerate(zip(predictor, r), 1):
            c[i] -= t * B * weight / ratio
            c[0] += t * B * weight / ratio
    if correct:
        before = past[0]
        h = between(before, s)
        if math.isinf(h):  # from t = 0: B = -1, the trapezoidal rule
            c[0] += a * s * 0.5
            c[1] -= a * s * 0.5
        else:
            r = tuple([between(before, each) / h for each in past[1:correct]])
            B, predictor, corrector = rho(h, r, variant)
            c[0] -= a * s * B * corrector[-1]
            c[1] += a * s * B * corrector[-1]
            for i, ratio in enumerate(r):
                weight = a * s * B * (corrector[i] - predictor[i]) / ratio
                c[i + 2] -= weight
                c[1] += weight
    return (a, *c)


def _step(velocity, x, s, t, memory, order, variant, corrector, start, lower_order_final):
    """memory: (order by which x was predicted or 0, (s_1, s_2, ...), D_1, D_2, ...)."""
    b = velocity(x, s)
    if s == 1.0:  # from the data: lambda is +inf, and D is x
        return x + (t - s) * b, None
    correct, past, *known = (0, ()) if memory is None else memory
    usable = 0 if not past or past[0] == 0.0 else len(past)
    to_an_end, ended = t == 1.0 or t == 0.0, t == velocity.end
    D = weighted(1.0, x, 1.0 - s, b)
    if start == "full" and usable == 0 and not to_an_end:
        return rk4(velocity, x, b, s, t), None if ended or s == 0.0 else (0, (s,), D)
    predict = 1 if to_an_end else min(order, usable + 1)
    if lower_order_final:
        predict = min(predict, remaining(velocity, t))
    a, *c = coefficients(s, t, past, predict, correct, variant)
    after = weighted(a, x, *chain.from_iterable(zip(c, (D, *known))))
    if ended or (order == 1 and not corrector):
        return after, None
    kept = min(order - 1, usable)
    return after, (predict if corrector else 0, (s, *past[:kept]), D, *known[:kept])


@solver(order=2, nfe=1, check=check)
def unipc_1(velocity, x, s, t, memory, *, variant="bh2", corrector=True):
    """UniPC-1: Euler predicts, and the trapezoidal rule in D corrects. Order 2, 1 NFE per step.

        predicted = x + (t-s) b,    corrected = predicted - t B/2 (D(predicted, t) - D)

    The last state is the predicted one; a step to t = 1 is x' = D. Zhao et al. 2023, alg. 1 and 2, p = 1. Not to be
    confused with Heun, which evaluates twice.

    variant     "bh1": B = -h; "bh2": B = expm1(-h), h the step in lambda. From t = 0 both take the limit B = -1
    corrector   False: the predictor alone, which is Euler, order 1

    >>> import torch
    >>> unipc_1(lambda x, t: (1 - x) / (1 - t), torch.zeros(1, 1), [0.0, 0.4, 1.0])
    tensor([[1.]])
    """
    return _step(velocity, x, s, t, memory, 1, variant, corrector, "low", False)


@solver(order=3, nfe=1, check=check)
def unipc_2(velocity, x, s, t, memory, *, variant="bh2", corrector=True, lower_order_final=False):
    """UniPC-2: predicted from two data predictions, corrected with a third. Order 3, 1 NFE per step.

        predicted = (1-t)/(1-s) x + (t-s)/(1-s) D - t B rho^p_1 (D_1 - D)/r_1,    rho^p_1 = 1/2
        corrected = the same with rho^c_1, and - t B rho^c_2 (D(predicted, t) - D)

    It starts with UniPC-1, whose local error is of order 3 too, so that no step has to be spent on a history: D at
    t = 0, where lambda = -inf, is none. The last state is the predicted one; a step to t = 1 is x' = D. Zhao et al.
    2023, alg. 1 and 2.

    variant             "bh1": B = -h; "bh2": B = expm1(-h), h the step in lambda
    corrector           False: the predictor alone, order 2
    lower_order_final   predict the last step in order 1 wherever it ends
    """
    return _step(velocity, x, s, t, memory, 2, variant, corrector, "low", lower_order_final)


@solver(order=4, nfe=1, starting=6, nodes=nodes, check=check)
def unipc_3(velocity, x, s, t, memory, *, variant="bh2", corrector=True, start="full", lower_order_final=False):
    """UniPC-3: predicted from three data predictions, corrected with a fourth. Order 4, 1 NFE per step.

        predicted = (1-t)/(1-s) x + (t-s)/(1-s) D - t B sum_{i<3} rho^p_i (D_i - D)/r_i
        corrected = the same with rho^c_i, and - t B rho^c_3 (D(predicted, t) - D)

    The last state is the predicted one; a step to t = 1 is x' = D, whatever `start`. Zhao et al. 2023, alg. 1 and 2.

    variant             "bh1" or "bh2": B, of the first steps; at order 3 it cancels
    corrector           False: the predictor alone, order 3
    start               "full": RK4, 4 NFE, for the first step and for one from t = 0, then UniPC-2; "low": UniPC-1 and
                        UniPC-2, which leaves order 3
    lower_order_final   predict the last two steps in orders 2 and 1
    """
    return _step(velocity, x, s, t, memory, 3, variant, corrector, start, lower_order_final)
