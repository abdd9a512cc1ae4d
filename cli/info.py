"""`minimind-train info`: describe a run, a checkpoint or a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.errors import ConfigError
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
    open_report: Annotated[
        bool, typer.Option("--open", help="Open the report.html of the run in a browser.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot the losses of the run to a .png, .pdf or .svg file; needs matplotlib.",
            metavar="FILE",
            callback=expand_path,
        ),
    ] = None,
) -> None:
    """Describe a run, checkpoint or model and suggest next commands."""
    found = read_info(path)
    if found.kind != "run" and (open_report or plot is not None):
        raise ConfigError(f"--open and --plot need a run, and {path} is none; name the --output-dir of one.")
    if plot is not None:
        from minimind.runs.plot import plot_losses
        from minimind.runs.record import read_run

        plot_losses(read_run(path), plot)
        typer.echo(f"wrote {printable(str(plot))}", err=True)
    if open_report:
        if found.values["report"] is None:
            raise ConfigError(f"{path} has no report.html; runs of this version write one.")
        import webbrowser

        webbrowser.open(Path(found.values["report"]).resolve().as_uri())
    group: Any = ctx.find_root().command
    commands = getattr(group, "commands", {})
    suggested = [line for name, line in found.next if name in commands]
    if as_json:
        typer.echo(json.dumps({**found.values, "next": suggested}, indent=1))
        return
    rows = [*found.rows, *(("next" if i == 0 else "", line) for i, line in enumerate(suggested))]
    for key, value in rows:
        typer.echo(f"{key + ':' if key else '':<12} {printable(value)}")
