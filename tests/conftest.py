"""Fixtures and the hypothesis profiles of the whole suite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import pytest
import torch

from pyflowmap.ops import backend as backends

_QUIET = (hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow)
# derandomize: CI judges a change, not the day's luck. `HYPOTHESIS_PROFILE=explore` looks for what nobody thought of.
hypothesis.settings.register_profile(
    "ci", max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=_QUIET
)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None, suppress_health_check=_QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class Backend(NamedTuple):
    name: str
    device: torch.device


def _missing(name: str) -> str | None:
    """Why a back end cannot run here."""
    if name == "simt" and importlib.util.find_spec("pyflowmap._simt") is None:
        return "the emulator is not in this build (-C cmake.define.PYFLOWMAP_SIMT=ON)"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if name == "cuda" and not backends._HAS_CUDA:
        return "this build has no CUDA back end (-C cmake.define.PYFLOWMAP_CUDA=ON)"
    return None


@pytest.fixture(params=["cpu", "simt", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test once per back end; tensors belong on `backend.device`."""
    reason = _missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with backends.use(request.param):
        yield Backend(request.param, torch.device("cuda" if request.param == "cuda" else "cpu"))


@pytest.fixture
def simt() -> str:
    """Skips where the emulator is not built."""
    reason = _missing("simt")
    if reason is not None:
        pytest.skip(reason)
    return "simt"
