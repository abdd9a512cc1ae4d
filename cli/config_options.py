"""The options that commands with a training configuration share: --preset, --config, and how they combine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from minimind.checkpoint.resume import run_to_resume
from minimind.config.options import PretrainConfig
from minimind.config.presets import PRESETS, SHAPE_OPTIONS, default_preset, size_text
from minimind.launch_env import is_main_process, is_set

from . import upstream_flags
from .options import completing, parse_config, typed_values

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


def read_config(ctx: typer.Context, preset: str | None, file: str | None) -> PretrainConfig:
    """Return the configuration asked for.

    Where neither a preset nor a file is named, a resumed run keeps the options that it began with, and a run
    without a GPU or a size of model is that of the preset `tiny`.
    """
    flags, problems, remarks = upstream_flags.translate(ctx)
    typed = {**flags, **typed_values(ctx, PretrainConfig)}
    if typed.get("resume") and not preset and not file:
        output_dir = typed.get("output_dir")
        run = run_to_resume(
            typed["resume"], output_dir, complete=bool({"data", *SHAPE_OPTIONS} & typed.keys())
        )
        file = None if run.config is None else str(run.config)
        if run.output_dir is not None:
            flags = {**flags, "output_dir": run.output_dir}
        if run.note is not None:
            _note(run.note)
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


def _note(text: str) -> None:
    if is_main_process():
        typer.echo(text, err=True)


def has_gpu() -> bool:
    """Whether a run here would train on a GPU; loads torch."""
    if is_set("ACCELERATE_USE_CPU"):
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
