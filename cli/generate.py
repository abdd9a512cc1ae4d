"""`minimind-train generate`: what a model makes of a prompt."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError, UserError
from minimind.formatting import json_line, printable

from .options import parse_settings, with_options

if TYPE_CHECKING:
    from minimind.generation.engine import InferenceEngine
    from minimind.generation.sampling import Sampling
    from minimind.tokenizer import Tokenizer


# Control characters of text that a terminal may show.
_LAYOUT = "\n\t"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generation"""

    max_new_tokens: Annotated[int, FieldInfo("Tokens to write at most.", minimum=1)] = 256
    temperature: Annotated[
        float, FieldInfo("Divides the logits; 0 takes the most likely token.", minimum=0.0)
    ] = 0.8
    top_k: Annotated[
        int | None,
        FieldInfo("Draw among so many of the most likely tokens; none draws among all.", minimum=1),
    ] = 50
    top_p: Annotated[
        float,
        FieldInfo("Draw among the most likely tokens that reach this probability.", above=0.0, maximum=1.0),
    ] = 1.0
    min_p: Annotated[
        float,
        FieldInfo("Draw among tokens at least this share as likely as the best.", minimum=0.0, maximum=1.0),
    ] = 0.0
    repetition_penalty: Annotated[
        float, FieldInfo("Above 1: makes tokens that were there before less likely.", above=0.0)
    ] = 1.0
    seed: Annotated[
        int | None,
        FieldInfo(
            "Seed of the draws; the second prompt has the next one.",
            minimum=0,
            maximum=2**32 - 1,
            default_text="another one each time",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        FieldInfo(
            "A tokenizer.json, or a folder that holds one.",
            metavar="PATH",
            default_text="the one that belongs to the model",
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        FieldInfo("Where to compute; auto takes a GPU if there is one."),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        FieldInfo("Precision.", synonyms=(("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"))),
    ] = "float32"
    compile: Annotated[bool, FieldInfo("Compile the step: for long texts on a GPU.")] = False


@with_options(GenerateOptions)
def generate(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="Folder of a run, a checkpoint, a Hugging Face Qwen3 folder, or a .pth."),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Texts to continue, '' for the beginning of one; without any they are asked for in a "
            "terminal, and else the standard input is one.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line for each prompt.")
    ] = False,
    **_: Any,
) -> None:
    """Continue texts with a trained model."""
    options = parse_settings(ctx, GenerateOptions)
    asks = not prompts and sys.stdin is not None and sys.stdin.isatty()
    texts = [] if asks else [_readable(prompt) for prompt in prompts or [_standard_input()]]
    # Before torch is loaded. Every token has many short parallel parts: threads that spin between them hold
    # each other up, by far, as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from minimind.formats.open_model import load_with_tokenizer
    from minimind.generation.sampling import Sampling
    from minimind.generation.text import make_engine

    names = {field.name for field in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    source, loaded, tokenizer = load_with_tokenizer(model, options.tokenizer)
    for note in source.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    engine = make_engine(loaded, device=options.device, dtype=options.dtype, compiled=options.compile)
    writer = _Writer(engine, tokenizer, sampling, options)
    if asks:
        _ask(writer, as_json)
    elif as_json:
        writer.print_json(texts)
    elif len(texts) == 1:
        writer.print_streaming(texts[0])
    else:
        writer.print_all(texts)


@dataclass
class _Writer:
    """Writes and prints continuations."""

    engine: InferenceEngine
    tokenizer: Tokenizer
    sampling: Sampling
    options: GenerateOptions

    def print_streaming(self, prompt: str) -> None:
        """Print a prompt and what follows it, as it is written."""
        from minimind.generation.text import stream_text

        typer.echo(prompt, nl=False)
        with _whole_line():
            for piece in stream_text(
                self.engine, self.tokenizer, prompt, self.sampling,
                max_new_tokens=self.options.max_new_tokens, seed=self.options.seed,
            ):  # fmt: skip
                typer.echo(printable(piece, keep=_LAYOUT), nl=False)
                sys.stdout.flush()

    def print_all(self, prompts: list[str]) -> None:
        """Print all prompts, each with what follows it, with an empty line between."""
        texts = self._continue(prompts, self.options.seed)
        typer.echo("\n\n".join(text["prompt"] + printable(text["text"], keep=_LAYOUT) for text in texts))

    def print_json(self, prompts: list[str]) -> None:
        """Print one object a line."""
        seed = self.options.seed
        # Told, so that what was drawn can be drawn again.
        seed = secrets.randbits(32) if seed is None else seed
        for number, text in enumerate(self._continue(prompts, seed)):
            typer.echo(json_line({**text, "seed": seed + number}))

    def _continue(self, prompts: list[str], seed: int | None) -> list[dict[str, Any]]:
        from minimind.generation.text import continue_texts

        texts = continue_texts(
            self.engine, self.tokenizer, prompts, self.sampling,
            max_new_tokens=self.options.max_new_tokens, seed=seed,
        )  # fmt: skip
        return [dataclasses.asdict(text) for text in texts]


def _standard_input() -> str:
    """Return the text that a pipe or file holds.

    Raises:
        ConfigError: when there is none, or it is not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("there is no standard input; write the prompt after the model.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the standard input is not {error.encoding.upper()} text; convert it, for example by iconv."
        ) from error


def _readable(prompt: str) -> str:
    """Return a prompt with U+FFFD for bytes of the command line that are no text."""
    return re.sub("[\ud800-\udfff]", "\ufffd", prompt)


def _ask(writer: _Writer, as_json: bool) -> None:
    """Ask for one prompt after another until the end of the input; Ctrl-C ends a text."""
    typer.echo("Type the beginning of a text; Ctrl-C ends what is being written, Ctrl-D all.", err=True)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            typer.echo(err=True)
            return
        try:
            if as_json:
                writer.print_json([prompt])
            else:
                writer.print_streaming(prompt)
        except KeyboardInterrupt:
            continue
        except UserError as error:  # a prompt that is too long; the next may do
            typer.echo(f"error: {error}", err=True)


@contextmanager
def _whole_line() -> Iterator[None]:
    """End the line that was begun, whatever happens."""
    try:
        yield
    finally:
        typer.echo()
