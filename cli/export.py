"""`minimind-train export`: convert a model for other programs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.config.schema import FieldInfo
from minimind.errors import ConfigError
from minimind.formatting import count, parse_size, printable, size

from .options import ModelTokenizer, expand_path, parse_settings, with_options

if TYPE_CHECKING:
    from minimind.formats.export import Exported


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export"""

    format: Annotated[
        Literal["huggingface", "minimind", "gguf"],
        FieldInfo(
            "Qwen3 in safetensors for transformers, vLLM and others; a .pth file of upstream minimind; or "
            "GGUF for llama.cpp and Ollama.",
            synonyms=(("hf", "huggingface"), ("pth", "minimind")),
            plugins="minimind.formats",
        ),
    ] = "huggingface"
    output: Annotated[
        str | None,
        FieldInfo(
            "New folder of the exported model.",
            aliases=("--output-dir",),
            metavar="FOLDER",
            default_text="required",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16", "q8_0"],
        FieldInfo(
            "Data type of the weights; `auto` keeps that of the source for huggingface and uses float16 for "
            "the others. q8_0 (8 bits) is for gguf only.",
            synonyms=(
                *(("f32", "float32"), ("fp32", "float32"), ("f16", "float16"), ("fp16", "float16")),
                *(("bf16", "bfloat16"), ("q8", "q8_0")),
            ),
        ),
    ] = "auto"
    max_shard_size: Annotated[
        str,
        FieldInfo("Maximum size of a safetensors file; larger models are sharded.", metavar="SIZE"),
    ] = "5GB"
    model_config: Annotated[
        str | None,
        FieldInfo(
            "JSON file with the upstream configuration of a .pth file.",
            metavar="PATH",
            default_text="NAME.config.json next to NAME.pth, else inferred from the tensors",
        ),
    ] = None
    tokenizer: ModelTokenizer = None
    overwrite: Annotated[bool, FieldInfo("Overwrite a model in the output folder.")] = False
    push_to_hub: Annotated[
        str | None,
        FieldInfo(
            "Also upload the export to this repository of the Hugging Face Hub, private if it is new.",
            metavar="NAME",
        ),
    ] = None


@with_options(ExportOptions)
def export(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            callback=expand_path,
            help="A run (its newest checkpoint), a checkpoint, a Hugging Face folder, or a .pth file.",
        ),
    ],
    **_: Any,
) -> None:
    """Export a model for other programs, and verify the written files against the source."""
    options = parse_settings(ctx, ExportOptions)
    if options.output is None:
        raise ConfigError("--output is missing; give a new folder for the model.")
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError:
        raise ConfigError(
            f"--max-shard-size {options.max_shard_size} is not a size; write for example 5GB or 500MB."
        ) from None
    from minimind.formats.export import export_model
    from minimind.formats.hub import HubRepository

    repository = None if options.push_to_hub is None else HubRepository(options.push_to_hub)
    exported = export_model(
        source,
        options.output,
        options.format,
        dtype=options.dtype,
        model_config=options.model_config,
        tokenizer=options.tokenizer,
        max_shard_bytes=max_shard_bytes,
        overwrite=options.overwrite,
    )
    for line in _report(exported):
        typer.echo(printable(line))
    if repository is not None:
        typer.echo(f"uploaded {repository.upload(exported.folder)}; fill in the license in its README.md")


def _report(exported: Exported) -> list[str]:
    files = [f"{name} ({size(num_bytes)})" for name, num_bytes in exported.files.items()]
    parts = [
        exported.format,
        exported.dtype,
        f"{count(exported.config.num_parameters())} parameters",
        size(sum(exported.files.values())),
    ]
    return [
        f"read     {exported.source}",
        f"wrote    {exported.folder}: {', '.join(parts)}",
        *(f"         {file}" for file in files),
        "verified re-read and compared with the source, all tensors equal",
        *(f"note     {note}" for note in exported.notes),
        *(f"next     {command}" for command in _next_commands(exported)),
    ]


def _next_commands(exported: Exported) -> list[str]:
    """Return commands that try the exported model."""
    folder = shlex.quote(str(exported.folder))
    largest = max(exported.files, key=exported.files.__getitem__)
    file = shlex.quote(str(exported.folder / largest))
    if exported.format == "gguf":
        return [f"llama-completion -m {file} -p 'Once upon a time' -n 64 -no-cnv"]
    if exported.format == "minimind":
        from minimind.formats.original_minimind import unset_by_commands

        config = exported.config
        if any(unset_by_commands(config)):
            return []  # a note explains how to load it
        tokenizer = f"cp {folder}/tokenizer*.json minimind/model/ && "
        return [
            f"cp {file} minimind/out/ && {tokenizer if 'tokenizer.json' in exported.files else ''}"
            "cd minimind && python eval_llm.py --weight pretrain --hidden_size "
            f"{config.hidden_size} --num_hidden_layers {config.num_hidden_layers}"
            + (" --use_moe 1" if config.use_moe else "")
        ]
    if exported.format != "huggingface" or "tokenizer.json" not in exported.files:
        return []  # the programs below need a tokenizer
    call = f"pipeline('text-generation', {str(exported.folder)!r})('Once upon a time')"
    return [f'python -c "from transformers import pipeline; print({call})"', f"vllm serve {folder}"]
