"""A trained model in the files of other programs, read back before they appear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..io.atomic import new_folder
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer, check_vocab, load_tokenizer
from . import gguf
from . import huggingface as qwen3
from . import original_minimind as upstream
from .open_model import ModelSource, open_model

FORMATS = ("huggingface", "minimind", "gguf")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        source: what was read.
        folder: where it lies now.
        format: one of `FORMATS`.
        dtype: of the matrices.
        config: the shape, and the tokens with a role.
        files: bytes of each file by name, the weights among them.
        notes: sentences about what was chosen, assumed or left out.
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
    """Write a model for other programs, and compare what was written with what was read.

    Args:
        source: the folder of a run (its newest checkpoint), a checkpoint, a Hugging Face folder, or a `.pth`
            of the original minimind; see `open_model`.
        output: a new folder; it appears when everything in it is written and compared.
        format: `huggingface` (safetensors of a Qwen3 or Qwen3-MoE), `minimind` (the original's `.pth`), or
            `gguf`.
        dtype: float32, float16, bfloat16 or (gguf only) q8_0. `auto` keeps that of the source for
            huggingface, and is float16 for the others.
        model_config: of a `.pth`, a JSON file in the original's keys.
        tokenizer: a `tokenizer.json` or its folder in place of the one that belongs to the source.
        max_shard_bytes: of one safetensors file; None writes one.
        overwrite: replace a model that lies at `output`.

    Raises:
        UserError: for a source, shape, tokenizer or place that will not do.
    """
    output = Path(output)
    if format not in FORMATS:
        raise ConfigError(f"--format {format} is not known; choose {', '.join(FORMATS)}.")
    if dtype not in ("auto", *gguf.DTYPES):
        raise ConfigError(f"--dtype {dtype} is not known; choose auto, {', '.join(gguf.DTYPES)}.")
    if dtype == "q8_0" and format != "gguf":
        raise ConfigError("--dtype q8_0 is for --format gguf; choose float32, float16 or bfloat16.")
    found = open_model(source, model_config)
    if output.resolve() == found.path.resolve():
        raise ConfigError(f"--output {output} is where the model is read from; name another folder.")
    with new_folder(output, "--output", overwrite=overwrite) as folder:
        config, own = _with_tokenizer(found, tokenizer)
        weights = found.weights()
        dtype = dtype if dtype != "auto" else _stored_dtype(weights) if format == "huggingface" else "float16"
        notes = [*found.notes, *_remarks(format, config, own)]
        if format == "gguf":
            _write_gguf(folder, weights, config, own, dtype, output.resolve().name)
        elif format == "minimind":
            _write_upstream(folder, weights, config, getattr(torch, dtype))
        else:
            _write_huggingface(folder, weights, config, getattr(torch, dtype), max_shard_bytes)
        if own is not None and format != "gguf":
            own.save(folder)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(
        source=f"{found.what} ({found.path})",
        folder=output,
        format=format,
        dtype=dtype,
        config=config,
        files=files,
        notes=tuple(notes),
    )


def _with_tokenizer(found: ModelSource, named: str | Path | None) -> tuple[MiniMindConfig, Tokenizer | None]:
    """Return the tokenizer to go along, and the config with the tokens that it gives a role.

    Raises:
        ConfigError: when the tokenizer has more entries than the embedding has rows.
    """
    tokenizer = found.tokenizer() if named is None else load_tokenizer(named)
    config = found.config
    if tokenizer is None:
        return config, None
    check_vocab(tokenizer, config.vocab_size, str(found.path))
    if named is not None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        config = dataclasses.replace(
            config,
            bos_token_id=eos if bos is None else bos,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
        )
    return config, tokenizer


def _stored_dtype(weights: Mapping[str, Tensor]) -> str:
    """Return the dtype that all weights have, float32 where they differ or are wider."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return "float32" if common == torch.float64 else str(common).removeprefix("torch.")


def _remarks(format: str, config: MiniMindConfig, tokenizer: Tokenizer | None) -> list[str]:
    remarks = []
    if tokenizer is None and format != "minimind":
        remarks.append("no tokenizer is known for this model, so none is written; name it by --tokenizer.")
    if format == "minimind" and (others := list(upstream.unset_by_commands(config))):
        remarks.append(
            f"the original's commands build a model of {config.hidden_size} with other sizes than this one: "
            f"{', '.join(others)}. Build it by MiniMindConfig(**settings) from the file of settings instead."
        )
    return remarks


def _write_huggingface(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: MiniMindConfig,
    dtype: torch.dtype,
    max_shard_bytes: int | None,
) -> None:
    qwen3.save_weights(weights, config, folder, dtype, max_shard_bytes=max_shard_bytes)
    back = qwen3.load_config(folder)
    _refuse([] if back == config else [qwen3.CONFIG])
    _refuse(_differing(weights, qwen3.load_weights(folder, back), dtype))


def _write_upstream(
    folder: Path, weights: Mapping[str, Tensor], config: MiniMindConfig, dtype: torch.dtype
) -> None:
    path = upstream.save_upstream(weights, config, folder, dtype)
    settings = folder / upstream.settings_name(path.name)
    back = upstream.read_upstream_config(settings)
    # The original has one YaRN or none, so only its presence is written.
    same = dataclasses.replace(back, rope_scaling=None) == dataclasses.replace(config, rope_scaling=None)
    _refuse([] if same else [settings.name])
    stored = qwen3.check_weights(back, upstream.read_upstream_weights(path), str(path))
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
        raise ConfigError("a GGUF file holds its tokenizer, and none is known here; name it by --tokenizer.")
    path = folder / f"{name}-{_SHORT.get(dtype, dtype)}.gguf"
    gguf.save_gguf(weights, config, tokenizer, path, dtype, name)
    _refuse(gguf.differences(path, weights, config, tokenizer, dtype, name))


_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def _differing(weights: Mapping[str, Tensor], back: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Return the names of tensors that did not come back as they were rounded, to the last bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    names = weights.keys() ^ back.keys()
    return [
        *sorted(names),
        *(
            name
            for name in weights
            if name in back and not torch.equal(bits(weights[name].to(dtype)), bits(back[name]))
        ),
    ]


def _refuse(differing: list[str]) -> None:
    if differing:
        raise UserError(
            f"what was written does not read back as it was ({', '.join(differing[:3])}), so nothing is "
            "kept; see whether disk and memory are sound."
        )
