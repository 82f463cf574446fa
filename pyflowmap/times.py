"""Laws of training times. Each returns float32 times of shape (B,) on the device of `x1`, drawn there without a sync.

A pair law returns (s, t) with s <= t: the start and the end of a jump. `equal` is the expected share of rows with
t = s, the rows that see plain flow matching. All means are in this library's time, 0 = noise to 1 = data.

With `seed` the times of a row depend on (seed, sample id) alone, not on the batch, the device or the number of
processes; `sample_ids` (B,), int64, default 0..B-1. With `generator`, or with neither, torch draws them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .algebra import evaluate, noise

__all__ = [
    "uniform",
    "uniform_pair",
    "logit_normal",
    "logit_normal_pair",
    "karras_pair",
    "easy_pair",
    "buckets",
    "consistency_steps",
    "easy_stage",
]

_STREAM = 0x74696D65  # apart from the noise of the same sample, which is stream 0
_ROTATION = _STREAM + 1  # one number for all samples of a seed
_BELOW_ONE = 1.0 - 2.0**-24


class _Source:
    """Numbers for a law: columns of standard normal or uniform numbers, a row per sample."""

    def __init__(
        self, x1: Tensor, seed: int | None, generator: torch.Generator | None, sample_ids: Tensor | None, columns: int
    ):
        if x1.dim() == 0:
            raise ValueError("x1 has no batch dimension; its shape is (B, ...)")
        if seed is not None and generator is not None:
            raise ValueError(f"seed = {seed} and generator are both given; give one")
        if seed is None and sample_ids is not None:
            raise ValueError("sample_ids need a seed: what is drawn depends on (seed, sample id); pass seed=")
        self.device, self.rows, self.generator = x1.device, x1.shape[0], generator
        self.field = None
        if seed is not None:
            like = torch.empty(self.rows, columns, device=x1.device)
            self.field = evaluate(noise(like, seed, sample_ids, stream=_STREAM)).unbind(1)

    def normal(self, column: int) -> Tensor:
        if self.field is not None:
            return self.field[column]
        return torch.randn(self.rows, **self._options())

    def uniform(self, column: int) -> Tensor:
        if self.field is not None:  # by the normal distribution's own function; in [0, 1), as torch.rand
            return torch.special.ndtr(self.field[column].double()).float().clamp(max=_BELOW_ONE)
        return torch.rand(self.rows, **self._options())

    def _options(self) -> dict:
        """Asked for a generator, torch.rand takes no symbolic size (a compiled step, any batch)."""
        options = {"device": self.device}
        return options if self.generator is None else {**options, "generator": self.generator}


def _share(equal: float) -> float:
    if not 0.0 <= equal <= 1.0:
        raise ValueError(f"equal = {equal} is not a share; it lies in [0, 1]")
    return equal


def _std(std: float) -> float:
    if not std >= 0.0:
        raise ValueError(f"std = {std}; it must be >= 0")
    return std


def _sorted(a: Tensor, b: Tensor, equal: float, source: _Source) -> tuple[Tensor, Tensor]:
    s, t = torch.minimum(a, b), torch.maximum(a, b)
    if equal > 0.0:
        t = torch.where(source.uniform(2) < equal, s, t)
    return s, t


def uniform(
    x1: Tensor, *, seed: int | None = None, generator: torch.Generator | None = None, sample_ids: Tensor | None = None
) -> Tensor:
    """t ~ U(0, 1), shape (B,)."""
    return _Source(x1, seed, generator, sample_ids, 1).uniform(0)


def uniform_pair(
    x1: Tensor,
    *,
    equal: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): two U(0, 1), sorted. Boffi et al. 2025.

    >>> s, t = uniform_pair(torch.zeros(8, 3), seed=0)
    >>> bool((s <= t).all())
    True
    """
    equal, source = _share(equal), _Source(x1, seed, generator, sample_ids, 3)
    return _sorted(source.uniform(0), source.uniform(1), equal, source)


