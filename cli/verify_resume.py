"""`minimind-train verify-resume`: whether a run with these options can be stopped and resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minimind.config.options import CONFIG_SECTIONS

from . import upstream_flags
from .config_options import ConfigFile, Preset, read_config
from .options import with_options

if TYPE_CHECKING:
    from minimind.runs.verify_resume import ComparedStep, ResumeCheck

# Rows of the table at either end and on either side of the stop.
ROWS_SHOWN = 3


@with_options(*CONFIG_SECTIONS, hidden=upstream_flags.HIDDEN)
def verify_resume(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option(help="Optimizer steps to train.", metavar="INTEGER")] = 20,
    processes: Annotated[
        int, typer.Option(help="Processes that the second half runs on, on this machine.", metavar="INTEGER")
    ] = 1,
    preset: Preset = None,
    config: ConfigFile = None,
    **_: Any,
) -> None:
    """Train some steps in one go and in two halves, and compare rows and losses.

    Takes the options of pretrain, works in temporary folders, and exits with 1 where the two differ.
    """
    resolved = read_config(ctx, preset, config)
    from minimind.runs.verify_resume import verify_resume as verify

    check = verify(
        resolved, steps, processes=processes, note=lambda text: typer.echo(f"{text} ...", err=True)
    )
    Console().print(_table(check))
    typer.echo(_verdict(check))
    if check.first_difference is not None:
        raise typer.Exit(1)


def _table(check: ResumeCheck) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "", "straight", "resumed", "difference", "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = check.compared[-1].step
    parting = check.first_difference
    shown_before = 0
    for one in check.compared:
        near = {0, check.stopped_after, last, parting.step if parting else last}
        if not any(abs(one.step - step) < ROWS_SHOWN for step in near):
            continue
        if one.step > shown_before + 1:
            table.add_row("...")
        shown_before = one.step
        table.add_row(*_row(one))
    return table


def _row(one: ComparedStep) -> list[str]:
    return [
        str(one.step),
        "validation" if one.what == "val_loss" else "loss",
        f"{one.straight:.6f}",
        f"{one.resumed:.6f}",
        "none" if one.difference == 0 else f"{one.difference:.1e}",
        "same" if one.same_data else "other",
    ]


def _verdict(check: ResumeCheck) -> str:
    last = check.compared[-1].step
    how = f"stopped after step {check.stopped_after} and resumed"
    if check.processes > 1:
        how += f" on {check.processes} processes"
    parting = check.first_difference
    if parting is None and check.largest_difference == 0:
        return f"equal: {last} steps, {how}, have the same rows and losses to the last bit."
    if parting is None:
        return (
            f"equal: {last} steps, {how}, have the same rows, and losses that differ by at most "
            f"{check.largest_difference:.1e} of their value (up to {check.tolerance:g} is rounding)."
        )
    if not parting.same_data:
        return f"NOT equal: {how}, the run trains on other rows from step {parting.step} on."
    allowed = f"; up to {check.tolerance:g} is rounding" if check.tolerance else ""
    return (
        f"NOT equal: {how}, the run has another {parting.what} at step {parting.step}: {parting.resumed!r} "
        f"instead of {parting.straight!r} (a difference of {parting.difference:.1e} of its value{allowed})."
    )
