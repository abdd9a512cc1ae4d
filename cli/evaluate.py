"""`minimind-train eval`: how well a model predicts given text."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from minimind.config.options import PretrainConfig
from minimind.config.schema import FieldInfo, parse_values, read_toml
from minimind.errors import ConfigError
from minimind.formatting import printable
from minimind.launch_env import is_main_process
from minimind.run_folder import find_run

from .options import parse_settings, with_options

if TYPE_CHECKING:
    from minimind.evaluation.corpus import Breakdown, CorpusEvaluation
    from minimind.evaluation.validation import Evaluation

# Columns that a table needs: numbers, and some room for names.
_NARROWEST = 60


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation"""

    data: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Text: a .jsonl(.gz), .txt or .parquet file, a folder or a glob. Repeatable.",
            aliases=("--data-path",),
            metavar="PATH",
            default_text="required",
        ),
    ] = ()
    tokenizer: Annotated[
        str | None,
        FieldInfo(
            "A tokenizer.json, or a folder that holds one.",
            metavar="PATH",
            default_text="the one that belongs to the model",
        ),
    ] = None
    max_seq_len: Annotated[
        int | None,
        FieldInfo("Tokens in one row.", minimum=2, default_text="that of the run, else 512"),
    ] = None
    packing: Annotated[
        bool,
        FieldInfo(
            "Lay documents end to end as in training; off: each document begins a row, and none is cut off."
        ),
    ] = True
    stride: Annotated[
        int | None,
        FieldInfo(
            "Without packing: tokens between two rows of a long document; what they share is context only.",
            minimum=1,
            default_text="the row, so that they share nothing",
        ),
    ] = None
    batch_size: Annotated[int, FieldInfo("Rows that one process computes at once.", minimum=1)] = 8
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"],
        FieldInfo(
            "Precision of the matrix products; auto takes bf16 where the GPU has it.",
            aliases=("--dtype",),
            synonyms=(("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "no")),
        ),
    ] = "no"
    text_key: Annotated[str, FieldInfo("Field of a JSONL object or parquet row that holds the text.")] = (
        "text"
    )
    bad_lines: Annotated[
        Literal["error", "skip"], FieldInfo("Stop at a line that cannot be read, or count it and go on.")
    ] = "error"
    cache_dir: Annotated[
        str | None,
        FieldInfo("Where tokenized text is kept.", metavar="FOLDER", default_text="~/.cache/minimind"),
    ] = None


@with_options(EvaluationOptions)
def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="Folder of a run, a checkpoint, a Hugging Face Qwen3 folder, or a .pth."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **_: Any,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on text."""
    options = parse_settings(ctx, EvaluationOptions)
    if not options.data:
        raise ConfigError("--data is missing; name the text to evaluate the model on.")
    values = dataclasses.asdict(options)
    stride = values.pop("stride")
    values["max_seq_len"] = options.max_seq_len or _length_of_the_run(model)
    config = PretrainConfig(**values)
    from minimind.evaluation.corpus import evaluate_text

    with _progress() as progress:
        found = evaluate_text(model, config, stride=stride, progress=progress)
    if not is_main_process():
        return
    for note in found.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)


def _length_of_the_run(model: str) -> int:
    """Return the sequence length of the run that a model belongs to, the default without a run.

    The loss of the same weights must not depend on their name: RUN, RUN/model or RUN/checkpoints/X.
    """
    file = find_run(Path(model)).config
    found = read_toml(file).get("max_seq_len") if file.is_file() else None
    values, problems = parse_values(
        PretrainConfig, {} if found is None else {"max_seq_len": found}, str(file)
    )
    if problems:
        raise ConfigError(problems)
    return int(values.get("max_seq_len", PretrainConfig.max_seq_len))


@contextmanager
def _progress() -> Iterator[Any]:
    shown = is_main_process() and sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), disable=not shown, transient=True)
    task = bar.add_task("evaluating", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(found: CorpusEvaluation) -> None:
    total = found.total
    typer.echo(f"model  {printable(found.model)}")
    typer.echo(f"sequences of up to {found.max_seq_len:,} tokens")
    loss, perplexity, bits_per_byte = _shown(total)
    typer.echo(f"loss {loss} | perplexity {perplexity} | {bits_per_byte} bits/byte | {total.tokens:,} tokens")
    rows: list[tuple[str, Breakdown]] = []
    for source in found.sources:
        rows.append((source.name, source))
        if len(source.files) > 1:
            rows += [(f"  {file.name}", file) for file in source.files]
    if len(rows) > 1:
        _print_table("source", rows)
    _print_table("context", [(part.name, part) for part in found.contexts])


def _print_table(heading: str, rows: Iterable[tuple[str, Breakdown]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for name in ("tokens", "loss", "perplexity", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, part in rows:
        # Not markup: a pattern may have brackets.
        table.add_row(Text(printable(name)), f"{part.evaluation.tokens:,}", *_shown(part.evaluation))
    typer.echo()
    console = Console()
    # A narrower terminal breaks the lines; rich would leave the names out.
    console.width = max(console.width, _NARROWEST)
    console.print(table)


def _shown(value: Evaluation) -> tuple[str, str, str]:
    """Return loss, perplexity and bits per byte, a dash for what nothing was measured of."""
    measured = (value.loss, ".4f"), (value.perplexity, ".4g"), (value.bits_per_byte, ".4f")
    loss, perplexity, bits_per_byte = (
        "-" if math.isnan(number) else format(number, digits) for number, digits in measured
    )
    return loss, perplexity, bits_per_byte
