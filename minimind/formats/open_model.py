"""Open a trained model from a run, a checkpoint, a Hugging Face folder, or the original's `.pth`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.files import MANIFEST, MODEL, StoredCheckpoint, open_checkpoint, stored_checkpoints
from ..errors import CheckpointError, ConfigError, UserError
from ..io.reading import read_json
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from ..modeling.transformers_config import OWN_TYPES, TransformersConfig, config_of
from ..run_folder import RunFolder
from ..tokenizer import PACKAGED, Tokenizer, check_vocab, load_tokenizer
from .hub import is_model_name, model_snapshot
from .huggingface import (
    CONFIG,
    check_weights,
    load_config,
    load_token_settings,
    load_weights,
    model_from_weights,
)
from .model_card import CARD, model_card, recorded_numbers
from .original_minimind import (
    infer_upstream_config,
    read_upstream_config,
    read_upstream_weights,
    settings_name,
)
from .plugins import open_by_plugin
from .sharded_safetensors import weight_files
from .transformers_folder import complete, folder_tokenizer, load_model, open_config, stored_dtype
from .transformers_model import TransformersModel
from .weight_header import check_layers, read_headers

# Until 0.1.0; an unfinished run stores only the fingerprint of its tokenizer.
_EARLIER = PACKAGED.with_name("tokenizer_0_1")

_KINDS = "name a run folder, a checkpoint, a Hugging Face folder, or a .pth of the original minimind"

CausalLM = MiniMindForCausalLM | TransformersModel


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are not read yet.

    Attributes:
        path: file or folder of the weights.
        what: kind of source, such as `checkpoint of step 1000`.
        config: sizes and special token ids.
        weights: reads every parameter by its Hugging Face name in its stored precision, a tied matrix once;
            raises UserError for damaged weights or another model's config.
        tokenizer: loads the tokenizer beside the weights or of the run, None where there is none.
        notes: sentences about defaults and assumptions.
        token_settings: see `load_token_settings`; empty for other sources than a Hugging Face folder.
        card: returns the model card, None where nothing is known for one.
    """

    path: Path
    what: str
    config: MiniMindConfig
    weights: Callable[[], dict[str, Tensor]]
    tokenizer: Callable[[], Tokenizer | None]
    notes: tuple[str, ...] = ()
    token_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    card: Callable[[], str | None] = lambda: None

    def load(self, config: MiniMindConfig | None = None) -> CausalLM:
        """Return the model in float32 on the CPU.

        Args:
            config: the configuration with other options of training; None for that of the model.

        Raises:
            ConfigError: when the weights cannot be read.
        """
        config = self.config if config is None else config
        if not isinstance(config, TransformersConfig):
            return model_from_weights(config, self.weights(), str(self.path))
        # Folders are read by transformers, which may convert them.
        return load_model(config, None if config.folder == str(self.path) else self.weights())


def open_model(
    path: str | Path, model_config: str | Path | None = None, *, final: bool = False
) -> ModelSource:
    """Open the model at a path.

    A run yields its newest intact checkpoint, which holds the float32 weights; without one, its final model
    folder. `final` prefers the final model folder.

    Args:
        path: a run folder, a checkpoint or the folder of checkpoints, a Hugging Face folder, a `.pth`, or the
            name of a model on the Hugging Face Hub.
        model_config: JSON configuration of a `.pth`, with the original's keys; by default the file beside it
            that `settings_name` names, else the sizes are inferred from the tensors.
        final: prefer the final model of a run to its checkpoints.

    Raises:
        ConfigError: when there is no model, or it cannot be read.
        CheckpointError: when a checkpoint is damaged.
    """
    path = model_snapshot(str(path)) if is_model_name(str(path)) else Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; {_KINDS}.")
    if path.is_file():
        if path.suffix != ".pth" and (found := open_by_plugin(path)) is not None:
            return found
        return _open_upstream(path, None if model_config is None else Path(model_config))
    if model_config is not None:
        raise ConfigError(f"{path} has its own configuration; --model-config is for a .pth only.")
    if (path / MANIFEST).is_file():
        return _open_checkpoint(open_checkpoint(path))
    if (path / CONFIG).is_file():
        return _open_huggingface(path)
    if final and (RunFolder(path).model / CONFIG).is_file():
        return _open_huggingface(RunFolder(path).model)
    if RunFolder(path).holds_a_run() or RunFolder(path).model.is_dir():
        return _open_run(RunFolder(path))
    if stored_checkpoints(path):
        return _open_checkpoint(open_checkpoint(path))
    if (found := open_by_plugin(path)) is not None:
        return found
    raise ConfigError(f"{path} holds no model; {_KINDS}.")


