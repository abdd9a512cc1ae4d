"""Fixtures for tests on a CUDA GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import topologies


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()
