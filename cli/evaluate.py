"""`minimind-train eval`: evaluate a model on text."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.config.options import PretrainConfig
from minimind.config.schema import FieldInfo, parse_values, read_toml
from minimind.errors import ConfigError
from minimind.formatting import printable
from minimind.io.atomic import write_output
from minimind.launch_env import is_main_process
from minimind.run_folder import find_run

from .options import ModelArgument, ModelTokenizer, parse_settings, with_options

if TYPE_CHECKING:
    from minimind.evaluation.cloze import ClozeScore
    from minimind.evaluation.corpus import Breakdown, CorpusEvaluation
    from minimind.evaluation.tasks import TaskScore
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
            default_text="none",
        ),
    ] = ()
    tasks: Annotated[
        str | None,
        FieldInfo(
            "Score the model on tasks: cloze, cloze_en and cloze_zh are built in, others are of "
            "lm-evaluation-harness (lm-eval).",
            metavar="NAME,...",
        ),
    ] = None
    task_dir: Annotated[
        str | None,
        FieldInfo("Folder of tasks (YAML) for lm-evaluation-harness, besides its own.", metavar="FOLDER"),
    ] = None
    limit: Annotated[
        int | None,
        FieldInfo("Items of each task of lm-evaluation-harness.", minimum=1, default_text="all"),
    ] = None
    per_document: Annotated[
        str | None,
        FieldInfo("Write the loss of every document of --data to this file (JSONL).", metavar="PATH"),
    ] = None
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
    """Evaluate a model: loss, perplexity and bits per byte on text, and scores on tasks."""
    options = parse_settings(ctx, EvaluationOptions)
    if not options.data and not options.tasks:
        raise ConfigError("--data is missing; give the evaluation data, or --tasks cloze for a score.")
    if options.per_document is not None and not options.data:
        raise ConfigError("--per-document needs --data.")
    length = options.max_seq_len or _run_seq_len(model)
    values: dict[str, Any] = {}
    if options.data:
        result = _evaluate_text(model, options, length)
        values = result.to_dict()
        if is_main_process() and not as_json:
            _print(result)
    if options.tasks:
        from minimind.evaluation.tasks import score_model

        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        with _progress() as progress:
            scores = score_model(
                model, names, max_length=length, tokenizer=options.tokenizer, task_dir=options.task_dir,
                limit=options.limit, progress=progress,
            )  # fmt: skip
        values = {"model": model, **values, "scores": [score.to_dict() for score in scores]}
        if not as_json:
            _print_scores(scores)
    if as_json and is_main_process():
        typer.echo(json.dumps(values, indent=1))


def _evaluate_text(model: str, options: EvaluationOptions, length: int) -> CorpusEvaluation:
    """Evaluate on --data, write --per-document and show the notes."""
    values = dataclasses.asdict(options)
    stride, path = values.pop("stride"), values.pop("per_document")
    for name in ("tasks", "task_dir", "limit"):
        del values[name]
    config = PretrainConfig(**{**values, "max_seq_len": length})
    from minimind.evaluation.corpus import evaluate_text

    with _progress() as progress:
        result = evaluate_text(model, config, stride=stride, per_document=path is not None, progress=progress)
    if is_main_process():
        for note in result.notes:
            typer.echo(f"note: {printable(note)}", err=True)
        if path is not None:
            lines = (json.dumps(document.to_dict(), ensure_ascii=False) for document in result.documents)
            write_output("--per-document", Path(path), "".join(f"{line}\n" for line in lines))
    return result


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


def _print_scores(scores: Sequence[ClozeScore | TaskScore]) -> None:
    for score in scores:
        values = score.to_dict()
        if "chance" in values:
            low, high = values["interval"]
            typer.echo(
                f"{values['task']}  {values['accuracy']:.1%} of {values['items']} items (95% interval "
                f"{low:.1%} to {high:.1%}, chance {values['chance']:.0%})"
            )
        else:
            error = "" if values["stderr"] is None else f" ± {values['stderr']:.4f}"
            typer.echo(f"{printable(values['task'])}  {values['metric']} {values['value']:.4f}{error}")


def _metrics(value: Evaluation) -> tuple[str, str, str]:
    """Return loss, perplexity and bits per byte, a dash for NaN."""
    metrics = (value.loss, ".4f"), (value.perplexity, ".4g"), (value.bits_per_byte, ".4f")
    loss, perplexity, bits_per_byte = (
        "-" if math.isnan(number) else format(number, digits) for number, digits in metrics
    )
    return loss, perplexity, bits_per_byte
