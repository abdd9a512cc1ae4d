"""`minimind-train generate`: generate text from prompts."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError, UserError
from minimind.formatting import json_line, printable

from .options import ModelArgument, ModelTokenizer, parse_settings, with_options

if TYPE_CHECKING:
    from minimind.generation.engine import Decoder
    from minimind.generation.sampling import Sampling
    from minimind.tokenizer import Tokenizer


# Control characters of text that a terminal may show.
_LAYOUT = "\n\t"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generation"""

    max_new_tokens: Annotated[int, FieldInfo("Maximum number of generated tokens.", minimum=1)] = 256
    temperature: Annotated[float, FieldInfo("Sampling temperature; 0 is greedy decoding.", minimum=0.0)] = 0.8
    top_k: Annotated[
        int | None, FieldInfo("Sample from the K most likely tokens; none samples from all.", minimum=1)
    ] = 50
    top_p: Annotated[
        float,
        FieldInfo(
            "Nucleus sampling: smallest set of tokens with this total probability.", above=0.0, maximum=1.0
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        FieldInfo(
            "Minimum probability of a token, relative to the most likely one.", minimum=0.0, maximum=1.0
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float, FieldInfo("Values above 1 penalize tokens that occurred before.", above=0.0)
    ] = 1.0
    seed: Annotated[
        int | None,
        FieldInfo(
            "Random seed; each further prompt adds 1.", minimum=0, maximum=2**32 - 1, default_text="random"
        ),
    ] = None
    tokenizer: ModelTokenizer = None
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], FieldInfo("Device; `auto` uses a GPU if available.")
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        FieldInfo(
            "Data type of weights and computation.",
            synonyms=(("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")),
        ),
    ] = "float32"
    compile: Annotated[bool, FieldInfo("Compile the decoding step; CUDA GPUs have fused kernels.")] = False


@with_options(GenerateOptions)
def generate(
    ctx: typer.Context,
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Prompts; '' generates from scratch. Without prompts: interactive in a terminal, else read "
            "from standard input.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line and prompt.")
    ] = False,
    **_: Any,
) -> None:
    """Generate text with a trained model."""
    options = parse_settings(ctx, GenerateOptions)
    interactive = not prompts and sys.stdin is not None and sys.stdin.isatty()
    texts = [] if interactive else [_replace_surrogates(prompt) for prompt in prompts or [_standard_input()]]
    # Set before torch is loaded. A token has many short parallel regions: spinning threads slow each other
    # down when another program uses the cores.
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
    printer = _Printer(engine, tokenizer, sampling, options)
    if interactive:
        _prompt_loop(printer, as_json)
    elif as_json:
        printer.print_json(texts)
    elif len(texts) == 1:
        printer.print_streaming(texts[0])
    else:
        printer.print_all(texts)


@dataclass
class _Printer:
    """Generate and print completions."""

    engine: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    options: GenerateOptions

    def print_streaming(self, prompt: str) -> None:
        """Print a prompt and stream its completion."""
        from minimind.generation.text import stream_text

        typer.echo(prompt, nl=False)
        try:
            for piece in stream_text(
                self.engine, self.tokenizer, prompt, self.sampling,
                max_new_tokens=self.options.max_new_tokens, seed=self.options.seed,
            ):  # fmt: skip
                typer.echo(printable(piece, keep=_LAYOUT), nl=False)
                sys.stdout.flush()
        finally:
            typer.echo()

    def print_all(self, prompts: list[str]) -> None:
        """Print the prompts with their completions, separated by empty lines."""
        texts = self._complete(prompts, self.options.seed)
        typer.echo("\n\n".join(text["prompt"] + printable(text["text"], keep=_LAYOUT) for text in texts))

    def print_json(self, prompts: list[str]) -> None:
        """Print one JSON object per line."""
        seed = self.options.seed
        # Printed, so that the output can be reproduced.
        seed = secrets.randbits(32) if seed is None else seed
        for number, text in enumerate(self._complete(prompts, seed)):
            typer.echo(json_line({**text, "seed": seed + number}))

    def _complete(self, prompts: list[str], seed: int | None) -> list[dict[str, Any]]:
        from minimind.generation.text import continue_texts

        texts = continue_texts(
            self.engine, self.tokenizer, prompts, self.sampling,
            max_new_tokens=self.options.max_new_tokens, seed=seed,
        )  # fmt: skip
        return [dataclasses.asdict(text) for text in texts]


def _standard_input() -> str:
    """Return the text of standard input, without a byte order mark; refuse what is not UTF-8."""
    if sys.stdin is None:
        raise ConfigError("there is no standard input; give the prompt after the model.")
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the standard input is not {error.encoding.upper()} text; convert it, for example by iconv."
        ) from error


def _replace_surrogates(prompt: str) -> str:
    """Replace invalid bytes of the command line by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", prompt)


def _prompt_loop(printer: _Printer, as_json: bool) -> None:
    """Read prompts until the end of the input; Ctrl-C stops an output."""
    typer.echo("Type a prompt. Ctrl-C stops the output, Ctrl-D quits.", err=True)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            typer.echo(err=True)
            return
        try:
            if as_json:
                printer.print_json([prompt])
            else:
                printer.print_streaming(prompt)
        except KeyboardInterrupt:
            continue
        except UserError as error:  # such as a prompt that is too long
            typer.echo(f"error: {error}", err=True)
