"""The compiled test programs of kernels/, shared by all tests of the session."""

from __future__ import annotations

import pytest
from simt.programs import Programs


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("simt"))