def load_with_tokenizer(
    path: str | Path, tokenizer: str | None = None
) -> tuple[ModelSource, CausalLM, Tokenizer]:
    """Load a model in float32 on the CPU with its tokenizer; for a run, its final model if there is one.

    Args:
        path: see `open_model`.
        tokenizer: a `tokenizer.json` or its folder, instead of the model's own tokenizer.

    Raises:
        UserError: when the model cannot be read, or the tokenizer is missing or too large.
    """
    source = open_model(path, final=True)
    found = source.tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
    if found is None:
        raise ConfigError(f"there is no tokenizer.json beside {source.path}; name one with --tokenizer.")
    check_vocab(found, source.config.vocab_size, str(source.path))
    return source, source.load(), found


def open_initial(run: RunFolder) -> ModelSource | None:
    """Return the model that a run continues, as the run's folder keeps it: without its weights.

    None where the run began with random weights or a model of minimind.
    """
    return _open_transformers(run.initial, resumed=True) if (run.initial / CONFIG).is_file() else None


def _packaged(fingerprint: str | None) -> Tokenizer:
    """Return the tokenizer in the package, or that of an earlier version if it has this fingerprint."""
    current = load_tokenizer()
    if fingerprint in (None, current.fingerprint):
        return current
    earlier = load_tokenizer(_EARLIER)
    return earlier if earlier.fingerprint == fingerprint else current


