"""Cyclic garbage collection under the control of the training loop."""

from __future__ import annotations

import gc


class GarbageCollection:
    """Disables automatic garbage collection inside a `with` block; `collect` runs it at a good moment.

    Automatic collections start at different times on each rank, and all other ranks wait for that one.
    Objects from before the block are frozen, which keeps the collections short. The end restores everything.
    """

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        # Objects that others froze could not be told apart afterwards.
        self._freezes = gc.get_freeze_count() == 0
        gc.collect()
        gc.disable()
        if self._freezes:
            gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        if self._freezes:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def collect(self) -> None:
        """Collect the cyclic garbage made inside the block."""
        gc.collect()
