"""Model folders that transformers opens: configuration, weights and tokenizer, read and written again.

Needs the package transformers. Code in a folder is never executed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..io.checksums import check_files
from ..io.reading import read_json
from ..modeling.transformers_config import TransformersConfig
from ..tokenizer import Tokenizer, load_tokenizer
from .huggingface import CONFIG, round_to
from .transformers_model import TransformersModel

# Files of a model folder beside its weights and its model card.
_SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_KEPT = (".index.json", "checksums.json", "trainer_state.json")


def open_config(folder: Path, *, resumed: bool = False) -> TransformersConfig:
    """Return the configuration of a model folder.

    Raises:
        ConfigError: when transformers is missing or does not know this model.
    """
    try:
        values = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read ({error}); copy it again.") from error
    return complete(TransformersConfig.of(values, folder=str(folder), resumed=resumed))


def complete(config: TransformersConfig) -> TransformersConfig:
    """Return a configuration with the defaults of its class in transformers and its number of parameters.

    Raises:
        ConfigError: when transformers is missing or does not know this model.
    """
    if config.values.get("quantization_config"):
        raise ConfigError(f"{config.source} has quantized weights, which cannot be trained.")
    parameters, active = _count(json.dumps(dict(config.values), sort_keys=True), config.source)
    named = {name: getattr(config, name) for name in ("folder", "resumed", "dropout", "router_aux_loss_coef")}
    defaults = _hf_config(config).to_dict()
    return TransformersConfig.of(
        config.values, defaults, **named, parameters=parameters, active_parameters=active
    )


@lru_cache
def _count(values: str, name: str) -> tuple[int, int]:
    """Return the number of parameters of a model, and of those active per token."""
    config = TransformersConfig.of(json.loads(values), folder=name)
    with torch.device("meta"):
        network = build_network(config)
    hf_config = network.config.get_text_config()
    chosen = getattr(hf_config, "num_experts_per_tok", None)
    experts = getattr(hf_config, "num_local_experts", None) or getattr(hf_config, "num_experts", None)
    share = chosen / experts if chosen and experts else 1.0
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    inactive = sum(size * (1 - share) for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()), round(sum(sizes.values()) - inactive)


def load_model(config: TransformersConfig, weights: Mapping[str, Tensor] | None = None) -> TransformersModel:
    """Return a float32 model on the CPU with the dropout of the configuration.

    Args:
        config: of `open_config`.
        weights: every parameter by its name; None reads those in the folder of the configuration, or makes
            random ones if the run is resumed.

    Raises:
        ConfigError: when weights are missing, damaged, or do not match the configuration.
    """
    hf_config = _hf_config(config)
    for settings in {id(one): one for one in (hf_config, hf_config.get_text_config())}.values():
        for key, value in settings.to_dict().items():
            if "drop" in key and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(settings, key, 0.0 if "layer" in key else config.dropout)
    if weights is None and not config.resumed:
        network = _read(config, hf_config)
    else:
        network = build_network(config, hf_config)
    if weights is not None:
        _fill(network, weights, config.source)
    return TransformersModel(network.float().eval(), config)


def _read(config: TransformersConfig, hf_config: Any) -> Any:
    """Return the model of a folder."""
    transformers = import_transformers(config.source)
    assert config.folder is not None
    check_files(Path(config.folder))
    try:
        with _quiet():
            network, found = transformers.AutoModelForCausalLM.from_pretrained(
                config.folder,
                config=hf_config,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # of any reader: safetensors, pickle, the model's class
        raise ConfigError(f"{config.source} cannot be opened by transformers ({_reason(error)}).") from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{config.source} has no {missing[0]}, which a {config.architecture} needs; copy its weights "
            "again."
        )
    return network


def _fill(network: Any, weights: Mapping[str, Tensor], source: str) -> None:
    own = network.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights if name in own}
    problems = [f"it has no {name}" for name, tensor in own.items() if id(tensor) not in given]
    problems += [f"it has an unexpected {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)}, but the config makes it {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ConfigError(
            f"the weights of {source} are not those of its config.json: {problems[0]}; copy both again."
        )
    network.load_state_dict(weights, strict=False)


def write_model(
    weights: Mapping[str, Tensor],
    config: TransformersConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int | None = None,
    with_tokenizer: bool = True,
) -> list[str]:
    """Write a model by `save_pretrained` of its class, with the files beside it, into an empty folder.

    Args:
        weights: every parameter by its name, on the CPU; a tied one once.
        config: of the model.
        folder: the empty folder.
        dtype: precision of the weights.
        max_shard_bytes: size limit of a weight file; None writes one file.
        with_tokenizer: also copy the tokenizer's files.

    Returns:
        The names of the weight files.
    """
    with torch.device("meta"):
        network = build_network(config)
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in weights.items()}
    network.load_state_dict(rounded, strict=False, assign=True)
    network.tie_weights()
    network.config.dtype = dtype
    with _quiet():
        network.save_pretrained(folder, max_shard_size=max_shard_bytes or 1 << 60)
    files = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    if config.folder is not None:
        for file in _settings_files(Path(config.folder)):
            if file.name != CONFIG and (with_tokenizer or file.name == "generation_config.json"):
                shutil.copyfile(file, folder / file.name)
    return files


def stored_dtype(config: TransformersConfig) -> torch.dtype:
    """Return the precision in which the weights were published; float32 where it is not known."""
    name = str(config.values.get("dtype") or config.values.get("torch_dtype") or "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if found in (torch.float16, torch.bfloat16) else torch.float32


def keep_settings(config: TransformersConfig, folder: Path) -> None:
    """Write configuration and tokenizer into an empty folder, from which a run can be resumed.

    Raises:
        OSError: when they cannot be written.
    """
    for file in () if config.folder is None else _settings_files(Path(config.folder)):
        shutil.copyfile(file, folder / file.name)
    (folder / CONFIG).write_text(json.dumps(dict(config.values), indent=2) + "\n", encoding="utf-8")


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a model folder, None without one; other formats are converted by transformers.

    Raises:
        UserError: when it cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model", "vocab.txt")):
        return None
    transformers = import_transformers(str(folder))
    with tempfile.TemporaryDirectory() as converted:
        try:
            with _quiet():
                transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(converted)
        except Exception as error:  # of any converter
            raise ConfigError(
                f"the tokenizer in {folder} cannot be read by transformers ({_reason(error)})."
            ) from error
        return load_tokenizer(converted) if (Path(converted) / "tokenizer.json").is_file() else None


def import_transformers(name: str) -> Any:
    """Return the package transformers, for the model of this name.

    Raises:
        ConfigError: when it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{name} is not a Qwen3 model, so it needs the package transformers, which is not installed; pip "
            "install transformers."
        ) from error
    return transformers


