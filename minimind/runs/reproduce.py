"""The command that repeats a run, and what has changed since that may make it another run."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.command_line import to_argv
from ..config.options import ModelConfig, PretrainConfig
from ..config.schema import schema_of
from ..distributed.accelerator import choose_precision
from ..errors import UserError
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer, load_tokenizer
from .changes import caveats, data_changes, environment_changes
from .record import RunRecord

# What a shape has besides dropout comes from the folder of --from-weight, where there is one.
_FROM_WEIGHT = tuple(
    name for name in schema_of(ModelConfig) if name not in ("dropout", "router_aux_loss_coef", "from_weight")
)
# What the launcher tells by variables and is told by flags of the same name.
_LAUNCHER_VARIABLES = (
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE",
    "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_RESHARD_AFTER_FORWARD",
)
_PATHS = ("data", "val_data", "tokenizer", "cache_dir", "from_weight")


@dataclass(frozen=True)
class Reproduction:
    """How to repeat a run.

    Attributes:
        words: the command, unquoted.
        variables: to be set in its environment.
        warnings: what has changed since, in sentences.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command as a shell reads it."""
        return " ".join(
            [*(f"{name}={shlex.quote(v)}" for name, v in self.variables.items()), shlex.join(self.words)]
        )


def reproduce(run: RunRecord, *, check_data: bool = False) -> Reproduction:
    """Return the command that repeats a run on this machine, and what has changed since.

    Args:
        run: as its folder tells it.
        check_data: tokenize the text again, where the cache does not hold it, to compare its fingerprint.
    """
    config, warnings = _absolute(run)
    tokenizer, more = _tokenizer(run, config)
    warnings += more
    launch = run.environment.get("launch")
    launch = launch if isinstance(launch, dict) else {}
    if not launch:
        warnings.append("the run did not record how its processes were started; one is assumed.")
    config = _as_it_was(config, launch)
    warnings += environment_changes(run)
    warnings += data_changes(run, config, tokenizer, check_data)
    warnings += caveats(run)
    variables = {}
    if launch.get("on_cpu") and (torch.cuda.is_available() or launch.get("processes", 1) > 1):
        variables["ACCELERATE_USE_CPU"] = "true"
    target = _new_folder(run.path)
    words = (
        *_launcher(launch),
        "pretrain",
        *to_argv(_asked_for(config, tokenizer)),
        f"--output-dir={target}",
    )
    return Reproduction(words, variables, tuple(warnings))


def _asked_for(config: PretrainConfig, tokenizer: Tokenizer | None) -> PretrainConfig:
    """Return the options without the sizes that follow from others."""
    settings = schema_of(PretrainConfig)
    if config.from_weight is not None:
        return dataclasses.replace(config, **{name: settings[name].default for name in _FROM_WEIGHT})
    changes: dict[str, Any] = {}
    if tokenizer is not None:
        changes["vocab_size"] = tokenizer.vocab_size
    if config.hidden_size % config.num_attention_heads == 0:
        changes["head_dim"] = config.hidden_size // config.num_attention_heads
    plain = MiniMindConfig(
        hidden_size=config.hidden_size, num_attention_heads=1, num_key_value_heads=1, head_dim=2
    )
    changes["intermediate_size"] = plain.intermediate_size
    changes = {name: None for name, derived in changes.items() if getattr(config, name) == derived}
    return dataclasses.replace(config, **changes)


def _as_it_was(config: PretrainConfig, launch: Mapping[str, Any]) -> PretrainConfig:
    """Return the options with what machine or launcher decided then, where these would decide otherwise."""
    changes: dict[str, Any] = {}
    precision, compiled = launch.get("precision"), launch.get("compiled")
    decided = config.mixed_precision == "auto" and precision in ("no", "bf16", "fp16")
    if decided and choose_precision(config) != precision:
        changes["mixed_precision"] = precision
    if config.compile is None and isinstance(compiled, bool) and compiled != torch.cuda.is_available():
        changes["compile"] = compiled
    return dataclasses.replace(config, **changes)


def _launcher(launch: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words before `pretrain`."""
    processes, machines = launch.get("processes", 1), launch.get("machines", 1)
    if processes == 1:
        yield "minimind-train"
        return
    yield from ("accelerate", "launch")
    if launch.get("kind") == "FSDP2":
        yield from ("--use_fsdp", "--fsdp_version", "2")
        variables = launch.get("variables", {})
        if any(name.startswith("PARALLELISM_") for name in variables):
            yield "--use_parallelism_config"
        for name in _LAUNCHER_VARIABLES:
            if name in variables:
                yield from ("--" + name.lower(), variables[name])
    else:
        yield "--multi_gpu"
    yield from ("--num_processes", str(processes))
    if machines > 1:
        yield from ("--num_machines", str(machines))
    yield from ("-m", "minimind_cli")


def _absolute(run: RunRecord) -> tuple[PretrainConfig, list[str]]:
    """Return the options with paths that mean the same from here, and warnings."""
    config = run.config
    began_in = run.environment.get("working_folder")
    if began_in is None or Path(began_in) == Path.cwd():
        relative = [name for name in _PATHS if any(map(_is_relative, _texts(getattr(config, name))))]
        if began_in is None and relative:
            flags = ", ".join(schema_of(PretrainConfig)[name].flag for name in relative)
            return config, [
                f"{flags} are relative to the folder that the run was started in, which it did not record."
            ]
        return config, []
    changes: dict[str, Any] = {}
    for name in _PATHS:
        value = getattr(config, name)
        moved = tuple(os.path.join(began_in, text) if _is_relative(text) else text for text in _texts(value))
        changes[name] = moved if isinstance(value, tuple) else (moved[0] if moved else None)
    return dataclasses.replace(config, **changes), []


def _texts(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _is_relative(text: str) -> bool:
    return not os.path.isabs(text) and not text.startswith("~")


def _new_folder(path: Path) -> Path:
    """Return the name of a folder beside the run's where there is nothing yet."""
    if path.name in ("", ".."):  # The run is named from within.
        path = path.resolve()
    number, target = 2, path.with_name(f"{path.name}-again")
    while target.exists():
        number, target = number + 1, path.with_name(f"{path.name}-again-{number}")
    return target


def _tokenizer(run: RunRecord, config: PretrainConfig) -> tuple[Tokenizer | None, list[str]]:
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except UserError as error:
        return None, [f"the tokenizer cannot be loaded: {error}"]
    recorded = run.fingerprint("tokenizer")
    if recorded is None:
        return tokenizer, ["the run did not record its tokenizer, so it could not be compared."]
    if recorded != tokenizer.fingerprint:
        name = config.tokenizer or "in the package"
        return tokenizer, [f"the tokenizer {name} is not the one that the run had."]
    return tokenizer, []
