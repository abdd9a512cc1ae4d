"""Cyclic garbage collection under the control of the training loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_gc() -> Iterator[None]:
    """Disable automatic garbage collection inside; call `gc.collect(1)` at a good moment.

    Automatic collections start at different times on each rank, and all other ranks wait for that one.
    Objects from before the block are frozen, which keeps the collections short. The end restores everything.
    """
    was_enabled = gc.isenabled()
    # Objects that others froze could not be told apart afterwards.
    freezes = gc.get_freeze_count() == 0
    gc.collect()
    gc.disable()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
