"""`minimind-train info`: describe a run, a checkpoint or a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.formatting import printable
from minimind.runs.info import read_info

from .options import expand_path


def info(
    ctx: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint, a model folder, a .safetensors or a .pth file.", callback=expand_path
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a run, checkpoint or model and suggest next commands."""
    found = read_info(path)
    group: Any = ctx.find_root().command
    commands = getattr(group, "commands", {})
    suggested = [line for name, line in found.next if name in commands]
    if as_json:
        typer.echo(json.dumps({**found.values, "next": suggested}, indent=1))
        return
    rows = [*found.rows, *(("next" if i == 0 else "", line) for i, line in enumerate(suggested))]
    for key, value in rows:
        typer.echo(f"{key + ':' if key else '':<12} {printable(value)}")
