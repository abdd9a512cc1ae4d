"""`minimind-train verify-resume`: compare a resumed run with an uninterrupted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.config.options import CONFIG_SECTIONS

from . import upstream_flags
from .config_options import ConfigFile, Preset, read_config
from .options import with_options

if TYPE_CHECKING:
    from rich.table import Table

    from minimind.runs.verify_resume import ResumeCheck

# Steps shown at either end and on either side of the stop and of the first difference.
STEPS_SHOWN = 3


@with_options(*CONFIG_SECTIONS, hidden=upstream_flags.HIDDEN)
def verify_resume(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option(help="Optimizer steps to train.", metavar="INTEGER")] = 20,
    processes: Annotated[
        int, typer.Option(help="Processes of the second half, on this machine.", metavar="INTEGER")
    ] = 1,
    preset: Preset = None,
    config: ConfigFile = None,
    **_: Any,
) -> None:
    """Train with and without an interruption, and compare data order and losses.

    Takes the options of pretrain, writes to temporary folders, and exits with 1 if the two runs differ.
    """
    resolved = read_config(ctx, preset, config)
    from minimind.runs.verify_resume import verify_resume as verify

    check = verify(
        resolved, steps, processes=processes, note=lambda text: typer.echo(f"{text} ...", err=True)
    )
    from rich.console import Console

    Console().print(_table(check))
    typer.echo(_verdict(check))
    if check.first_difference is not None:
        raise typer.Exit(1)


def _table(check: ResumeCheck) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("step", "", "uninterrupted", "resumed", "difference", "data"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = check.compared[-1].step
    difference = check.first_difference
    last_shown = 0
    for one in check.compared:
        shown = {0, check.stopped_after, last, difference.step if difference else last}
        if not any(abs(one.step - step) < STEPS_SHOWN for step in shown):
            continue
        if one.step > last_shown + 1:
            table.add_row("...")
        last_shown = one.step
        table.add_row(
            str(one.step),
            "validation" if one.what == "val_loss" else "loss",
            f"{one.straight:.6f}",
            f"{one.resumed:.6f}",
            "none" if one.difference == 0 else f"{one.difference:.1e}",
            "same" if one.same_data else "different",
        )
    return table


def _verdict(check: ResumeCheck) -> str:
    last = check.compared[-1].step
    how = f"stopped after step {check.stopped_after} and resumed"
    if check.processes > 1:
        how += f" on {check.processes} processes"
    difference = check.first_difference
    if difference is None and check.largest_difference == 0:
        return f"equal: {last} steps, {how}: same data, losses equal to the last bit."
    if difference is None:
        return (
            f"equal: {last} steps, {how}: same data, losses differ by at most {check.largest_difference:.1e} "
            f"relative (tolerance {check.tolerance:g} for rounding)."
        )
    if not difference.same_data:
        return f"NOT equal: {how}, the run trains on different data from step {difference.step}."
    allowed = f"; tolerance {check.tolerance:g}" if check.tolerance else ""
    return (
        f"NOT equal: {how}, {difference.what} {difference.resumed!r} at step {difference.step} instead of "
        f"{difference.straight!r} (relative difference {difference.difference:.1e}{allowed})."
    )
