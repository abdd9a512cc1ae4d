"""`minimind-train tokenize` and `minimind-train tokenizer`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minimind.config.data_options import DataConfig
from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError
from minimind.formatting import printable

from .examples import examples
from .help import HelpCommand, HelpGroup
from .options import LENIENT, expand_path, parse_config, parse_settings, with_options

app = typer.Typer(cls=HelpGroup, help="Train or inspect a tokenizer.", epilog=examples("tokenizer"))


@with_options(DataConfig)
def tokenize(
    ctx: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="TOML file of options.", metavar="PATH", callback=expand_path)
    ] = None,
    **_: Any,
) -> None:
    """Tokenize training data into the cache, and report on it."""
    resolved = parse_config(ctx, file=config)
    from minimind.data.prepare import prepare_data
    from minimind.tokenizer import load_tokenizer
    from minimind.tracking.console import Progress

    with closing(Progress(0, enabled=True, stream=sys.stderr)) as progress:
        tokenizer = load_tokenizer(resolved.tokenizer)
        prepared = prepare_data(resolved, tokenizer, progress=progress.data_build)
    typer.echo("tokenized" if prepared.built else "found in the cache")
    for line in prepared.report.lines():
        typer.echo(printable(line))


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Tokenizer"""

    output_dir: Annotated[str, FieldInfo("Folder of the new tokenizer.", metavar="FOLDER")] = "tokenizer"
    vocab_size: Annotated[int, FieldInfo("Vocabulary size, including special tokens.", minimum=1)] = 6400
    data: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Training data: a .jsonl(.gz), .txt or .parquet file, a folder or a glob. Repeatable.",
            aliases=("--data-path",),
            metavar="PATH",
            default_text="the documentation built into Python",
        ),
    ] = ()
    text_key: Annotated[str, FieldInfo("JSONL key or Parquet column of the text.")] = "text"
    bad_lines: Annotated[
        Literal["error", "skip"], FieldInfo("Stop at an invalid line, or skip and count it.")
    ] = "error"


@app.command(cls=HelpCommand, context_settings=LENIENT, epilog=examples("tokenizer train"))
@with_options(TokenizerOptions)
def train(ctx: typer.Context, **_: Any) -> None:
    """Train a tokenizer and save it in Hugging Face format."""
    options = parse_settings(ctx, TokenizerOptions)
    folder = Path(options.output_dir)
    if (folder / "tokenizer.json").exists():
        raise ConfigError(f"--output-dir {folder} already holds a tokenizer; choose another folder.")
    from rich.console import Console
    from rich.progress import Progress

    from minimind.tokenizer import train_tokenizer

    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    task = bar.add_task("reading", total=None)

    def documents() -> Iterator[str]:
        yield from _documents(options, lambda done, total: bar.update(task, completed=done, total=total))
        # The duration of learning the merges is unknown.
        bar.update(task, description="learning merges", total=None)

    with bar:
        tokenizer = train_tokenizer(documents(), options.vocab_size)
    tokenizer.save(folder)
    typer.echo(printable(f"{tokenizer.vocab_size} tokens in {folder}; use it with --tokenizer {folder}"))


@app.command(cls=HelpCommand, epilog=examples("tokenizer inspect"))
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            help="A tokenizer.json or its folder; by default the built-in tokenizer.",
            metavar="[PATH]",
            callback=expand_path,
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to tokenize.", metavar="TEXT")] = None,
) -> None:
    """Show a tokenizer's vocabulary and special tokens, and tokenize a sample."""
    from minimind.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    typer.echo(f"vocabulary   {tokenizer.vocab_size}")
    for role in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        text_of_token = printable(tokenizer.decode([token], skip_special_tokens=False))
        typer.echo(f"{role}          {token} {text_of_token}")
    typer.echo(f"fingerprint  {tokenizer.fingerprint}")
    if text:
        ids = tokenizer.encode(text)
        size = len(text.encode("utf-8", "replace"))
        for token in ids:
            typer.echo(f"{token:>8}  {tokenizer.decode([token])!r}")
        typer.echo(f"{len(ids)} tokens, {size} bytes, {size / len(ids):.2f} bytes per token")


def _documents(options: TokenizerOptions, show: Callable[[int, int], None]) -> Iterator[str]:
    """Yield the documents, and report the bytes read."""
    from minimind.data.builtin_corpus import builtin_documents
    from minimind.data.files import find_files
    from minimind.data.readers import Reading, TextFile

    if not options.data:
        yield from builtin_documents()
        return
    files = find_files(options.data, "--data")
    total, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        reading = Reading()
        source = TextFile(file, "--data", options.text_key, options.bad_lines)
        for document in source.documents(reading):
            show(before + reading.done_bytes, total)
            yield document
        before += file.stat().st_size