def training_tokenizer(
    tokenizer: str | None,
    from_weight: str | None,
    recorded: str | None = None,
    source: ModelSource | None = None,
) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer of a training run, and a note where it is not that of its initial weights.

    Token ids have a meaning only together with weights: without a --tokenizer, --from-weight brings its own.

    Args:
        tokenizer: path of --tokenizer; None for that of the weights, or else the packaged one.
        from_weight: path of --from-weight; None for random weights.
        recorded: fingerprint of the tokenizer of the run to resume; it chooses among the packaged ones.
        source: what is at `from_weight`; None opens it.

    Raises:
        UserError: when a tokenizer cannot be loaded, or that of the weights is not known.
    """
    if from_weight is None:
        return _packaged(recorded) if tokenizer is None else load_tokenizer(tokenizer), None
    source = open_model(from_weight) if source is None else source
    if tokenizer is None:
        if (own := source.tokenizer()) is None:
            raise ConfigError(
                f"--from-weight {from_weight} has no tokenizer.json beside its weights; name their tokenizer "
                "by --tokenizer."
            )
        return own, None
    chosen = load_tokenizer(tokenizer)
    try:
        own = source.tokenizer()
    except UserError:  # it was moved or changed
        own = None
    if own is None or own.fingerprint == chosen.fingerprint:
        return chosen, None
    return chosen, (
        f"--tokenizer {tokenizer} is not the tokenizer of --from-weight {from_weight}: token ids have other "
        "meanings, so the model has to learn its embeddings again."
    )


def _open_run(run: RunFolder) -> ModelSource:
    skipped: list[str] = []
    try:
        found = _open_checkpoint(open_checkpoint(run.path, skipped.append))
    except CheckpointError as error:
        if not (run.model / CONFIG).is_file():
            raise
        found, skipped = _open_huggingface(run.model), [f"{error} The final model is used instead."]
    return dataclasses.replace(found, notes=(*skipped, *found.notes))


def _open_checkpoint(checkpoint: StoredCheckpoint) -> ModelSource:
    settings = checkpoint.trainer.get("settings", {})
    if settings.get("model_config") is None:
        raise CheckpointError(
            f"{checkpoint.path} has no model configuration: it is of a custom model or an earlier version. "
            "Name the model folder of the run if it has a config.json."
        )
    run = RunFolder(checkpoint.path.resolve().parent.parent)
    kept = str(run.initial) if (run.initial / CONFIG).is_file() else None
    config = config_of(settings["model_config"], folder=kept)
    if isinstance(config, TransformersConfig):
        config = complete(config)
    else:
        check_layers(config, read_headers([checkpoint.path / MODEL]).shapes, checkpoint.path)

    def tokenizer() -> Tokenizer | None:
        """Return the tokenizer of the run, which may have been moved or changed."""
        named, fingerprint = settings.get("tokenizer"), settings.get("tokenizer_fingerprint")
        for place in (run.model / "tokenizer.json", named):
            if place is None or Path(place).exists():
                found = _packaged(fingerprint) if place is None else load_tokenizer(place)
                if found.fingerprint == fingerprint:
                    return found
        of_initial = folder_tokenizer(run.initial) if kept is not None else None
        if of_initial is not None and of_initial.fingerprint == fingerprint:
            return of_initial
        initial = settings.get("from_weight")
        if named is None and initial is not None and Path(initial).exists():
            of_weights = open_model(initial).tokenizer()
            if of_weights is not None and of_weights.fingerprint == fingerprint:
                return of_weights
        raise ConfigError(
            f"the tokenizer of {checkpoint.path}, {named or 'the packaged one'}, was moved or changed; name "
            "it by --tokenizer."
        )

    return ModelSource(
        checkpoint.path,
        f"checkpoint of step {checkpoint.step}",
        config,
        lambda: (
            checkpoint.weights()
            if isinstance(config, TransformersConfig)
            else check_weights(config, checkpoint.weights(), str(checkpoint.path))
        ),
        tokenizer,
        card=lambda: _card_of_checkpoint(checkpoint, config),
    )


def _card_of_checkpoint(checkpoint: StoredCheckpoint, config: MiniMindConfig) -> str:
    run = RunFolder(checkpoint.path.resolve().parent.parent)
    numbers = {"step": checkpoint.step, "tokens": checkpoint.trainer.get("tokens", math.nan)}
    numbers |= recorded_numbers(run.metrics, checkpoint.step)
    return model_card(config, settings=checkpoint.trainer["settings"], numbers=numbers)


def _open_huggingface(folder: Path) -> ModelSource:
    if _is_of_transformers(folder):
        return _open_transformers(folder)
    config = load_config(folder)
    # Before a model of this size is built.
    check_layers(config, read_headers(weight_files(folder)).shapes, folder)

    def tokenizer() -> Tokenizer | None:
        return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None

    return ModelSource(
        folder,
        "Hugging Face folder",
        config,
        lambda: load_weights(folder, config),
        tokenizer,
        token_settings=load_token_settings(folder),
        card=lambda: _card_of_folder(folder),
    )


def _card_of_folder(folder: Path) -> str | None:
    return (folder / CARD).read_text("utf-8", "replace") if (folder / CARD).is_file() else None


def _is_of_transformers(folder: Path) -> bool:
    """Return whether a model folder is of an architecture that minimind does not implement."""
    try:
        model_type = read_json(folder / CONFIG).get("model_type")
    except (OSError, ValueError, AttributeError):  # reading it names the damage
        return False
    return isinstance(model_type, str) and model_type not in OWN_TYPES


def _open_transformers(folder: Path, *, resumed: bool = False) -> ModelSource:
    config = open_config(folder, resumed=resumed)

    def weights() -> dict[str, Tensor]:
        """Return the weights as transformers names them, in the precision in which they are published."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in load_model(config).state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor.detach().to(stored_dtype(config))
        return found

    return ModelSource(
        folder,
        f"{config.architecture} folder",
        config,
        weights,
        lambda: folder_tokenizer(folder),
        card=lambda: _card_of_folder(folder),
    )


def _open_upstream(path: Path, settings: Path | None) -> ModelSource:
    if path.suffix != ".pth":
        raise ConfigError(f"{path} is not a .pth; {_KINDS}.")
    stored = read_upstream_weights(path)
    beside = path.with_name(settings_name(path.name))
    notes: tuple[str, ...] = ()
    if settings is None and beside.is_file():
        settings = beside
    if settings is not None:
        config = read_upstream_config(settings)
        notes = (f"configuration read from {settings}.",)
    else:
        config = infer_upstream_config(stored, str(path))
        notes = (
            f"configuration inferred from the tensors, with the original's defaults: rope_theta "
            f"{config.rope_theta:g}, rms_norm_eps {config.rms_norm_eps:g}, no YaRN"
            f"{', top-1 experts' if config.use_moe else ''}, {config.max_position_embeddings} positions. "
            f"If it was trained otherwise, write its configuration to {beside}.",
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
