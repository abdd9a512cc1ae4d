"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Models as small as those of the tests are slower on several threads, above all where tests run side by side.
torch.set_num_threads(1)

# On a machine that has other things to do an example may take any time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_no_garbage() -> Iterator[None]:
    """Take what is there before a module of tests out of sight of the collector.

    Every run collects garbage, as it should; to look at all that torch and the tests have made, and even to
    count it, takes longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: 1)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material that lies beside the checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("MINIMIND_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder}")
    return folder
