"""`minimind-train pretrain`: a configuration from flags, a file and a preset; then one library call."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.schema import write_toml
from minimind.errors import ConfigError
from minimind.launch_env import is_main_process

from . import upstream_flags
from .config_options import ConfigFile, Preset, read_config
from .options import with_options

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command may be given again, with --resume.
STOPPED_EARLY = 75


@with_options(*CONFIG_SECTIONS, hidden=upstream_flags.HIDDEN)
def pretrain(
    ctx: typer.Context,
    preset: Preset = None,
    config: ConfigFile = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the resulting options as TOML for --config, and stop."),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Measure a few steps, print what the run will take in memory, time and disk, and stop.",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            help="With --plan: price of all machines, to print what the run will cost.",
            metavar="NUMBER",
            min=0.0,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
    **_: Any,
) -> None:
    """Pretrain a language model."""
    if not plan and (as_json or price_per_hour is not None):
        raise ConfigError("--json and --price-per-hour go with --plan; add it.")
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise ConfigError(f"--price-per-hour {price_per_hour} is no price; write for example 2.50.")
    resolved = read_config(ctx, preset, config)
    if print_config:
        if is_main_process():
            typer.echo(write_toml(resolved, CONFIG_SECTIONS), nl=False)
        return
    if plan:
        _print_plan(resolved, price_per_hour, as_json)
        return
    from minimind.training.pretrain import pretrain as run

    result = run(resolved)
    if result.stopped is not None:
        raise typer.Exit(STOPPED_EARLY)


def _print_plan(config: PretrainConfig, price_per_hour: float | None, as_json: bool) -> None:
    from minimind.planning.plan import plan_run

    found = plan_run(config, price_per_hour=price_per_hour, quiet=as_json)
    if not is_main_process():
        return
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    for key, value in found.rows():
        typer.echo(f"{key + ':' if key else '':<12} {value}")
    for problem in found.problems:
        typer.echo(f"warning: {problem}")
