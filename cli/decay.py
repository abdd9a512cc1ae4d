"""`minimind-train decay`: anneal the learning rate from a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError

from .options import expand_path, parse_settings, with_options
from .pretrain import STOPPED_EARLY


@dataclass(frozen=True, kw_only=True)
class DecayOptions:
    """Decay"""

    tokens: Annotated[
        int | None,
        FieldInfo(
            "Length of the decay in tokens, such as 1e8; rounded up to steps.",
            minimum=1,
            default_text="required",
        ),
    ] = None
    from_step: Annotated[
        int | None,
        FieldInfo("Step of the checkpoint to start from.", minimum=1, default_text="the newest"),
    ] = None
    decay_shape: Annotated[
        Literal["linear", "sqrt"],
        FieldInfo("Decay curve: linear, or 1 - sqrt(progress)."),
    ] = "linear"
    min_lr_ratio: Annotated[
        float | None,
        FieldInfo(
            "Final learning rate as a fraction of the peak.",
            minimum=0.0,
            maximum=1.0,
            default_text="that of the run",
        ),
    ] = None
    output_dir: Annotated[
        str | None,
        FieldInfo(
            "Output folder of the new run.", metavar="FOLDER", default_text="beside the run: RUN-decay-STEP"
        ),
    ] = None


@with_options(DecayOptions)
def decay(
    ctx: typer.Context,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a wsd or constant run.", callback=expand_path)
    ],
    **_: Any,
) -> None:
    """Anneal: decay the learning rate from a checkpoint of a WSD/constant run into a new run.

    The new run continues with the data after the checkpoint; the original run is not changed.

    A stopped decay is resumed by pretrain --resume with its --output-dir.
    """
    options = parse_settings(ctx, DecayOptions)
    if options.tokens is None:
        raise ConfigError("--tokens is missing; give the length of the decay, for example --tokens 1e8.")
    from minimind.runs.decay import decay as run_decay

    result = run_decay(
        run,
        options.tokens,
        from_step=options.from_step,
        output_dir=None if options.output_dir is None else Path(options.output_dir),
        shape=options.decay_shape,
        min_lr_ratio=options.min_lr_ratio,
        quiet=False,
        handle_signals=True,
    )
    if result.stopped is not None:
        raise typer.Exit(STOPPED_EARLY)