def logit_normal(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """t = sigmoid(mean + std z), z ~ N(0, 1). Esser et al. 2024 (SD3), eq. 19.

    It is the log-normal law of noise levels of EDM and of consistency models with the sign of its mean turned: since
    t = 1/(1 + sigma), log sigma ~ N(P_mean, P_std^2) is `logit_normal(x1, -P_mean, P_std)`.
    """
    std, source = _std(std), _Source(x1, seed, generator, sample_ids, 1)
    return torch.sigmoid(mean + std * source.normal(0))


def logit_normal_pair(
    x1: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    equal: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): two logit-normal times, sorted; a share `equal` of the rows has t = s.

    Geng et al. 2025 (MeanFlow), sec. 4.3.
    A positive `mean` leans towards the data. MeanFlow's own time runs the other way, so its mean changes sign here.
    """
    std, equal, source = _std(std), _share(equal), _Source(x1, seed, generator, sample_ids, 3)
    first, second = (torch.sigmoid(mean + std * source.normal(column)) for column in (0, 1))
    return _sorted(first, second, equal, source)


# ---- consistency models: two noise levels of one trajectory, sigma = (1-t)/t -----------------------------------------


def karras_pair(
    x1: Tensor,
    steps: int = 40,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    log_normal: tuple[float, float] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): neighbours on the grid of `steps` noise levels of Karras et al. 2022, eq. 5, s the noisier of the two.

        sigma_i = (sigma_max^(1/rho) + i/(steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,      t = 1/(1 + sigma)

    log_normal  None: every pair as often, Song et al. 2023. (mean, std) of log sigma, e.g. (-1.1, 2.0): a pair as
                often as a log-normal sigma falls between the two, Song & Dhariwal 2024 (iCT), table 1

    A consistency function of theirs is the identity at sigma_min, one of this library at sigma = 0: so the cleanest
    level is 0 in place of sigma_min, that is t = 1, where the point is its own target.

    >>> s, t = karras_pair(torch.zeros(4, 3), steps=2, seed=0)       # the one pair from sigma_max to the data
    >>> round(s[0].item(), 6), t[0].item()
    (0.012346, 1.0)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps = {steps!r}; a whole number of noise levels, at least 2")
    if not 0.0 < sigma_min < sigma_max < math.inf or not rho > 0.0:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}, rho = {rho}; need 0 < sigma_min < sigma_max and "
            "rho > 0, e.g. 0.002, 80 and 7"
        )
    if log_normal is not None and not _positive_std(log_normal):
        raise ValueError(f"log_normal = {log_normal}; it is (mean, std) of log sigma with std > 0, e.g. (-1.1, 2.0)")
    source = _Source(x1, seed, generator, sample_ids, 1)
    below, start, end = _karras_table(steps, sigma_min, sigma_max, rho, log_normal, x1.device)
    pair = torch.searchsorted(below, source.uniform(0), right=True).clamp(max=steps - 2)
    return start[pair], end[pair]


def _positive_std(log_normal: tuple[float, float]) -> bool:
    return len(log_normal) == 2 and math.isfinite(log_normal[0]) and log_normal[1] > 0.0


@functools.lru_cache
def _karras_table(steps, sigma_min, sigma_max, rho, log_normal, device) -> tuple[Tensor, Tensor, Tensor]:
    """The probability of all pairs up to each, and the pairs' times: float32, (steps - 1,) each."""
    high, low = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    sigma = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]
    if log_normal is None:
        mass = [1.0] * (steps - 1)
    else:
        mean, std = log_normal
        tail = [0.5 * math.erfc((math.log(level) - mean) / (math.sqrt(2.0) * std)) for level in sigma]
        mass = [after - before for before, after in zip(tail, tail[1:])]
    if not sum(mass) > 0.0:
        raise ValueError(f"log_normal = {log_normal} has no mass between {sigma_min} and {sigma_max}; widen the levels")
    times = [1.0 / (1.0 + level) for level in sigma[:-1]] + [1.0]
    with torch.inference_mode(False):  # it is kept, also for calls that record gradients
        below = torch.tensor(mass, dtype=torch.float64).cumsum(0) / sum(mass)
        start, end = torch.tensor(times[:-1]), torch.tensor(times[1:])
        return below.float().to(device), start.to(device), end.to(device)


