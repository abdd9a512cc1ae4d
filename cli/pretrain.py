"""`minimind-train pretrain`: train a model, or plan the run."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.schema import write_toml
from minimind.errors import ConfigError
from minimind.formatting import paint, printable
from minimind.launch_env import is_main_process

from . import upstream_flags
from .config_options import ConfigFile, Preset, read_config
from .options import with_options

if TYPE_CHECKING:  # loads torch
    from minimind.planning.budget_report import BudgetPlan
    from minimind.planning.plan_report import RunPlan
    from minimind.planning.scaled_run import ScaleRequest

# EX_TEMPFAIL of sysexits.h: the run can be resumed with the same command and --resume.
STOPPED_EARLY = 75


@with_options(*CONFIG_SECTIONS, hidden=upstream_flags.HIDDEN)
def pretrain(
    ctx: typer.Context,
    preset: Preset = None,
    config: ConfigFile = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the resulting configuration as TOML and exit."),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Measure a few steps, print the memory, time and disk the run needs, and exit.",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            help="With --plan: price of all machines, to print the cost of the run.",
            metavar="NUMBER",
            min=0.0,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(help="With --plan: also predict the run on this many GPUs.", metavar="N", min=1),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            "--num-machines",
            help="With --num-processes: machines of these GPUs (default: 8 GPUs each).",
            metavar="N",
            min=1,
        ),
    ] = None,
    network_bandwidth: Annotated[
        float | None,
        typer.Option(
            help="With --nodes: Gbit/s of a machine to the others (default: 400 per GPU).",
            metavar="NUMBER",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
    **_: Any,
) -> None:
    """Pretrain a language model."""
    scale = (num_processes, nodes, network_bandwidth)
    if not plan and (as_json or price_per_hour is not None):
        raise ConfigError("--json and --price-per-hour need --plan; add it.")
    if not plan and scale != (None, None, None):
        raise ConfigError(
            "--num-processes, --nodes and --network-bandwidth need --plan; add it, or start a run on N GPUs "
            "with accelerate launch --multi_gpu --num_processes N -m minimind_cli pretrain."
        )
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise ConfigError(f"--price-per-hour {price_per_hour} is not a price; write for example 2.50.")
    resolved = read_config(ctx, preset, config, default_budget=True)
    if print_config:
        if is_main_process():
            typer.echo(write_toml(resolved, CONFIG_SECTIONS), nl=False)
        return
    if plan:
        _print_plan(resolved, price_per_hour, scale, as_json)
        return
    if resolved.budget_chooses:
        from minimind.planning.budget import follow_budget

        resolved = follow_budget(resolved, quiet=False)
    from minimind.training.pretrain import pretrain as run

    result = run(resolved, quiet=False, handle_signals=True)
    if result.stopped is not None:
        raise typer.Exit(STOPPED_EARLY)


def _print_plan(
    config: PretrainConfig,
    price_per_hour: float | None,
    scale: tuple[int | None, int | None, float | None],
    as_json: bool,
) -> None:
    """Print a plan on the main process, as JSON or as lines with the warnings after them."""
    plan: RunPlan | BudgetPlan
    if config.budget_chooses:
        if price_per_hour is not None:
            raise ConfigError('--price-per-hour does not go with --budget; write it as in "$3 at $2.50/h".')
        if scale != (None, None, None):
            raise ConfigError("--num-processes does not go with --budget; give the options of the run.")
        from minimind.planning.budget import plan_budget

        plan = plan_budget(config, quiet=as_json)
    else:
        from minimind.planning.plan import plan_run

        request = _scale_request(*scale)
        plan = plan_run(config, price_per_hour=price_per_hour, scale=request, quiet=as_json)
    if not is_main_process():
        return
    if as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=1))
        return
    for key, value in plan.rows():
        typer.echo(f"{key + ':' if key else '':<12} {printable(value)}")
    for problem in plan.problems:
        typer.echo(f"{paint('warning:', '33', sys.stdout)} {printable(problem)}")


def _scale_request(processes: int | None, nodes: int | None, gbits: float | None) -> ScaleRequest | None:
    """Return the GPUs that a run is predicted on."""
    if processes is None:
        if (nodes, gbits) != (None, None):
            raise ConfigError("--nodes and --network-bandwidth need --num-processes; add it.")
        return None
    if gbits is not None and not 0 < gbits < math.inf:
        raise ConfigError(
            f"--network-bandwidth {gbits:g} is not a bandwidth in Gbit/s; write for example 3200."
        )
    from minimind.planning.scaled_run import ScaleRequest

    return ScaleRequest(processes, nodes, gbits)
