"""`minimind-train pretrain`: a configuration from flags, a file and a preset; then one library call."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.config import PANELS, PretrainConfig
from minimind.errors import ConfigError
from minimind.launch_environment import is_main_process, is_set
from minimind.presets import PRESETS, SHAPE_OPTIONS, default_preset, size_text
from minimind.run_folder import RunFolder
from minimind.settings import write_toml

from . import upstream_flags
from .options import completing, parse_config, typed_values, with_options

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command may be given again, with --resume.
STOPPED_EARLY = 75

_PRESETS = ", ".join(f"{name} ({size_text(name)})" for name in PRESETS)

DEFAULT_PRESET_NOTE = "[default: tiny without a GPU, if nothing sets the size]"

Preset = Annotated[
    str | None,
    typer.Option(
        help=f"Defaults for a size of model: {_PRESETS}. {DEFAULT_PRESET_NOTE}",
        metavar="NAME",
        autocompletion=completing(*PRESETS),
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        help="A TOML file of options; it overrides the preset, and flags override it.", metavar="PATH"
    ),
]


@with_options(*PANELS, hidden=upstream_flags.HIDDEN)
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
            typer.echo(write_toml(resolved, PANELS), nl=False)
        return
    if plan:
        _print_plan(resolved, price_per_hour, as_json)
        return
    from minimind.pretrain import pretrain as run

    result = run(resolved)
    if result.stopped is not None:
        raise typer.Exit(STOPPED_EARLY)


def _print_plan(config: PretrainConfig, price_per_hour: float | None, as_json: bool) -> None:
    from minimind.planning import plan_run

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


def read_config(ctx: typer.Context, preset: str | None, file: str | None) -> PretrainConfig:
    """Return the configuration asked for.

    Where neither a preset nor a file is named, a resumed run keeps the options that it began with, and a run
    without a GPU or a size of model is that of the preset `tiny`.
    """
    flags, problems, remarks = upstream_flags.translate(ctx)
    typed = {**flags, **typed_values(ctx, PretrainConfig)}
    if not preset and not file and (file := _options_to_resume(typed)) is not None:
        _note(f"Going on with the options of {file}; flags override them.")
    config = parse_config(ctx, preset=preset, file=file, flags=flags, problems=problems)
    for remark in remarks:
        _note(remark)
    shape_given = bool(preset or file or SHAPE_OPTIONS & typed.keys())
    # Asking for a GPU loads torch, which takes seconds: only where the answer matters.
    default = default_preset(shape_given, has_gpu=shape_given or has_gpu())
    if default is not None:
        _note(f"No GPU found: training the preset '{default}'; choose another by --preset or --hidden-size.")
        config = parse_config(ctx, preset=default, flags=flags)
    if ctx.params["use_wandb"] and "wandb" not in config.tracker:
        config = dataclasses.replace(config, tracker=(*config.tracker, "wandb"))
    return config


def _options_to_resume(typed: Mapping[str, Any]) -> str | None:
    """Return the file with the options of the run that is to go on, None where there is none."""
    if not typed.get("resume"):
        return None
    file = RunFolder(Path(typed.get("output_dir", PretrainConfig.output_dir))).config
    return str(file) if file.is_file() else None


def _note(text: str) -> None:
    if is_main_process():
        typer.echo(text, err=True)


def has_gpu() -> bool:
    """Whether a run here would train on a GPU; loads torch."""
    if is_set("ACCELERATE_USE_CPU"):
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
