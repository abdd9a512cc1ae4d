"""A trained model, wherever it lies: a run, a checkpoint, a Hugging Face folder, or the original's `.pth`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoint.files import MANIFEST, StoredCheckpoint, open_checkpoint, stored_checkpoints
from ..errors import CheckpointError, ConfigError
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from ..run_folder import RunFolder
from ..tokenizer import Tokenizer, check_vocab, load_tokenizer
from .huggingface import CONFIG, check_weights, load_config, load_weights, model_from_weights
from .original_minimind import (
    infer_upstream_config,
    read_upstream_config,
    read_upstream_weights,
    settings_name,
)

_KINDS = (
    "name the folder of a run, one of its checkpoints, a Hugging Face folder with a config.json, "
    "or a .pth of the original minimind"
)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, its weights not yet read.

    Attributes:
        path: the file or folder that holds the weights.
        what: what it is, such as `checkpoint of step 1000`.
        config: the shape.
        weights: reads every parameter by its Hugging Face name as it is stored, a tied matrix once; raises
            UserError where they are damaged or do not belong to the config.
        tokenizer: loads the one that lies there or that the run used, None where none is known.
        notes: sentences about what was chosen or assumed.
    """

    path: Path
    what: str
    config: MiniMindConfig
    weights: Callable[[], dict[str, Tensor]]
    tokenizer: Callable[[], Tokenizer | None]
    notes: tuple[str, ...] = ()


def open_model(
    path: str | Path, model_config: str | Path | None = None, *, delivered: bool = False
) -> ModelSource:
    """Find out what lies at a path.

    Of a run this is the newest whole checkpoint, which holds the final weights in float32 when the run is
    done; where there is none, the model folder that the run delivered. With `delivered` it is the other way
    round.

    Args:
        path: the folder of a run, a checkpoint or the folder of them, a Hugging Face folder, or a `.pth`.
        model_config: of a `.pth`, a JSON file in the original's keys; by default the file beside it that
            `settings_name` names, else the shape is worked out from the tensors.

    Raises:
        ConfigError: when there is nothing of the kind, or it cannot be read.
        CheckpointError: when a checkpoint is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; {_KINDS}.")
    if path.is_file():
        return _open_upstream(path, None if model_config is None else Path(model_config))
    if model_config is not None:
        raise ConfigError(f"{path} has settings of its own; --model-config goes with a .pth only.")
    if (path / MANIFEST).is_file():
        return _open_checkpoint(open_checkpoint(path))
    if (path / CONFIG).is_file():
        return _open_huggingface(path)
    if delivered and (RunFolder(path).model / CONFIG).is_file():
        return _open_huggingface(RunFolder(path).model)
    if RunFolder(path).holds_a_run() or RunFolder(path).model.is_dir():
        return _open_run(RunFolder(path))
    if stored_checkpoints(path):
        return _open_checkpoint(open_checkpoint(path))
    raise ConfigError(f"{path} holds no model; {_KINDS}.")


def load_with_tokenizer(
    path: str | Path, tokenizer: str | None = None
) -> tuple[ModelSource, MiniMindForCausalLM, Tokenizer]:
    """Read a model to use it, in float32 on the CPU; of a run the delivered one where there is one.

    Args:
        path: as for `open_model`.
        tokenizer: a `tokenizer.json` or its folder, in place of the one that belongs to the model.

    Raises:
        UserError: when the model cannot be read, or no tokenizer is known or it has too many entries.
    """
    source = open_model(path, delivered=True)
    found = source.tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
    if found is None:
        raise ConfigError(f"there is no tokenizer.json beside {source.path}; name one by --tokenizer.")
    check_vocab(found, source.config.vocab_size, str(source.path))
    return source, model_from_weights(source.config, source.weights(), str(source.path)), found


def _open_run(run: RunFolder) -> ModelSource:
    passed_over: list[str] = []
    try:
        found = _open_checkpoint(open_checkpoint(run.path, passed_over.append))
    except CheckpointError as error:
        if not (run.model / CONFIG).is_file():
            raise
        found, passed_over = _open_huggingface(run.model), [f"{error} The delivered model is taken."]
    return dataclasses.replace(found, notes=(*passed_over, *found.notes))


def _open_checkpoint(checkpoint: StoredCheckpoint) -> ModelSource:
    settings = checkpoint.trainer.get("settings", {})
    if settings.get("model_config") is None:
        raise CheckpointError(
            f"{checkpoint.path} does not say the shape of its model: that is a model of your own, or it was "
            "written by an earlier version. Name the model folder of the run if it has a config.json."
        )
    config = MiniMindConfig.from_dict(settings["model_config"])

    def tokenizer() -> Tokenizer | None:
        """Return the one of the run, which may have been moved or changed since."""
        run = RunFolder(checkpoint.path.resolve().parent.parent)
        named = settings.get("tokenizer")
        for place in (run.model / "tokenizer.json", named):
            if place is None or Path(place).exists():
                found = load_tokenizer(place)
                if found.fingerprint == settings.get("tokenizer_fingerprint"):
                    return found
        raise ConfigError(
            f"the tokenizer of {checkpoint.path}, {named or 'the one in the package'}, was moved or changed "
            "since; name it by --tokenizer."
        )

    return ModelSource(
        checkpoint.path,
        f"checkpoint of step {checkpoint.step}",
        config,
        lambda: check_weights(config, checkpoint.weights(), str(checkpoint.path)),
        tokenizer,
    )


def _open_huggingface(folder: Path) -> ModelSource:
    config = load_config(folder)

    def tokenizer() -> Tokenizer | None:
        return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None

    return ModelSource(folder, "Hugging Face folder", config, lambda: load_weights(folder, config), tokenizer)


def _open_upstream(path: Path, settings: Path | None) -> ModelSource:
    if path.suffix != ".pth":
        raise ConfigError(f"{path} is no .pth; {_KINDS}.")
    stored = read_upstream_weights(path)
    beside = path.with_name(settings_name(path.name))
    notes: tuple[str, ...] = ()
    if settings is None and beside.is_file():
        settings = beside
    if settings is not None:
        config = read_upstream_config(settings)
        notes = (f"settings from {settings}.",)
    else:
        config = infer_upstream_config(stored, str(path))
        notes = (
            f"settings from the shapes of the tensors, with rope_theta {config.rope_theta:g}, rms_norm_eps "
            f"{config.rms_norm_eps:g}, no YaRN{', one expert a token' if config.use_moe else ''} and "
            f"{config.max_position_embeddings} positions, as the original's commands have them; if it was "
            f"trained otherwise, write its settings to {beside}.",
        )

    def tokenizer() -> Tokenizer | None:
        return load_tokenizer(path.parent) if (path.parent / "tokenizer.json").is_file() else None

    return ModelSource(
        path,
        "weights of the original minimind",
        config,
        lambda: check_weights(config, stored, str(path)),
        tokenizer,
        notes,
    )
