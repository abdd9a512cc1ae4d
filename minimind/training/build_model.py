"""The model that a run begins with: its shape from the options, its weights new or from a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config.options import ModelConfig, PretrainConfig
from ..config.schema import schema_of
from ..errors import ConfigError
from ..formats.huggingface import model_from_weights
from ..formats.open_model import open_model
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from ..tokenizer import Tokenizer, check_vocab

# What belongs to training and not to the weights.
_OF_TRAINING = ("dropout", "router_aux_loss_coef")
# What the model given to --from-weight decides.
_SHAPE = tuple(name for name in schema_of(ModelConfig) if name not in (*_OF_TRAINING, "from_weight"))

# Makes the model of a run from the shape that the options give; see `pretrain`.
ModelFactory = Callable[[MiniMindConfig], nn.Module]


def resolve_model_config(
    config: PretrainConfig, tokenizer: Tokenizer
) -> tuple[PretrainConfig, MiniMindConfig]:
    """Return the configuration with every size of the model filled in, and the shape itself.

    Sizes come from the model of --from-weight where there is one; an option that was changed from its
    default and says otherwise is refused.

    Raises:
        ConfigError: for sizes that contradict that model, or a vocabulary that the tokenizer exceeds.
    """
    of_training: dict[str, Any] = {name: getattr(config, name) for name in _OF_TRAINING}
    if config.from_weight is not None:
        shape = dataclasses.replace(open_model(config.from_weight).config, **of_training)
        _refuse_other_sizes(config, shape)
        check_vocab(tokenizer, shape.vocab_size, config.from_weight)
    else:
        vocab_size = config.vocab_size if config.vocab_size is not None else tokenizer.vocab_size
        check_vocab(tokenizer, vocab_size)
        sizes = {name: getattr(config, name) for name in _SHAPE} | {"vocab_size": vocab_size}
        shape = MiniMindConfig(
            **sizes,
            **of_training,
            max_position_embeddings=max(
                MiniMindConfig.max_position_embeddings, _next_power_of_two(config.max_seq_len)
            ),
        )
    if config.max_seq_len > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-seq-len {config.max_seq_len} is more than the {shape.max_position_embeddings} positions "
            f"of the model in {config.from_weight}; lower it."
        )
    bos = tokenizer.bos_token_id
    filled = dataclasses.replace(config, **{name: getattr(shape, name) for name in _SHAPE})
    return filled, dataclasses.replace(
        shape,
        bos_token_id=bos if bos is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(
    config: PretrainConfig,
    shape: MiniMindConfig,
    factory: ModelFactory = MiniMindForCausalLM,
    note: Callable[[str], None] = lambda sentence: None,
) -> nn.Module:
    """Return the model with its first weights, in float32 on the CPU: the same in every process.

    Args:
        config: the seed of new weights, or the folder that holds others.
        shape: every size filled in.
        factory: makes the model; it may use the generator of `torch.manual_seed`, which is seeded.
        note: gets what was assumed of the model of --from-weight, or passed over there.

    Raises:
        UserError: when the model of --from-weight cannot be read.
        ConfigError: when the model has not what an option asks for.
    """
    torch.manual_seed(config.seed)
    model = factory(shape)
    if not isinstance(model, MiniMindForCausalLM):
        _refuse_what_only_ours_has(config, model)
    # Of a subclass too nobody knows what it computes.
    if config.sample_interval is not None and type(model) is not MiniMindForCausalLM:
        raise ConfigError(
            f"--sample-interval writes with MiniMindForCausalLM, and the model is a {type(model).__name__}; "
            "leave the option out."
        )
    if config.from_weight is not None:
        source = open_model(config.from_weight)
        for sentence in source.notes:
            note(f"--from-weight: {sentence}")
        stored = model_from_weights(shape, source.weights(), config.from_weight).state_dict()
        if factory is not MiniMindForCausalLM:
            _refuse_other_weights(config, model, stored)
        model.load_state_dict(stored)
    return model


def _refuse_what_only_ours_has(config: PretrainConfig, model: nn.Module) -> None:
    asked = {
        "--compile": config.compile,
        "--activation-checkpointing": config.activation_checkpointing,
        "--use-moe": config.use_moe,
    }
    problems = [
        f"{flag} is done inside MiniMindForCausalLM, and the model is a {type(model).__name__}; leave the "
        "option out and do it in the model's own code."
        for flag, wanted in asked.items()
        if wanted
    ]
    if problems:
        raise ConfigError(problems)


def _refuse_other_weights(config: PretrainConfig, model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in stored.items()}:
        raise ConfigError(
            f"--from-weight {config.from_weight} holds other weights than a {type(model).__name__} has; "
            "leave the option out and load them where the model is made."
        )


def _refuse_other_sizes(config: PretrainConfig, shape: MiniMindConfig) -> None:
    settings = schema_of(ModelConfig)
    problems = [
        f"{settings[name].flag} {getattr(config, name)} contradicts --from-weight {config.from_weight}, "
        f"where it is {getattr(shape, name)}; leave the option out."
        for name in _SHAPE
        if getattr(config, name) not in (getattr(shape, name), settings[name].default)
    ]
    if problems:
        raise ConfigError(problems)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
