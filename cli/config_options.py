"""--preset and --config, and how they combine with the options of a run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Annotated

import typer

from minimind.checkpoint.resume import run_to_resume
from minimind.config.budget import BUDGET_OPTIONS
from minimind.config.options import PretrainConfig
from minimind.config.presets import PRESETS, SHAPE_OPTIONS, default_preset, size_text
from minimind.formatting import printable
from minimind.launch_env import device_type, is_main_process

from . import upstream_flags
from .options import completing, expand_path, parse_config, typed_values

_PRESETS = ", ".join(f"{name} ({size_text(name)})" for name in PRESETS)
_DEFAULT_PRESET = "[default: tiny without a GPU, unless the model size is set]"

Preset = Annotated[
    str | None,
    typer.Option(
        help=f"Named configuration: {_PRESETS}. {_DEFAULT_PRESET}",
        metavar="NAME",
        autocompletion=completing(*PRESETS),
    ),
]

# Of a run without options. What FLOPs reach does not depend on how busy a CPU is.
DEFAULT_BUDGETS = {"CPU": "18e12 FLOPs", "GPU": "60s"}
# A run with one of these is not the default one.
_CHOOSES_A_RUN = frozenset({"data", "max_steps", "max_tokens", "max_time", *BUDGET_OPTIONS})

ConfigFile = Annotated[
    str | None,
    typer.Option(
        help="TOML file of options; overrides the preset, and is overridden by options typed here.",
        metavar="PATH",
        callback=expand_path,
    ),
]


def read_config(
    ctx: typer.Context, preset: str | None, file: str | None, *, default_budget: bool = False
) -> PretrainConfig:
    """Return the configuration of a command line.

    Without --preset and --config, a resumed run keeps its options, and a run without a GPU or a model size
    uses the preset `tiny`.

    Args:
        default_budget: a run without a model size, data or a limit has a budget, which chooses the rest.
    """
    flags, problems, notes = upstream_flags.translate(ctx)
    typed = {**flags, **typed_values(ctx)}
    if typed.get("resume") and not preset and not file:
        output_dir = typed.get("output_dir")
        run = run_to_resume(
            typed["resume"], output_dir, complete=bool({"data", *SHAPE_OPTIONS} & typed.keys())
        )
        file = None if run.config is None else str(run.config)
        if run.output_dir is not None:
            flags = {**flags, "output_dir": run.output_dir}
        if run.note is not None:
            _print_note(run.note)
    config = parse_config(ctx, preset=preset, file=file, flags=flags, problems=problems)
    for note in notes:
        _print_note(note)
    shape_given = bool(preset or file or config.budget or SHAPE_OPTIONS & typed.keys())
    # Looking for a GPU loads torch, which takes seconds.
    gpu = shape_given or has_gpu()
    if default_budget and not shape_given and not _CHOOSES_A_RUN & typed.keys():
        budget = DEFAULT_BUDGETS["GPU" if gpu else "CPU"]
        note = f"Training on the built-in text with --budget {shlex.quote(budget)}; --data trains on yours."
        _print_note(note)
        config = parse_config(ctx, flags={**flags, "budget": budget})
    elif (default := default_preset(shape_given, has_gpu=gpu)) is not None:
        _print_note(f"No GPU found: using --preset {default}; --preset or --hidden-size choose another size.")
        config = parse_config(ctx, preset=default, flags=flags)
    if ctx.params["use_wandb"] and "wandb" not in config.tracker:
        config = dataclasses.replace(config, tracker=(*config.tracker, "wandb"))
    return config


def _print_note(text: str) -> None:
    if is_main_process():
        typer.echo(printable(text), err=True)


def has_gpu() -> bool:
    """Return whether a run here would train on a GPU; loads torch."""
    return device_type() != "cpu"
