"""`minimind-train checkpoints`: list the checkpoints of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.checkpoint.files import StoredCheckpoint, best_checkpoint, stored_checkpoints
from minimind.errors import CheckpointError
from minimind.formatting import printable

from .options import expand_path


def checkpoints(
    run_folder: Annotated[
        Path, typer.Argument(help="Run folder, or its checkpoints folder.", callback=expand_path)
    ],
    verify: Annotated[bool, typer.Option(help="Verify the checksums of all files.")] = True,
) -> None:
    """List the checkpoints of a run: step, tokens, loss, size, and whether each is valid."""
    inner = run_folder / "checkpoints"
    folder = inner if inner.is_dir() else run_folder
    found = stored_checkpoints(folder)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}; name the --output-dir of a run.")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    best = best_checkpoint(folder)
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "tokens", "val loss", "size", "written"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for checkpoint in found:
        is_best = best is not None and best[0] == checkpoint.step
        cells = _cells(checkpoint, best[1] if best is not None and is_best else None, verify)
        # As Text, because rich would interpret markup in paths.
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


def _cells(checkpoint: StoredCheckpoint, best_loss: float | None, verify: bool) -> list[str]:
    problem = checkpoint.problem(contents=verify)
    trainer: Any = checkpoint.trainer if problem is None else {}
    state = problem or ("valid" if verify else "complete; checksums not verified")
    tokens, loss = trainer.get("tokens"), trainer.get("val_loss") if best_loss is None else best_loss
    return [
        str(checkpoint.step),
        "" if tokens is None else f"{tokens:,}",
        "" if loss is None else f"{loss:.4f}",
        f"{checkpoint.num_bytes / 1e6:,.1f} MB",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(checkpoint.path.stat().st_mtime)),
        state + (" (best)" if best_loss is not None and problem is None else ""),
    ]
