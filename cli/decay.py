"""`minimind-train decay`: a finished model from the stable phase of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError

from .options import parse_settings, with_options
from .pretrain import STOPPED_EARLY


@dataclass(frozen=True, kw_only=True)
class DecayOptions:
    """Decay"""

    tokens: Annotated[
        int | None,
        FieldInfo(
            "Tokens to decay over, such as 1e8; rounded up to steps.", minimum=1, default_text="required"
        ),
    ] = None
    from_step: Annotated[
        int | None,
        FieldInfo("Steps done at the checkpoint to start from.", minimum=1, default_text="the newest"),
    ] = None
    decay_shape: Annotated[
        Literal["linear", "sqrt"],
        FieldInfo("How the learning rate falls: a straight line, or 1 - sqrt of the way."),
    ] = "linear"
    min_lr_ratio: Annotated[
        float | None,
        FieldInfo(
            "Final learning rate as a share of the peak.",
            minimum=0.0,
            maximum=1.0,
            default_text="that of the run",
        ),
    ] = None
    output_dir: Annotated[
        str | None,
        FieldInfo("Folder of the decay.", metavar="FOLDER", default_text="beside the run: RUN-decay-STEP"),
    ] = None


@with_options(DecayOptions)
def decay(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of the run.")],
    **_: Any,
) -> None:
    """Finish a model from a checkpoint of a wsd or constant run, which stays as it is.

    The learning rate falls while the data of the run goes on, in a folder of its own.

    A decay that was stopped goes on by pretrain --resume --output-dir FOLDER.
    """
    options = parse_settings(ctx, DecayOptions)
    if options.tokens is None:
        raise ConfigError("--tokens is missing; say for how many tokens to decay, for example --tokens 1e8.")
    from minimind.runs.decay import decay as run_decay

    result = run_decay(
        run,
        options.tokens,
        from_step=options.from_step,
        output_dir=None if options.output_dir is None else Path(options.output_dir),
        shape=options.decay_shape,
        min_lr_ratio=options.min_lr_ratio,
    )
    if result.stopped is not None:
        raise typer.Exit(STOPPED_EARLY)
