"""What `pretrain`, `--plan` and `bench` build alike: resolved options, batches, model, optimizer, loader."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.files import MANIFEST, StoredCheckpoint, stored_checkpoints
from ..config import recipe
from ..config.options import AUTO, PretrainConfig
from ..data.batch_plan import BatchPlan, budget_tokens, count_steps, max_training_tokens, plan_batches
from ..data.loader import Loader
from ..data.shards import TokenShards
from ..distributed.accelerator import check_launch, close_accelerator, start_accelerator
from ..errors import CheckpointError, ConfigError
from ..formats.hub import pinned_name
from ..formats.open_model import ModelSource, open_initial, training_tokenizer
from ..formats.transformers_model import TransformersModel
from ..formatting import count
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from ..run_folder import RunFolder
from ..tokenizer import Tokenizer
from .auto_batch_size import resolve_batch_size
from .build_model import build_model, compile_and_wrap, resolve_model_config
from .compilation import build_graphs
from .cuda_graph import StepGraphs
from .custom_parts import CustomParts

# Held while `pretrain` runs.
_RUNNING = threading.Lock()


@dataclass(frozen=True)
class RunInputs:
    """The options of a run and what follows from them.

    Attributes:
        config: every size of the model filled in; learning rate and weight decay by `with_learning_rate`.
        model_config: sizes of the model.
        tokenizer: of the run.
    """

    config: PretrainConfig
    model_config: MiniMindConfig
    tokenizer: Tokenizer

    def with_batch_size(
        self, accelerator: Accelerator, note: Callable[[str], object] = lambda sentence: None
    ) -> RunInputs:
        """Return these inputs with a number for `--batch-size auto`; every rank must call this.

        Raises:
            ConfigError: where none can be found; see `resolve_batch_size`.
        """
        config = resolve_batch_size(self.config, self.model_config, accelerator, note)
        return dataclasses.replace(self, config=config)

    def with_learning_rate(
        self, train: TokenShards, processes: int, note: Callable[[str], object] = lambda sentence: None
    ) -> RunInputs:
        """Return these inputs with learning rate and weight decay; where no option gives them, by the rules.

        Args:
            train: training split.
            processes: world size.
            note: gets sentences for the user.

        Raises:
            ConfigError: for batches that the ranks cannot share.
        """
        config = self.config
        length = float(config.max_seq_len)
        if not config.packing:
            length = min(length, train.num_tokens / train.num_documents)
        plan = plan_batches(config, processes)
        tokens = max_training_tokens(config, plan, train.num_tokens, length)
        rate, decay = recipe.learning_rate_and_decay(
            config.optimizer,
            width=self.model_config.hidden_size,
            batch_tokens=plan.global_batch_size * length,
            unique_tokens=train.num_tokens,
            epochs=tokens / train.num_tokens,
            rate=config.learning_rate,
            trained=config.from_weight is not None,
        )
        if config.from_weight is not None and config.resume is None:
            note(
                f"--from-weight continues at a peak learning rate of {rate:g} (default: "
                f"{recipe.TRAINED_RATE:g} times that of random weights); --learning-rate changes it."
            )
        if config.weight_decay is not None:
            decay = config.weight_decay
        return dataclasses.replace(
            self, config=dataclasses.replace(config, learning_rate=rate, weight_decay=decay)
        )

    def loader(
        self,
        shards: TokenShards,
        plan: BatchPlan,
        *,
        process_index: int = 0,
        device: torch.device | str = "cpu",
        trim: bool = False,
        weights: Sequence[float] = (),
    ) -> Loader:
        """Return the loader of a training split; see `Loader`."""
        return Loader(
            shards,
            seq_len=self.config.max_seq_len,
            packing=self.config.packing,
            plan=plan,
            seed=self.config.seed,
            process_index=process_index,
            device=device,
            pad_token_id=self.tokenizer.pad_token_id,
            trim=trim,
            weights=weights,
        )

    def total_steps(self, loader: Loader, plan: BatchPlan) -> int:
        """Return the number of optimizer steps of the run."""
        # Packed sequences are full, except the last of an epoch; padded ones are as long as their documents.
        mean_length = loader.tokens_per_epoch / loader.sequences_per_epoch
        return count_steps(
            self.config,
            steps_per_epoch=loader.steps_per_epoch,
            tokens_per_epoch=loader.tokens_per_epoch,
            tokens_per_step=plan.global_batch_size
            * (self.config.max_seq_len if self.config.packing else mean_length),
            max_tokens=budget_tokens(self.config, self.model_config.flops_per_token(self.config.max_seq_len)),
        )


def resolve_run(config: PretrainConfig, note: Callable[[str], object] = lambda sentence: None) -> RunInputs:
    """Resolve the options of a run, before the ranks are joined.

    Raises:
        UserError: for options, a launch, a tokenizer or weights that a run cannot use.
    """
    if config.budget_chooses:
        raise ConfigError(
            "--budget is followed by `minimind-train pretrain` and `minimind.pretrain`; remove it."
        )
    if (remark := check_launch(config)) is not None:
        note(remark)
    source = _initial_model(config)
    recorded = _recorded_settings(config)
    # A run keeps the values of its beginning, also where it goes on for longer.
    config = dataclasses.replace(
        config,
        **{
            name: recorded[name]
            for name in ("learning_rate", "weight_decay")
            if getattr(config, name) is None and recorded.get(name) is not None
        },
    )
    if config.from_weight is not None and source is None:
        config = dataclasses.replace(config, from_weight=pinned_name(config.from_weight))
    tokenizer, caution = training_tokenizer(
        config.tokenizer, config.from_weight, recorded.get("tokenizer_fingerprint"), source
    )
    if caution is not None:
        note(caution)
    filled, model_config = resolve_model_config(config, tokenizer, source)
    return RunInputs(filled, model_config, tokenizer)


def _recorded_settings(config: PretrainConfig) -> dict[str, Any]:
    """Return the settings of the newest readable checkpoint of the run to resume; empty if there is none.

    The run is checked when its checkpoint is loaded.
    """
    for place in _places_to_resume(config):
        with suppress(CheckpointError):
            return StoredCheckpoint(place, 0).trainer.get("settings", {})
    return {}


def _initial_model(config: PretrainConfig) -> ModelSource | None:
    """Return the model of transformers that the run to resume continues, as the run's folder keeps it.

    None for a run without a checkpoint, which starts with the weights of --from-weight again.
    """
    if config.from_weight is not None:
        for place in _places_to_resume(config):
            run = RunFolder(place.resolve().parent.parent)
            if (place / MANIFEST).is_file() and (found := open_initial(run)) is not None:
                return found
    return None


def _places_to_resume(config: PretrainConfig) -> list[Path]:
    """Return the paths that may be checkpoints of the run to resume, the newest first."""
    if config.resume is None:
        return []
    path = Path(config.output_dir if config.resume == AUTO else config.resume)
    checkpoints = [*stored_checkpoints(path), *stored_checkpoints(path / "checkpoints")]
    return [path, *(checkpoint.path for checkpoint in reversed(checkpoints))]


def resolve_batch_size_alone(inputs: RunInputs) -> RunInputs:
    """Return the inputs with a number for `--batch-size auto`, before the ranks are joined for a run."""
    if inputs.config.batch_size != AUTO:
        return inputs
    accelerator = start_accelerator(inputs.config)
    try:
        return inputs.with_batch_size(accelerator)
    finally:
        close_accelerator(accelerator)


@dataclass(frozen=True)
class TrainingParts:
    """Model and optimizer, prepared, and the batches they train on.

    Attributes:
        plan: batches of a step.
        model: prepared.
        optimizer: prepared.
        compiled: whether the model is compiled.
        loader: of the training split.
        graphs: CUDA graphs of a step; None without.
        custom_model: description of a model that is not exactly a MiniMindForCausalLM, else None.
        custom_names: see `CustomParts.names`.
    """

    plan: BatchPlan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compiled: bool
    loader: Loader
    graphs: StepGraphs | None
    custom_model: str | None
    custom_names: dict[str, str | None]

    def release(self) -> None:
        """Destroy the CUDA graphs, before the process group, and compiled code.

        Dynamo compiles the same code at most `recompile_limit` times, which runs of other sizes in this
        process would reach.
        """
        if self.graphs is not None:
            self.graphs.release()
        if self.compiled:
            torch.compiler.reset()


def build_training(
    inputs: RunInputs,
    shards: TokenShards,
    accelerator: Accelerator,
    *,
    tokens_per_epoch: int | None = None,
    weights: Sequence[float] = (),
    custom: CustomParts | None = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> TrainingParts:
    """Build model, optimizer and loader of a run; every rank must call this.

    Args:
        inputs: with a number as batch size.
        shards: of the training split.
        accelerator: of the run.
        tokens_per_epoch: about how many; decides whether compiling pays. None for a long run.
        weights: of the mixture.
        custom: parts of the caller; None for none.
        note: gets sentences for the user.

    Raises:
        ConfigError: for batches that the ranks cannot share, and options that the model does not support.
    """
    config, model_config, custom = inputs.config, inputs.model_config, custom or CustomParts()
    plan = plan_batches(config, accelerator.num_processes)
    if config.reduce_dtype != "float32" and accelerator.num_processes == 1:
        note(f"--reduce-dtype {config.reduce_dtype} has no effect: one process has no gradients to sum.")
    bare = build_model(config, model_config, custom.model_factory, note)
    # A subclass may compute anything.
    known = type(bare) in (MiniMindForCausalLM, TransformersModel)
    kind = None if known else type(bare).__qualname__
    description = None if kind is None else _describe(bare)
    tokens = None if tokens_per_epoch is None else max_training_tokens(config, plan, tokens_per_epoch)
    model, optimizer, compiled = compile_and_wrap(
        config,
        model_config,
        plan,
        accelerator,
        bare,
        tokens=tokens,
        optimizer_factory=custom.optimizer,
    )
    if config.mixed_precision == "fp8" and not compiled:
        note("--no-compile makes FP8 slow: the scaling is fused with other kernels only by compiling.")
    loader = inputs.loader(
        shards,
        plan,
        process_index=accelerator.process_index,
        device=accelerator.device,
        trim=not compiled,
        weights=weights,
    )
    graphs = build_graphs(config, model_config, model, optimizer, accelerator, compiled=compiled, note=note)
    names = custom.names(kind)
    return TrainingParts(plan, model, optimizer, compiled, loader, graphs, description, names)


def _describe(model: nn.Module) -> str:
    return f"{count(sum(tensor.numel() for tensor in model.parameters()))} parameters: {type(model).__name__}"


@contextmanager
def torch_for_training() -> Iterator[None]:
    """Train with gradients, in float32 and without the caller's autocast and default device.

    The settings of the caller are restored.

    Raises:
        ConfigError: while another call of `pretrain` runs in this process.
    """
    if not _RUNNING.acquire(blocking=False):
        raise ConfigError(
            "pretrain() is already running in this process; wait for it to end, or use another process."
        )
    with ExitStack() as settings:
        settings.callback(_RUNNING.release)
        settings.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                settings.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            # Slows every operation down, so only where it is needed.
            settings.enter_context(torch.device("cpu"))
        yield
