"""The model that a run begins with: its shape from the options, its weights new or from a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .config import ModelOptions, PretrainConfig
from .errors import ConfigError
from .formats.qwen3 import load_config, load_model
from .model_config import MiniMindConfig
from .modeling.transformer import MiniMindForCausalLM
from .settings import settings_of
from .tokenizer import Tokenizer, check_vocab

# What a folder given to --from-weight decides; dropout is of training, not of the weights.
_SHAPE = tuple(name for name in settings_of(ModelOptions) if name not in ("dropout", "from_weight"))


def resolve_shape(config: PretrainConfig, tokenizer: Tokenizer) -> tuple[PretrainConfig, MiniMindConfig]:
    """Return the configuration with every size of the model filled in, and the shape itself.

    Sizes come from the folder of --from-weight where there is one; an option that was changed from its
    default and says otherwise is refused.

    Raises:
        ConfigError: for sizes that contradict the folder, or a vocabulary that the tokenizer exceeds.
    """
    if config.from_weight is not None:
        shape = dataclasses.replace(load_config(Path(config.from_weight)), dropout=config.dropout)
        _refuse_other_sizes(config, shape)
        check_vocab(tokenizer, shape.vocab_size)
    else:
        vocab_size = config.vocab_size if config.vocab_size is not None else tokenizer.vocab_size
        check_vocab(tokenizer, vocab_size)
        sizes = {name: getattr(config, name) for name in _SHAPE} | {"vocab_size": vocab_size}
        shape = MiniMindConfig(
            **sizes,
            dropout=config.dropout,
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


def make_model(config: PretrainConfig, shape: MiniMindConfig) -> MiniMindForCausalLM:
    """Return the model with its first weights, in float32 on the CPU: the same in every process.

    Raises:
        ConfigError: when the folder of --from-weight cannot be read.
    """
    if config.from_weight is None:
        torch.manual_seed(config.seed)
        return MiniMindForCausalLM(shape)
    stored = load_model(Path(config.from_weight))
    model = MiniMindForCausalLM(shape)
    model.load_state_dict(stored.state_dict())
    return model


def _refuse_other_sizes(config: PretrainConfig, shape: MiniMindConfig) -> None:
    settings = settings_of(ModelOptions)
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
