"""Export a model to another format, and verify the files before they are published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.entry_points import plugin_names
from ..errors import ConfigError, UserError
from ..io.atomic import new_folder
from ..io.checksums import write_checksums
from ..io.reading import read_json
from ..modeling.config import MiniMindConfig
from ..modeling.transformers_config import TransformersConfig
from ..tokenizer import Tokenizer, check_vocab, load_tokenizer
from . import gguf, huggingface, original_minimind
from .model_card import CARD, model_card
from .open_model import ModelSource, open_model
from .plugins import GROUP, load_format
from .transformers_folder import write_model

FORMATS = ("huggingface", "minimind", "gguf")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        source: kind and path of the model that was read.
        folder: output folder.
        format: one of `FORMATS`, or that of another package.
        dtype: precision of the matrices.
        config: sizes and special token ids of the model.
        files: size in bytes of each file, by name.
        notes: sentences about defaults and assumptions.
    """

    source: str
    folder: Path
    format: str
    dtype: str
    config: MiniMindConfig
    files: Mapping[str, int]
    notes: tuple[str, ...]


def export_model(
    source: str | Path,
    output: str | Path,
    format: str = "huggingface",
    *,
    dtype: str = "auto",
    model_config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int | None = 5_000_000_000,
    overwrite: bool = False,
) -> Exported:
    """Export a model, re-read the files and compare them with the source.

    Args:
        source: a run folder (its newest checkpoint), a checkpoint, a Hugging Face folder, or a `.pth` of the
            original minimind; see `open_model`.
        output: a new folder; it is renamed into place after everything in it has been verified.
        format: `huggingface` (safetensors of a Qwen3 or Qwen3-MoE), `minimind` (the original's `.pth`), or
            `gguf`; or one that another package registers, see `WeightFormat`.
        dtype: float32, float16, bfloat16 or (gguf only) q8_0. `auto` keeps the source's precision,
            but is float16 for minimind and gguf.
        model_config: JSON configuration of a `.pth`, with the original's keys.
        tokenizer: a `tokenizer.json` or its folder, instead of the source's tokenizer.
        max_shard_bytes: size limit of one safetensors file; None writes a single file.
        overwrite: replace an existing model at `output`.

    Raises:
        UserError: for an unusable source, model configuration, tokenizer or output folder.
    """
    output = Path(output)
    known = FORMATS if format in FORMATS else (*FORMATS, *plugin_names(GROUP))
    if format not in known:
        raise ConfigError(f"--format {format} is not known; choose {', '.join(known)}.")
    custom = None if format in FORMATS else load_format(format)
    if dtype not in ("auto", *gguf.DTYPES):
        raise ConfigError(f"--dtype {dtype} is not known; choose auto, {', '.join(gguf.DTYPES)}.")
    if dtype == "q8_0" and format != "gguf":
        raise ConfigError("--dtype q8_0 is for --format gguf; choose float32, float16 or bfloat16.")
    found = open_model(source, model_config)
    if isinstance(found.config, TransformersConfig) and format in ("gguf", "minimind"):
        raise ConfigError(
            f"--format {format} writes models of minimind, not a {found.config.architecture}; export it to "
            "huggingface, and convert that folder by convert_hf_to_gguf.py of llama.cpp."
        )
    if output.resolve() == found.path.resolve():
        raise ConfigError(f"--output {output} is where the model is read from; name another folder.")
    with new_folder(output, "--output", overwrite=overwrite) as folder:
        config, chosen = _with_tokenizer(found, tokenizer)
        weights = found.weights()
        if dtype == "auto":
            dtype = "float16" if format in ("minimind", "gguf") else _stored_dtype(weights)
        notes = [*found.notes, *_notes(format, config, chosen)]
        if custom is not None:
            custom.save(weights, config, chosen, folder, getattr(torch, dtype))
            _refuse(_differing(weights, custom.load(folder), getattr(torch, dtype)))
        elif format == "gguf":
            _write_gguf(folder, weights, config, chosen, dtype, output.resolve().name)
        elif format == "minimind":
            _write_original(folder, weights, config, getattr(torch, dtype))
        elif isinstance(config, TransformersConfig):
            _write_of_transformers(folder, weights, config, getattr(torch, dtype), max_shard_bytes, tokenizer)
            if (card := found.card()) is not None:
                (folder / CARD).write_text(card, encoding="utf-8")
        else:
            kept = _token_settings(found, config, replaced=tokenizer is not None)
            _write_huggingface(folder, weights, config, getattr(torch, dtype), max_shard_bytes, kept)
            (folder / CARD).write_text(found.card() or model_card(config), encoding="utf-8")
        of_source = tokenizer is None and isinstance(config, TransformersConfig)
        if chosen is not None and format != "gguf" and not of_source:
            chosen.save(folder, model_max_length=config.max_position_embeddings)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(f"{found.what} ({found.path})", output, format, dtype, config, files, tuple(notes))


