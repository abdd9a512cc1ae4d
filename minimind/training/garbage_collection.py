"""Python's collector of cyclic garbage, held back while time counts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def manual_gc() -> Iterator[Callable[[], object]]:
    """Keep the collector from interrupting the block; yields a function that collects at a good moment.

    By itself it would run whenever some hundreds of objects were made, which in one process of several makes
    all others wait. What exists before the block is not looked at by those collections, so that they are
    short. Afterwards all is as it was.
    """
    was_enabled = gc.isenabled()
    # Someone else's frozen objects could not be told from ours afterwards.
    freezes = gc.get_freeze_count() == 0
    gc.collect()
    gc.disable()
    if freezes:
        gc.freeze()
    try:
        yield gc.collect
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
