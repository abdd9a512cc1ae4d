"""`minimind-train info`: what a run, a checkpoint, a model folder or a file of weights is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.formatting import printable
from minimind.runs.info import read_info


def info(
    ctx: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint, a model folder, a .safetensors or a .pth."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a run, a checkpoint or a model is, and how to go on with it."""
    found = read_info(path)
    group: Any = ctx.find_root().command
    known = getattr(group, "commands", {})
    following = [line for name, line in found.next if name in known]
    if as_json:
        typer.echo(json.dumps({**found.values, "next": following}, indent=1))
        return
    rows = [*found.rows, *(("next" if i == 0 else "", line) for i, line in enumerate(following))]
    for key, value in rows:
        typer.echo(f"{key + ':' if key else '':<12} {printable(value)}")