def _with_tokenizer(found: ModelSource, named: str | Path | None) -> tuple[MiniMindConfig, Tokenizer | None]:
    """Return the tokenizer to export, and the config with its special token ids."""
    tokenizer = found.tokenizer() if named is None else load_tokenizer(named)
    config = found.config
    if tokenizer is None:
        return config, None
    check_vocab(tokenizer, config.vocab_size, str(found.path))
    if named is not None:
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        bos = eos if bos is None else bos
        config = dataclasses.replace(config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    return config, tokenizer


def _token_settings(
    found: ModelSource, config: MiniMindConfig, *, replaced: bool
) -> dict[str, Mapping[str, Any]]:
    """Return the token settings to write, with the ids of `config` where the tokenizer was `replaced`."""
    if not replaced:
        return dict(found.token_settings)
    ids = {name: getattr(config, name) for name in huggingface.TOKEN_IDS}
    return {name: {**settings, **ids} for name, settings in found.token_settings.items()}


def _stored_dtype(weights: Mapping[str, Tensor]) -> str:
    """Return the common dtype of the weights; float32 where they differ or are float64."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return "float32" if common == torch.float64 else str(common).removeprefix("torch.")


def _notes(format: str, config: MiniMindConfig, tokenizer: Tokenizer | None) -> list[str]:
    notes = []
    if tokenizer is None and format != "minimind":
        notes.append("this model has no tokenizer, so none is written; name one by --tokenizer.")
    if format == "minimind" and (others := list(original_minimind.unset_by_commands(config))):
        notes.append(
            f"upstream's CLI cannot build this model ({', '.join(others)}); load it with "
            "MiniMindConfig(**json) from the .config.json."
        )
    return notes


def _write_huggingface(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: MiniMindConfig,
    dtype: torch.dtype,
    max_shard_bytes: int | None,
    token_settings: Mapping[str, Mapping[str, Any]],
) -> None:
    huggingface.save_weights(weights, config, folder, dtype, max_shard_bytes=max_shard_bytes)
    for name, settings in token_settings.items():
        written = read_json(folder / name) if name == huggingface.CONFIG else {}
        (folder / name).write_text(json.dumps({**written, **settings}, indent=2) + "\n", encoding="utf-8")
    write_checksums(folder)
    back = huggingface.load_config(folder)
    _refuse([] if back == config else [huggingface.CONFIG])
    _refuse(_differing(weights, huggingface.load_weights(folder, back), dtype))


def _write_of_transformers(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: TransformersConfig,
    dtype: torch.dtype,
    max_shard_bytes: int | None,
    tokenizer: str | Path | None,
) -> None:
    """Write a model by its class in transformers, with the tokenizer of its source unless one is named."""
    write_model(
        weights, config, folder, dtype, max_shard_bytes=max_shard_bytes, with_tokenizer=tokenizer is None
    )
    write_checksums(folder)
    stored = open_model(folder).load().state_dict()
    stored = {name: stored[name].to(dtype) for name in weights if name in stored}
    _refuse(_differing(weights, stored, dtype))


def _write_original(
    folder: Path, weights: Mapping[str, Tensor], config: MiniMindConfig, dtype: torch.dtype
) -> None:
    path = original_minimind.save_upstream(weights, config, folder, dtype)
    settings = folder / original_minimind.settings_name(path.name)
    back = original_minimind.read_upstream_config(settings)
    # The original has a single built-in YaRN, so only whether it is used is written.
    same = dataclasses.replace(back, rope_scaling=None) == dataclasses.replace(config, rope_scaling=None)
    _refuse([] if same else [settings.name])
    stored = huggingface.check_weights(back, original_minimind.read_upstream_weights(path), str(path))
    _refuse(_differing(weights, stored, dtype))


def _write_gguf(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: MiniMindConfig,
    tokenizer: Tokenizer | None,
    dtype: str,
    name: str,
) -> None:
    if tokenizer is None:
        raise ConfigError(
            "a GGUF file contains the tokenizer, and this model has none; name one with --tokenizer."
        )
    path = folder / f"{name}-{_SHORT.get(dtype, dtype)}.gguf"
    gguf.save_gguf(weights, config, tokenizer, path, dtype, name)
    _refuse(gguf.differences(path, weights, config, tokenizer, dtype, name))


_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def _differing(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Return the names of tensors that differ from the rounded weights in any bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    shared = [name for name in weights if name in stored]
    changed = [name for name in shared if not torch.equal(bits(weights[name].to(dtype)), bits(stored[name]))]
    return [*sorted(weights.keys() ^ stored.keys()), *changed]


def _refuse(differing: list[str]) -> None:
    if differing:
        raise UserError(
            f"verification failed: {', '.join(differing[:3])} did not read back as written; the export was "
            "removed, check disk and memory."
        )
