"""`check`: whether `jvp` of a function is its derivative, by plain calls beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .differences import moved, scale
from .dual import Dual
from .verb import jvp, seeded

__all__ = ["check"]


def check(
    fn: Callable,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    as_tensor: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(y, dy) = jvp(fn, primals, tangents), having seen that y is fn(*primals) and dy its central difference.

    fn, primals, tangents, as_tensor and kwargs are as in `jvp`. Five more calls of fn, in the dtype given, all with the
    same random numbers. For the first run with a new network: a function without a rule raises by itself, but code that
    asks `torch.is_tensor(x)` may take another branch for a Dual, which is no tensor, and nothing would say so.

    Of each floating-point output, by Euclidean norm:

        |y - fn(x)|           <= sqrt(eps) |fn(x)|
        |dy - D(h)|           <= 0.01 |dy| + 4 |D(h) - D(2h)| + 8 eps |fn(x)| / h
        D(h) = (fn(x + h dx) - fn(x - h dx)) / 2h,    h |dx| = eps^(1/3) max(|x|, 1) by largest elements

    In float64 (`net.double()`) this sees an error of one percent, in float32 mostly. Where the allowance exceeds
    0.3 |dy|, and in half precision, it warns that it cannot judge the tangent. It does not see what these primals and
    tangents do not show: a branch not taken, an error that they hide. `x.detach()` in fn is a difference, and may be
    meant.

    Raises RuntimeError that names value or tangent, the output, the difference and the likely cure.

    >>> y, dy = check(lambda x: x * x, (torch.ones(2, dtype=torch.float64),), (1.0,))
    >>> dy
    tensor([2., 2.], dtype=torch.float64)
    """
    options = dict(kwargs or {})
    run = _same_random_numbers()
    with run():
        y, dy = jvp(fn, primals, tangents, as_tensor=as_tensor, kwargs=kwargs)
    args = seeded(primals, tangents, Dual)
    step = scale(args)

    def plain(h: float) -> list[Any]:
        with run(), torch.no_grad():
            return pytree.tree_leaves(fn(*moved(args, h), **options))  # of copies: fn may write

    expected, found, slopes = plain(0.0), pytree.tree_leaves(y), pytree.tree_leaves(dy)
    if len(found) != len(expected):
        raise RuntimeError(
            f"value: fn returns {len(found)} outputs under jvp and {len(expected)} by itself; {_BRANCH[as_tensor]}"
        )
    places = [i for i, x in enumerate(expected) if isinstance(x, Tensor)]
    for i in places:
        _check_value(i, found[i], expected[i], as_tensor)
    if step is None:  # no tangent at all
        return y, dy
    ends = [(h, plain(h), plain(-h)) for h in (step, 2.0 * step)]
    for i in places:
        if expected[i].is_floating_point() and expected[i].numel():
            near, far = ((up[i].double() - down[i].double()) / (2.0 * h) for h, up, down in ends)
            _check_tangent(i, slopes[i].detach().double(), near, far, expected[i], step, as_tensor)
    return y, dy


_BRANCH = {
    False: "a branch on torch.is_tensor(x) or isinstance(x, torch.Tensor) is likely: pass as_tensor=True",
    True: "fn may count its calls or draw numbers of its own, or a tangent rule of yours may be wrong",
}


def _check_value(place: int, y: Any, expected: Tensor, as_tensor: bool) -> None:
    same = isinstance(y, Tensor) and (y.shape, y.dtype) == (expected.shape, expected.dtype)
    if not same:
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise RuntimeError(
            f"value: output {place} is {got} under jvp and {tuple(expected.shape)} {expected.dtype} by itself; "
            f"{_BRANCH[as_tensor]}"
        )
    if not expected.is_floating_point():
        if not torch.equal(y, expected):
            raise RuntimeError(f"value: output {place} differs under jvp; {_BRANCH[as_tensor]}")
        return
    y, expected = y.detach().double(), expected.detach()
    allowed = torch.finfo(expected.dtype).eps ** 0.5
    expected = expected.double()
    kept = expected.isfinite()
    if bool((y.isfinite() != kept).any()) or bool((y - expected)[kept].norm() > allowed * expected[kept].norm()):
        error = float((y - expected)[kept].norm() / expected[kept].norm())
        raise RuntimeError(
            f"value: output {place} under jvp differs from that of fn by itself by {error:.2g} of its norm "
            f"({allowed:.2g} is allowed); {_BRANCH[as_tensor]}"
        )


def _check_tangent(
    place: int, slope: Tensor, near: Tensor, far: Tensor, value: Tensor, step: float, as_tensor: bool
) -> None:
    eps = torch.finfo(value.dtype).eps
    error, size = float((slope - near).norm()), float(slope.norm())
    rough = 4.0 * float((near - far).norm()) + 8.0 * eps * float(value.double().norm()) / step
    if error == 0.0:  # zero, in both ways
        return
    if eps > 1e-4 or not rough <= 0.3 * max(size, float(near.norm())):  # NaN, too
        warnings.warn(
            f"check: central differences of output {place} are too rough in {value.dtype} to judge its tangent (norm "
            f"{size:.2g}, error {rough:.2g}); pass a float64 copy of the network, of the primals and of the tangents",
            stacklevel=3,
        )
    elif not error <= 0.01 * size + rough:
        raise RuntimeError(
            f"tangent: that of output {place} differs from central differences by {error:.2g}, of norm {size:.2g} "
            f"({0.01 * size + rough:.2g} is allowed); a part of fn does not see it: {_BRANCH[as_tensor]}; or "
            "x.detach() in fn, where that is meant"
        )


def _same_random_numbers() -> Callable:
    """A context that runs with the generators as they are now."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    state, on_devices = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in devices]

    @contextmanager
    def run() -> Iterator[None]:
        torch.set_rng_state(state)
        for i, each in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(each, i)
        yield

    return run
