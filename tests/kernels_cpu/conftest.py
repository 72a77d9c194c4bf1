"""Kernels run here in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from launcher_kernels import dispatch
from tests import interpreter


@pytest.fixture
def launches() -> Iterator[Counter[str]]:
    """Kernels run in the interpreter; in the end it has the count of each one's launches, and there were some."""
    interpreter.mend()
    before = sum(dispatch.launches.values())
    with dispatch.interpreted():
        yield dispatch.launches
    assert sum(dispatch.launches.values()) > before, "no kernel ran: the reference was compared with itself"
