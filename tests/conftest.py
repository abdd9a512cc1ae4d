"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material that lies beside the checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("MINIMIND_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder}")
    return folder