def easy_pair(
    x1: Tensor,
    mean: float = -1.1,
    std: float = 2.0,
    *,
    stage: float | Tensor = 0.0,
    q: float = 2.0,
    k: float = 8.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t): a log-normal noise level and a cleaner one, nearer with every stage. Geng et al. 2024 (ECT), alg. 1.

        log sigma ~ N(mean, std^2),      r = sigma max(0, 1 - (1 + k sigmoid(-sigma)) / q^(stage+1)),
        s = 1/(1 + sigma),               t = 1/(1 + r)

    `mean` is that of log sigma, as in the paper, not of this library's time. At stage 0 most partners are the data
    (r = 0, t = 1). Raise the stage while training, e.g. by `easy_stage`: sigma - r shrinks by q each time. Past stage
    15 or so float32 times no longer tell the two apart; such a pair has s = t and teaches nothing.

    >>> s, t = easy_pair(torch.zeros(8, 3), stage=5, seed=0)
    >>> bool((s < t).all())
    True
    """
    std, source = _std(std), _Source(x1, seed, generator, sample_ids, 1)
    if not q > 1.0 or not k >= 0.0:
        raise ValueError(f"q = {q}, k = {k}; need q > 1 and k >= 0, e.g. 2 and 8")
    if not isinstance(stage, Tensor) and not 0.0 <= stage < math.inf:
        raise ValueError(f"stage = {stage}; it is a number from 0 up")
    sigma = torch.exp(mean + std * source.normal(0).double())  # in float64: sigma - r is a small difference
    ratio = 1.0 - (1.0 + k * torch.sigmoid(-sigma)) * q ** -(stage + 1.0)
    return (1.0 / (1.0 + sigma)).float(), (1.0 / (1.0 + sigma * ratio.clamp(min=0.0))).float()


def easy_stage(step: int, every: int) -> int:
    """The stage of `easy_pair` at a training step: one more after each `every` steps.

    >>> [easy_stage(step, 100) for step in (0, 99, 100, 250)]
    [0, 0, 1, 2]
    """
    if step < 0 or every < 1:
        raise ValueError(f"step = {step}, every = {every}; need step >= 0 and every >= 1")
    return step // every


def consistency_steps(step: int, total: int, first: int = 2, last: int = 150, rule: str = "root") -> int:
    """N(k): how many noise levels `karras_pair` has at training step k of `total`.

        "root"    N = ceil( sqrt( k/total ((last+1)^2 - first^2) + first^2 ) - 1 ) + 1, at least 2     Song et al. 2023
        "double"  N = min( first 2^floor(k/K), last ) + 1,  K = floor( total / (log2(last/first) + 1) )     iCT, table 1

    CT uses first = 2 and last = 150 or 200; iCT doubles from 10 to 1280.

    >>> [consistency_steps(k, 800, 10, 1280, rule="double") for k in (0, 99, 100, 799)]
    [11, 11, 21, 1281]
    """
    if not 0 <= step <= total or total < 1 or not 1 <= first <= last:
        raise ValueError(
            f"step = {step}, total = {total}, first = {first}, last = {last}; need 0 <= step <= total and "
            "1 <= first <= last"
        )
    if rule == "root":
        return max(math.ceil(math.sqrt(step / total * ((last + 1) ** 2 - first**2) + first**2) - 1.0), 1) + 1
    if rule == "double":
        each = max(int(total / (math.log2(last / first) + 1.0)), 1)
        return min(first * 2 ** min(step // each, 64), last) + 1
    raise ValueError(f'rule = {rule!r}; it is "root" (CT) or "double" (iCT)')


# ---- shares ----------------------------------------------------------------------------------------------------------


def buckets(
    x1: Tensor,
    equal: float = 0.5,
    to_data: float = 0.25,
    *,
    law: Callable[..., tuple[Tensor, Tensor]] = uniform_pair,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, t) of `law`, of which a share `equal` gets t = s, a share `to_data` gets t = 1, and the rest stays free.

    AnyFlow's buckets (50 %, 25 %, 25 %). Rounding shares to whole rows removes buckets where a process holds few rows;
    here row n of the *global* count falls in the bucket that holds

        frac(n g + rotation(seed)),      g = (sqrt(5) - 1)/2

    so that any n, n + 1, ... or n, n + W, ... of W processes keep the shares to within a few rows, while from seed to
    seed every row meets every bucket. `sample_ids` (B,) is that count; without a seed the rotation is drawn anew, and
    the shares hold in expectation even for one row. Use it with `equal=0` or `diagonal=0` of the objective, which
    otherwise turns rows of its own into t = s.

    >>> s, t = buckets(torch.zeros(64, 3), seed=0)
    >>> int((s == t).sum()), int((t == 1.0).sum())
    (33, 16)
    """
    if not (equal >= 0.0 and to_data >= 0.0 and equal + to_data <= 1.0):
        raise ValueError(f"equal = {equal}, to_data = {to_data}; they are shares whose sum is at most 1")
    given = {"seed": seed, "generator": generator, "sample_ids": sample_ids}
    s, t = law(x1, **{name: value for name, value in given.items() if value is not None})
    if seed is None and sample_ids is not None:
        raise ValueError("sample_ids need a seed: what is drawn depends on (seed, sample id); pass seed=")
    count = torch.arange(len(s), device=x1.device) if sample_ids is None else sample_ids
    rotation = torch.rand((), device=x1.device, generator=generator) if seed is None else _rotation(x1, seed)
    # g as a fraction of 2^31, so that the product stays inside 64 bits and is exact for any count.
    place = (count.remainder(2**31) * 1327217885).remainder(2**31).double() / 2**31
    place = (place + rotation).frac()
    t = torch.where(place < equal, s, t)
    return s, torch.where((place >= equal) & (place < equal + to_data), torch.ones_like(t), t)


def _rotation(x1: Tensor, seed: int) -> Tensor:
    """A uniform number of the seed alone: the same for every row and process."""
    one = torch.empty(1, 1, device=x1.device)
    return torch.special.ndtr(evaluate(noise(one, seed, stream=_ROTATION)).double().squeeze())