def _settings_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SETTINGS and not path.name.endswith(_NOT_KEPT)
    ]


def _hf_config(config: TransformersConfig) -> Any:
    transformers = import_transformers(config.source)
    model_type = config.values.get("model_type")
    try:
        found = transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        raise ConfigError(
            f"{config.source}: transformers {transformers.__version__} does not know the model type "
            f"{model_type!r}, and code in a folder is not executed; update transformers or use another model."
        ) from None
    try:
        with _quiet():
            return found.from_dict(dict(config.values))
    except Exception as error:  # of the checks of any class
        raise ConfigError(f"{config.source}: config.json is not valid ({_reason(error)}).") from error


def build_network(config: TransformersConfig, hf_config: Any = None) -> Any:
    """Return the model of transformers with random weights, in float32.

    Args:
        config: of the model.
        hf_config: its configuration with changes; None for the one of `config`.

    Raises:
        ConfigError: for a model that does not predict the next token.
    """
    transformers = import_transformers(config.source)
    hf_config = _hf_config(config) if hf_config is None else hf_config
    try:
        # The random state of the caller is not touched: the weights are replaced.
        with _quiet(), torch.random.fork_rng(devices=[]):
            return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    except Exception as error:  # of the constructor of any class
        raise ConfigError(
            f"{config.source} cannot be opened by transformers as a causal language model ({_reason(error)})."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Show neither progress bars nor warnings of transformers, which this package reports itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]
