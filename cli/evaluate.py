"""`minimind-train eval`: evaluate a model on text."""

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

from minimind.config.options import PretrainConfig
from minimind.config.schema import FieldInfo, parse_values, read_toml
from minimind.errors import ConfigError
from minimind.formatting import printable
from minimind.launch_env import is_main_process
from minimind.run_folder import find_run

from .options import ModelArgument, ModelTokenizer, parse_settings, with_options

if TYPE_CHECKING:
    from minimind.evaluation.corpus import Breakdown, CorpusEvaluation
    from minimind.evaluation.validation import Evaluation

# Minimum width of a table, in columns.
_MIN_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation"""

    data: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Evaluation data: a .jsonl(.gz), .txt or .parquet file, a folder or a glob. Repeatable.",
            aliases=("--data-path",),
            metavar="PATH",
            default_text="required",
        ),
    ] = ()
    tokenizer: ModelTokenizer = None
    max_seq_len: Annotated[
        int | None,
        FieldInfo("Sequence length in tokens.", minimum=2, default_text="that of the run, else 512"),
    ] = None
    packing: Annotated[
        bool,
        FieldInfo(
            "Concatenate documents as in training; off: each document starts a sequence, without truncation."
        ),
    ] = True
    stride: Annotated[
        int | None,
        FieldInfo(
            "Without packing: step between the sequences of a long document; overlapping tokens are context.",
            minimum=1,
            default_text="the sequence length: no overlap",
        ),
    ] = None
    batch_size: Annotated[int, FieldInfo("Sequences per device per forward pass.", minimum=1)] = 8
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"],
        FieldInfo(
            "Precision of matrix multiplications; `auto` uses bf16 where the GPU supports it.",
            aliases=("--dtype",),
            synonyms=(("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "no")),
        ),
    ] = "no"
    text_key: Annotated[str, FieldInfo("JSONL key or Parquet column of the text.")] = "text"
    bad_lines: Annotated[
        Literal["error", "skip"], FieldInfo("Stop at an invalid line, or skip and count it.")
    ] = "error"
    cache_dir: Annotated[
        str | None,
        FieldInfo("Folder of the token cache.", metavar="FOLDER", default_text="~/.cache/minimind"),
    ] = None


@with_options(EvaluationOptions)
def evaluate(
    ctx: typer.Context,
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **_: Any,
) -> None:
    """Evaluate a model on text: loss, perplexity and bits per byte."""
    options = parse_settings(ctx, EvaluationOptions)
    if not options.data:
        raise ConfigError("--data is missing; give the evaluation data.")
    values = dataclasses.asdict(options)
    stride = values.pop("stride")
    values["max_seq_len"] = options.max_seq_len or _run_seq_len(model)
    config = PretrainConfig(**values)
    from minimind.evaluation.corpus import evaluate_text

    with _progress() as progress:
        result = evaluate_text(model, config, stride=stride, progress=progress)
    if not is_main_process():
        return
    for note in result.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        _print(result)


def _run_seq_len(model: str) -> int:
    """Return the sequence length of the run that a model belongs to, else the default.

    The loss of the same weights must not depend on their path: RUN, RUN/model or RUN/checkpoints/X.
    """
    file = find_run(Path(model)).config
    length = read_toml(file).get("max_seq_len") if file.is_file() else None
    values, problems = parse_values(
        PretrainConfig, {} if length is None else {"max_seq_len": length}, str(file)
    )
    if problems:
        raise ConfigError(problems)
    return int(values.get("max_seq_len", PretrainConfig.max_seq_len))


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    shown = is_main_process() and sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), disable=not shown, transient=True)
    task = bar.add_task("evaluating", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(result: CorpusEvaluation) -> None:
    total = result.total
    typer.echo(f"model  {printable(result.model)}")
    typer.echo(f"sequences of up to {result.max_seq_len:,} tokens")
    loss, perplexity, bits_per_byte = _metrics(total)
    typer.echo(f"loss {loss} | perplexity {perplexity} | {bits_per_byte} bits/byte | {total.tokens:,} tokens")
    rows: list[tuple[str, Breakdown]] = []
    for source in result.sources:
        rows.append((source.name, source))
        if len(source.files) > 1:
            rows += [(f"  {file.name}", file) for file in source.files]
    if len(rows) > 1:
        _print_table("source", rows)
    _print_table("context", [(part.name, part) for part in result.contexts])


def _print_table(heading: str, rows: Iterable[tuple[str, Breakdown]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for name in ("tokens", "loss", "perplexity", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, part in rows:
        # As Text, because rich would interpret brackets of a glob.
        table.add_row(Text(printable(name)), f"{part.evaluation.tokens:,}", *_metrics(part.evaluation))
    typer.echo()
    console = Console()
    # rich would drop the names on a narrow terminal.
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)


def _metrics(value: Evaluation) -> tuple[str, str, str]:
    """Return loss, perplexity and bits per byte, a dash for NaN."""
    metrics = (value.loss, ".4f"), (value.perplexity, ".4g"), (value.bits_per_byte, ".4f")
    loss, perplexity, bits_per_byte = (
        "-" if math.isnan(number) else format(number, digits) for number, digits in metrics
    )
    return loss, perplexity, bits_per_byte
