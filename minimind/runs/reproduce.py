"""Return the command that reproduces a run, and warn about what has changed since."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.command_line import to_argv
from ..config.options import CONFIG_SCHEMA, ModelConfig, PretrainConfig
from ..config.schema import schema_of
from ..distributed.accelerator import choose_precision
from ..errors import UserError
from ..formats.open_model import training_tokenizer
from ..launch_env import launcher_args
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer
from .changes import caveats, data_changes, environment_changes
from .record import RunRecord

# Options that --from-weight determines.
_FROM_WEIGHT = tuple(
    name for name in schema_of(ModelConfig) if name not in ("dropout", "router_aux_loss_coef", "from_weight")
)
_PATHS = ("data", "val_data", "tokenizer", "cache_dir", "from_weight")


@dataclass(frozen=True)
class Reproduction:
    """How to reproduce a run.

    Attributes:
        args: the command, unquoted.
        variables: environment variables of the command.
        warnings: sentences about what has changed since.
    """

    args: tuple[str, ...]
    variables: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command, quoted for a shell."""
        return " ".join(
            [*(f"{name}={shlex.quote(v)}" for name, v in self.variables.items()), shlex.join(self.args)]
        )


def reproduce(run: RunRecord, *, check_data: bool = False) -> Reproduction:
    """Return the command that reproduces a run on this machine, and warnings.

    With `check_data` data that is not in the cache is tokenized, to compare its fingerprint.
    """
    config, warnings = _absolute(run)
    tokenizer, more = _tokenizer(run, config)
    warnings += more
    launch = run.environment.get("launch")
    launch = launch if isinstance(launch, dict) else {}
    if not launch:
        warnings.append("the run did not record its launch; one process is assumed.")
    config = _with_recorded_defaults(config, launch)
    warnings += environment_changes(run)
    warnings += data_changes(run, config, tokenizer, check_data)
    warnings += caveats(run)
    variables = {}
    if launch.get("on_cpu") and (torch.cuda.is_available() or launch.get("processes", 1) > 1):
        variables["ACCELERATE_USE_CPU"] = "true"
    target = _new_folder(run.path)
    if config.run_name == "none":
        # On the command line `none` means no name, and a run without one is named after its folder.
        config, target = dataclasses.replace(config, run_name=None), target / "none"
    if not config.tracker:  # an empty list of trackers
        config = dataclasses.replace(config, tracker=("none",))
    options = to_argv(_without_derived_sizes(config, tokenizer))
    args = (*launcher_args(launch), "pretrain", *options, f"--output-dir={target}")
    return Reproduction(args, variables, tuple(warnings))


def _without_derived_sizes(config: PretrainConfig, tokenizer: Tokenizer | None) -> PretrainConfig:
    """Return the options without the sizes that follow from others."""
    if config.from_weight is not None:
        unset: dict[str, Any] = dict.fromkeys(_FROM_WEIGHT)
        return dataclasses.replace(config, **unset)
    changes: dict[str, Any] = {}
    if tokenizer is not None:
        changes["vocab_size"] = tokenizer.vocab_size
    assert config.hidden_size is not None
    assert config.num_attention_heads is not None
    if config.hidden_size % config.num_attention_heads == 0:
        changes["head_dim"] = config.hidden_size // config.num_attention_heads
    plain = MiniMindConfig(
        hidden_size=config.hidden_size, num_attention_heads=1, num_key_value_heads=1, head_dim=2
    )
    changes["intermediate_size"] = plain.intermediate_size
    changes = {name: None for name, derived in changes.items() if getattr(config, name) == derived}
    return dataclasses.replace(config, **changes)


def _with_recorded_defaults(config: PretrainConfig, launch: Mapping[str, Any]) -> PretrainConfig:
    """Return the options with the recorded precision and compilation, where the defaults here differ."""
    changes: dict[str, Any] = {}
    precision, compiled = launch.get("precision"), launch.get("compiled")
    recorded = config.mixed_precision == "auto" and precision in ("no", "bf16", "fp16")
    if recorded and choose_precision(config) != precision:
        changes["mixed_precision"] = precision
    if config.compile is None and isinstance(compiled, bool) and compiled != torch.cuda.is_available():
        changes["compile"] = compiled
    return dataclasses.replace(config, **changes)


def _absolute(run: RunRecord) -> tuple[PretrainConfig, list[str]]:
    """Return the options with paths valid from the current folder, and warnings."""
    config, started_in = run.config, run.environment.get("working_folder")
    relative = [name for name in _PATHS if any(map(_is_relative, _as_tuple(getattr(config, name))))]
    if not relative or (started_in is not None and Path(started_in) == Path.cwd()):
        return config, []
    if started_in is None:
        flags = ", ".join(CONFIG_SCHEMA[name].flag for name in relative)
        return config, [f"{flags} are relative to the working folder of the run, which it did not record."]
    changes: dict[str, Any] = {}
    for name in relative:
        value = getattr(config, name)
        moved = [os.path.join(started_in, t) if _is_relative(t) else t for t in _as_tuple(value)]
        changes[name] = tuple(moved) if isinstance(value, tuple) else moved[0]
    return dataclasses.replace(config, **changes), []


def _as_tuple(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _is_relative(text: str) -> bool:
    return not os.path.isabs(text) and not text.startswith(("~", "hf://"))


def _new_folder(path: Path) -> Path:
    """Return an unused path beside the run."""
    if path.name in ("", ".."):  # named from within the run
        path = path.resolve()
    path = path if path.name else path / "run"  # the root folder has no name
    number, target = 2, path.with_name(f"{path.name}-again")
    while target.exists():
        number, target = number + 1, path.with_name(f"{path.name}-again-{number}")
    return target


def _tokenizer(run: RunRecord, config: PretrainConfig) -> tuple[Tokenizer | None, list[str]]:
    try:
        tokenizer, _ = training_tokenizer(config.tokenizer, config.from_weight)
    except UserError as error:
        return None, [f"the tokenizer cannot be loaded: {error}"]
    recorded = run.fingerprint("tokenizer")
    if recorded is None:
        return tokenizer, ["the run did not record its tokenizer, so it could not be compared."]
    if recorded != tokenizer.fingerprint:
        name = config.tokenizer or "of the package"
        return tokenizer, [f"the tokenizer {name} is not that of the run."]
    return tokenizer, []
