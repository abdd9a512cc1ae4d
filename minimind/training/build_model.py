"""Model and optimizer of a run: sizes from the options, initial weights, compilation, Accelerate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config.naming import flag_of
from ..config.options import ModelConfig, PretrainConfig
from ..config.schema import schema_of
from ..data.batch_plan import BatchPlan
from ..distributed.accelerator import cast_weights_only, prepare, wants_compile
from ..distributed.consistency import check_same_on_all_ranks, weights_fingerprint
from ..errors import ConfigError
from ..formats.open_model import ModelSource, open_model
from ..formats.transformers_folder import load_model
from ..formats.transformers_model import TransformersModel
from ..launch_env import is_set
from ..modeling import float8
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.transformer import MiniMindForCausalLM
from ..modeling.transformers_config import TransformersConfig
from ..optim.build import OptimizerFactory, build_custom_optimizer, build_optimizer
from ..tokenizer import Tokenizer, check_vocab
from .compilation import compile_mode, compiling_pays, uses_kernels

# Options of training, which do not change the weights.
_TRAINING_OPTIONS = ("dropout", "router_aux_loss_coef")
# Options that the model of --from-weight determines.
_MODEL_OPTIONS = tuple(
    name for name in schema_of(ModelConfig) if name not in (*_TRAINING_OPTIONS, "from_weight")
)

# Builds the model of a run from its sizes; see `pretrain`.
ModelFactory = Callable[[MiniMindConfig], nn.Module]


def resolve_model_config(
    config: PretrainConfig, tokenizer: Tokenizer, source: ModelSource | None = None
) -> tuple[PretrainConfig, MiniMindConfig]:
    """Return the configuration with every size of the model filled in, and the model's configuration.

    With --from-weight the sizes are those of that model; an option that contradicts them is refused.

    Args:
        config: options of the run.
        tokenizer: of the run.
        source: what is at --from-weight; None opens it.

    Raises:
        ConfigError: for sizes that contradict that model or --mixed-precision fp8, or a vocabulary smaller
            than the tokenizer's.
    """
    training_options: dict[str, Any] = {name: getattr(config, name) for name in _TRAINING_OPTIONS}
    if config.from_weight is not None:
        source = open_model(config.from_weight) if source is None else source
        model_config = dataclasses.replace(source.config, **training_options)
        _check_same_sizes(config, model_config)
        check_vocab(tokenizer, model_config.vocab_size, config.from_weight)
    else:
        vocab_size = config.vocab_size if config.vocab_size is not None else tokenizer.vocab_size
        check_vocab(tokenizer, vocab_size)
        given = {name: getattr(config, name) for name in _MODEL_OPTIONS}
        sizes = {name: value for name, value in given.items() if value is not None}
        sizes["vocab_size"] = vocab_size
        positions = max(MiniMindConfig.max_position_embeddings, _next_power_of_two(config.max_seq_len))
        try:
            model_config = MiniMindConfig(**sizes, **training_options, max_position_embeddings=positions)
        except ConfigError as error:
            raise ConfigError([_with_flags(problem) for problem in error.problems]) from None
    if config.max_seq_len > model_config.max_position_embeddings:
        raise ConfigError(
            f"--max-seq-len {config.max_seq_len} is more than the {model_config.max_position_embeddings} "
            f"positions of the model in {config.from_weight}; lower it."
        )
    if config.mixed_precision == "fp8" and (problems := [*_float8_problems(model_config)]):
        raise ConfigError(problems)
    bos = tokenizer.bos_token_id
    filled = dataclasses.replace(config, **{name: getattr(model_config, name) for name in _MODEL_OPTIONS})
    return filled, dataclasses.replace(
        model_config,
        bos_token_id=bos if bos is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _with_flags(problem: str) -> str:
    """Name the options that set the sizes of the model."""
    problem = problem.replace("max_position_embeddings", "max_seq_len, rounded up to a power of two,")
    return re.sub(r"\b[a-z]+_[a-z_]+\b", lambda name: flag_of(name[0]), problem)


def build_model(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    factory: ModelFactory = MiniMindForCausalLM,
    note: Callable[[str], None] = lambda sentence: None,
) -> nn.Module:
    """Return the model with its initial weights, in float32 on the CPU, the same on every rank.

    Args:
        config: seed of random weights, or the path of --from-weight.
        model_config: every size filled in.
        factory: builds the model; `torch.manual_seed` was called before.
        note: gets sentences about what the weight files leave open.

    Raises:
        UserError: when the model of --from-weight cannot be read.
        ConfigError: for an option that the model does not support.
    """
    torch.manual_seed(config.seed)
    if isinstance(model_config, TransformersConfig):
        return _build_of_transformers(config, model_config, factory, note)
    model = factory(model_config)
    if not isinstance(model, MiniMindForCausalLM):
        _check_custom_model(config, model)
    # A subclass may compute anything.
    if type(model) is not MiniMindForCausalLM:
        for flag, value in (("sample", config.sample_interval), ("score", config.score_interval)):
            if value is not None:
                raise ConfigError(
                    f"--{flag}-interval generates with MiniMindForCausalLM, not with a "
                    f"{type(model).__name__}; omit the option."
                )
    if config.from_weight is not None:
        source = open_model(config.from_weight)
        for sentence in source.notes:
            note(f"--from-weight: {sentence}")
        stored = source.load(model_config).state_dict()
        _check_finite(config, stored)
        if factory is not MiniMindForCausalLM:
            _check_same_tensors(config, model, stored)
        model.load_state_dict(stored)
    return model


def _build_of_transformers(
    config: PretrainConfig,
    model_config: TransformersConfig,
    factory: ModelFactory,
    note: Callable[[str], None],
) -> TransformersModel:
    """Return a model that transformers computes; see `build_model`."""
    if factory is not MiniMindForCausalLM:
        raise ConfigError(
            f"--from-weight {config.from_weight} is a {model_config.architecture}, which transformers "
            "builds; omit the option, or the model factory."
        )
    if config.compile:
        raise ConfigError(
            f"--compile is not implemented for a {model_config.architecture} of transformers; omit it."
        )
    if model_config.resumed:
        model = load_model(model_config)
    else:
        assert config.from_weight is not None
        loaded = open_model(config.from_weight).load(model_config)
        assert isinstance(loaded, TransformersModel)
        model = loaded
        _check_finite(config, dict(model.named_parameters()))
    for sentence in model.notes if config.packing else ():
        note(sentence)
    if model_config.active_parameters < model_config.parameters:
        note(f"the experts of a {model_config.architecture} are trained without a load-balancing loss.")
    if config.activation_checkpointing:
        model.recompute_activations()
    return model


def _check_custom_model(config: PretrainConfig, model: nn.Module) -> None:
    asked = {
        "--compile": config.compile,
        "--activation-checkpointing": config.activation_checkpointing,
        "--use-moe": config.use_moe,
        "--mixed-precision fp8": config.mixed_precision == "fp8",
    }
    problems = [
        f"{flag} is implemented in MiniMindForCausalLM, and the model is a {type(model).__name__}; omit the "
        "option and implement it in the model."
        for flag, is_set in asked.items()
        if is_set
    ]
    if problems:
        raise ConfigError(problems)


def _check_finite(config: PretrainConfig, stored: Mapping[str, torch.Tensor]) -> None:
    damaged = next((name for name, tensor in stored.items() if not tensor.isfinite().all()), None)
    if damaged is not None:
        raise ConfigError(
            f"--from-weight {config.from_weight}: {damaged} contains NaN or infinity, and nothing can be "
            "trained from it; use an earlier checkpoint or another copy."
        )


def _check_same_tensors(config: PretrainConfig, model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in stored.items()}:
        raise ConfigError(
            f"--from-weight {config.from_weight} holds other tensors than a {type(model).__name__} has; "
            "omit the option and load them in the model factory."
        )


def _check_same_sizes(config: PretrainConfig, model_config: MiniMindConfig) -> None:
    settings = schema_of(ModelConfig)
    problems = [
        f"{' '.join(settings[name].spell(given))} contradicts --from-weight {config.from_weight}, where "
        f"it is {getattr(model_config, name)}; omit the option, or the preset that sets it."
        for name in _MODEL_OPTIONS
        if (given := getattr(config, name)) not in (None, getattr(model_config, name))
    ]
    if problems:
        raise ConfigError(problems)


def _float8_problems(model_config: MiniMindConfig) -> Iterator[str]:
    """Yield why a model cannot be trained in FP8, or not as it was launched."""
    if isinstance(model_config, TransformersConfig):
        yield (
            "--mixed-precision fp8 is implemented for minimind's own models, not for a "
            f"{model_config.architecture} of transformers; use bf16."
        )
        return
    if is_set("ACCELERATE_USE_FSDP"):
        yield "--mixed-precision fp8 is not supported with FSDP2; use bf16, or launch without --use_fsdp."
    if model_config.use_moe:
        yield "--mixed-precision fp8 is not implemented for experts; use bf16, or omit --use-moe."
    reason = unsupported_reason("bf16", model_config.head_dim, model_config.dropout)
    if reason is not None:
        yield f"--mixed-precision fp8 needs the fused attention kernels, and {reason}; use bf16."
    d = model_config.head_dim
    sizes = {
        "--hidden-size": model_config.hidden_size,
        "--intermediate-size": model_config.intermediate_size,
        "--num-attention-heads x --head-dim": model_config.num_attention_heads * d,
        "--num-key-value-heads x --head-dim": model_config.num_key_value_heads * d,
    }
    for flag, size in sizes.items():
        if size % float8.ALIGNMENT:
            yield (
                f"--mixed-precision fp8 needs sizes that are multiples of {float8.ALIGNMENT}, and {flag} is "
                f"{size}; change it, or use bf16."
            )


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def compile_and_wrap(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    plan: BatchPlan,
    accelerator: Accelerator,
    model: nn.Module | None = None,
    *,
    tokens: int | None = None,
    optimizer_factory: OptimizerFactory | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, bool]:
    """Compile the model if that pays, build its optimizer and prepare both with Accelerate.

    Args:
        plan: batches of a step.
        model: not prepared yet; built from `model_config` where None.
        tokens: input tokens of the whole run, which decide whether compiling pays; None for a long run.
        optimizer_factory: builds the optimizer in place of --optimizer.

    Returns:
        Model and optimizer, prepared, and whether the model is compiled.
    """
    model = build_model(config, model_config) if model is None else model
    pays = tokens is None or compiling_pays(config, model_config, accelerator, model, tokens)
    compiled = wants_compile(config, accelerator, pays=pays)
    fused = uses_kernels(config, model_config, accelerator, model)
    if isinstance(model, MiniMindForCausalLM):
        model.model.recompute = config.activation_checkpointing
        if config.mixed_precision == "fp8":
            model.train_in_float8()
        model.gathered_dtype = cast_weights_only(accelerator)
        if compiled:
            model.compile_for_training(compile_mode(config, accelerator.num_processes, fused=fused))
    else:
        compiled = False
        if isinstance(model, TransformersModel):  # whose modules may all be in half precision
            cast_weights_only(accelerator)
    if optimizer_factory is not None:
        optimizer = build_custom_optimizer(optimizer_factory, model, config)
    else:
        group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
        optimizer = build_optimizer(
            model, config, accelerator.device, kernels=compiled or fused, process_group=group
        )
    check_same_on_all_ranks(
        accelerator,
        {"starting weights": weights_fingerprint(model), "compilation": "on" if compiled else "off"},
    )
    tied = model_config.tie_word_embeddings and isinstance(model, MiniMindForCausalLM)
    prepared_model, prepared_optimizer = prepare(
        accelerator,
        model,
        optimizer,
        tied=model.tied if isinstance(model, TransformersModel) else tied,
        accumulation_steps=plan.accumulation_steps,
        reduce_dtype=config.reduce_dtype,
    )
    return prepared_model, prepared_optimizer, compiled
