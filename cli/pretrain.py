"""`minimind-train pretrain`: a configuration from flags, a file and a preset; then one library call."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import typer

from minimind.config import PANELS, PretrainConfig
from minimind.presets import PRESETS, SHAPE_OPTIONS, default_preset, size_text
from minimind.settings import write_toml

from . import upstream_flags
from .options import is_main_process, parse_config, typed_values, with_options

_PRESETS = ", ".join(f"{name} ({size_text(name)})" for name in PRESETS)


@with_options(*PANELS, hidden=upstream_flags.HIDDEN)
def pretrain(
    ctx: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Defaults for a size of model: {_PRESETS}.",
            metavar="NAME",
            show_default="tiny without a GPU, if nothing sets the size",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="A TOML file of options; it overrides the preset, and flags override it.", metavar="PATH"
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", metavar="", help="Print the resulting options as TOML for --config, and stop."
        ),
    ] = False,
    **_: Any,
) -> None:
    """Pretrain a language model."""
    resolved = _read_config(ctx, preset, config)
    if print_config:
        typer.echo(write_toml(resolved, PANELS), nl=False)
        return
    from minimind.pretrain import pretrain as run

    run(resolved)


def _read_config(ctx: typer.Context, preset: str | None, file: str | None) -> PretrainConfig:
    """Return the configuration asked for; without a GPU or a size of model that of the preset `tiny`."""
    flags, problems = upstream_flags.translate(ctx)
    config = parse_config(ctx, preset=preset, file=file, flags=flags, problems=problems)
    shape_given = bool(preset or file or SHAPE_OPTIONS & typed_values(ctx, PretrainConfig).keys())
    # Asking for a GPU loads torch, which takes seconds: only where the answer matters.
    default = default_preset(shape_given, has_gpu=shape_given or _has_gpu())
    if default is not None:
        if is_main_process():
            note = (
                f"No GPU found: training the preset '{default}'; choose another by --preset or --hidden-size."
            )
            typer.echo(note, err=True)
        config = parse_config(ctx, preset=default, flags=flags)
    if ctx.params["use_wandb"] and "wandb" not in config.tracker:
        config = dataclasses.replace(config, tracker=(*config.tracker, "wandb"))
    return config


def _has_gpu() -> bool:
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
