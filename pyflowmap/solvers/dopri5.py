"""Dormand and Prince's embedded pair 5(4) with adaptive steps: the table, one step, and the solver."""

from __future__ import annotations

import math
from typing import Any

from .adaptive import Tableau, adaptive, weigh
from .solver import solver

__all__ = ["TABLEAU", "dopri5"]

# Dormand & Prince 1980, table 2 (RK5(4)7M). The last row of `a` is the step itself, so the last stage of a step is the
# first of the next (FSAL).
TABLEAU = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)


def _check(*, rtol, atol, error, control, max_nfe, first_step):
    if not 0.0 <= rtol < math.inf:
        raise ValueError(f"rtol = {rtol!r}; the relative tolerance is a finite number, at least 0, e.g. 1e-5")
    if not 0.0 < atol < math.inf:
        raise ValueError(f"atol = {atol!r}; it is positive and finite: the error allowed where the state is 0")
    if error not in ("classical", "shampine"):
        raise ValueError(f'error = {error!r}; it is "classical" or "shampine" (2/3 of it, as in torchdiffeq)')
    if control not in ("sample", "batch"):
        raise ValueError(f'control = {control!r}; it is "sample" (a step size each) or "batch" (one for all)')
    if isinstance(max_nfe, bool) or not isinstance(max_nfe, int) or max_nfe < 8:
        raise ValueError(f"max_nfe = {max_nfe!r}; it is a whole number, at least 8: what the first step takes")
    if first_step is not None and not 0.0 < first_step < math.inf:
        raise ValueError(f"first_step = {first_step!r}; it is a positive length of time, or None: chosen by the solver")


@solver(order=5, nfe=6, starting=1, loop=adaptive(TABLEAU), check=_check)
def dopri5(
    velocity: Any,
    x: Any,
    s: float,
    t: float,
    memory: Any,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    error: str = "classical",
    control: str = "sample",
    max_nfe: int = 1000,
    first_step: float | None = None,
):
    """Dormand-Prince 5(4), steps as long as the tolerance allows: order 5, 6 NFE per step tried and 2 to start.

        k_i = v(x + h sum_j a_ij k_j, s + c_i h),     x' = x + h sum_j b_j k_j,     e = h sum_j (b_j - b^_j) k_j
        r = sqrt(mean_i (e_i / (atol + rtol max(|x_i|, |x'_i|)))^2),       x' is taken where r <= 1
        h <- h min(10, max(0.9 r^(-1/5), 1 if r < 1 else 0.2))

    Dormand & Prince 1980, table 2; first step and controller: Hairer, Norsett & Wanner 1993, II.4. Not to be confused
    with Bogacki-Shampine 5(4), nor with torchdiffeq's estimate, which is 2/3 of the pair's own: error="shampine".

    Of the grid only the ends count; with trajectory=True every time in it is hit exactly, by a shortened step.

    rtol, atol  the error allowed per step and element
    error       "classical", or "shampine": its weights times 2/3, equal to tolerances times 1.5
    control     "sample": r is the mean over one sample, each has its own steps, so that a result does not depend on
                the batch; the field is asked with times of shape (B,), samples at the end wait. A guidance that
                compares times needs "batch": r is the mean over the whole batch, all take the same steps
    max_nfe     network evaluations at most, then the run ends where it is
    first_step  its length; else Hairer's choice, by one evaluation more

    A network in half precision makes errors of its own, 0.4 % of a velocity in bfloat16: with rtol below 1e-2 the steps
    shrink to nothing.

    Called as `dopri5(velocity, x, grid)` it returns `Adaptive`: the state, and what became of the run. It never raises
    for an exhausted budget: look at `converged`. `pfm.sample(solver="dopri5")` returns the state and warns instead.
    A sample whose velocity is NaN or infinite stops there and does not hold up others: an error as in any solver, and
    NaN in its place with on_nan="keep".
    The data end of a network that predicts data has no velocity: Euler takes a last step of 0.1 sqrt(rtol + atol)
    spans, at least 1e-6, whose error is of the order of a hundredth of the tolerance. Gradients take the step sizes as
    constants.

    `dopri5.step` is the bare step, for fixed grids under `integrate`.

    >>> import torch
    >>> result = dopri5(lambda x, t: -x, torch.ones(2, 1), [0.0, 1.0])
    >>> bool(result.converged.all()), abs(float(result.x[0]) - math.exp(-1)) < 1e-5
    (True, True)
    """
    h = t - s
    k = [velocity(x, s) if memory is None else memory]
    if t in velocity.singular:
        return x + h * k[0], None
    for c, row in zip(TABLEAU.c[1:], TABLEAU.a[1:]):
        at = x + h * weigh(row, k)
        k.append(velocity(at, t if c == 1.0 else s + c * h))
    return at, k[-1]
