"""diffusers' DPM-Solver++(2M) step and the same update as one kernel.

Lu et al. 2022 (DPM-Solver++), algorithm 2, in the convention of diffusers with a flow model: sigma falls from 1 to 0,
alpha = 1 - sigma, the model predicts v = noise - data.

    m   = x - sigma v                                            data prediction, kept as history
    x'  = (sigma' / sigma) x - alpha' (e^-h - 1) [ m + (m - m_old) / (2 r) ]
    h   = lambda' - lambda,   r = (lambda - lambda_old) / h,   lambda = log(alpha / sigma)

diffusers allocates its results and cannot do otherwise; ours is timed writing into buffers, as our driver does, and
allocating as well.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

import pyflowmap as pfm

from .case import Case, Contestant, Skipped, Target, case
from .peers import bytes_of, copy_of

STEPS, AT, GUIDANCE = 20, 8, 3.0


def _lambda(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma)


def dpm_2m(x, v, m_old, sigma_old: float, sigma: float, sigma_next: float):
    """One step; x, v and m_old are lazy. Returns the next state and the data prediction, to be evaluated together."""
    h = _lambda(sigma_next) - _lambda(sigma)
    r = (_lambda(sigma) - _lambda(sigma_old)) / h
    scale = -(1.0 - sigma_next) * math.expm1(-h)
    m = x - sigma * v
    return (sigma_next / sigma) * x + scale * (m + (0.5 / r) * (m - m_old)), m


def _scheduler():
    """diffusers' scheduler in the middle of a run, or why not."""
    try:
        Scheduler = importlib.import_module("diffusers").DPMSolverMultistepScheduler
    except Exception as error:  # an ImportError, or whatever a half-installed dependency raises
        return None, f"pip install 'diffusers>=0.42' ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    scheduler = Scheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    scheduler.set_timesteps(STEPS)
    return scheduler, ""


def _case(shape: tuple[int, ...], guided: bool) -> Case:
    x, c, u, m_old, o, m = (torch.randn(shape) for _ in range(6))
    lazy, evaluate = pfm.lazy, pfm.evaluate
    scheduler, reason = _scheduler()
    sigmas = [0.62, 0.58, 0.53] if scheduler is None else scheduler.sigmas.double().tolist()[AT - 1 : AT + 2]

    def step():
        v = lazy(c)
        if guided:
            v = lazy(u) + GUIDANCE * (v - lazy(u))
        return dpm_2m(lazy(x), v, lazy(m_old), *sigmas)

    def ours():
        return evaluate(*step(), out=(o, m))

    def ours_allocating():
        return evaluate(*step())

    contestants, skipped = [Contestant("evaluate(out=)", ours)], []
    name = "guidance in torch, then DPMSolverMultistepScheduler.step" if guided else "DPMSolverMultistepScheduler.step"
    if scheduler is None:
        skipped.append(Skipped(name, reason))
    else:
        time = scheduler.timesteps[AT]

        def theirs() -> tuple[Tensor, Tensor]:
            scheduler._step_index = AT  # the middle of the run, again and again; about 0.1 us
            scheduler.lower_order_nums = 2
            scheduler.model_outputs = [None, m_old]
            v = u + GUIDANCE * (c - u) if guided else c
            return scheduler.step(v, time, x, return_dict=False)[0], scheduler.model_outputs[-1]

        contestants.append(Contestant(name, theirs, Target(faster=4.0), note="allocates"))
    contestants.append(Contestant("evaluate", ours_allocating, note="ours, allocating"))
    traffic = bytes_of(*(x, c, m_old, o, m), *((u,) if guided else ()))
    if x.numel() > 1 << 16:
        contestants.append(copy_of(traffic, (x, c, u, m_old, o, m)))
    return Case(
        contestants,
        {"x, v, m_old, o, m": shape},
        traffic,
        skipped=skipped,
        note="Our step computes its coefficients from three sigmas in Python at each call; diffusers computes them in "
        "0-d tensors.",
    )


@case("schedulers", "dpm_2m_small", "DPM-Solver++(2M) step, 1 x 4 x 64 x 64")
def dpm_2m_small() -> Case:
    return _case((1, 4, 64, 64), False)


@case("schedulers", "dpm_2m_20mb", "DPM-Solver++(2M) step, 20 MB")
def dpm_2m_20mb() -> Case:
    return _case((4, 16, 128, 128), False)


@case("schedulers", "dpm_2m_guided_24mb", "guidance and DPM-Solver++(2M) step, 24 MB")
def dpm_2m_guided_24mb() -> Case:
    return _case((4, 16, 128, 128), True)


@case("schedulers", "dpm_2m_guided_192mb", "guidance and DPM-Solver++(2M) step, 192 MB")
def dpm_2m_guided_192mb() -> Case:
    return _case((8, 64, 128, 128), True)
