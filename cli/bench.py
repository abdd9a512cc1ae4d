"""`minimind-train bench`: measure training speed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from minimind.config.options import CONFIG_SECTIONS
from minimind.config.presets import SHAPE_OPTIONS, default_preset
from minimind.launch_env import is_main_process

from .config_options import ConfigFile, Preset, has_gpu
from .options import parse_config, typed_values, with_options


@with_options(*CONFIG_SECTIONS)
def bench(
    ctx: typer.Context,
    preset: Preset = None,
    config: ConfigFile = None,
    seconds: Annotated[
        float, typer.Option(help="Duration of the measurement.", metavar="NUMBER", min=0.1)
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **_: Any,
) -> None:
    """Measure training speed on random tokens, with the options of pretrain; write nothing."""
    resolved = parse_config(ctx, preset=preset, file=config)
    shape_given = bool(preset or config or SHAPE_OPTIONS & typed_values(ctx).keys())
    default = default_preset(shape_given, has_gpu=shape_given or has_gpu())
    if default is not None:
        resolved = parse_config(ctx, preset=default)
    from minimind.planning.benchmark import benchmark

    result = benchmark(resolved, seconds)
    if not is_main_process():
        return
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=1))
        return
    for key, value in result.rows():
        typer.echo(f"{key + ':':<8} {value}")
