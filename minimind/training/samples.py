"""Text samples of the model during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.state_dict import gather_weights
from ..errors import ConfigError
from ..formats.huggingface import model_from_weights
from ..formats.open_model import CausalLM
from ..formats.transformers_folder import load_model
from ..generation.text import encode_prompt
from ..modeling.config import MiniMindConfig
from ..modeling.transformers_config import TransformersConfig
from ..tokenizer import Tokenizer

SAMPLE_TOKENS = 64


def check_prompts(prompts: Sequence[str], max_tokens: int, tokenizer: Tokenizer) -> None:
    """Refuse prompts that leave no position to generate.

    Raises:
        ConfigError: with the length of the first such prompt.
    """
    for prompt in prompts:
        if (length := len(encode_prompt(tokenizer, prompt))) >= max_tokens:
            raise ConfigError(
                f"--sample-prompt '{prompt[:20]}...' has {length} tokens, but the model has {max_tokens} "
                "positions; shorten it."
            )


def gathered_model(
    accelerator: Accelerator, model_config: MiniMindConfig, model: nn.Module
) -> CausalLM | None:
    """Return a copy of the model in training, on its device, or None on other ranks than the main process.

    Every rank must call this. The weights are gathered as for a checkpoint, with one process, DDP and FSDP2
    alike: the training model and its random state are not touched. This takes the memory of the weights once
    more on the device.
    """
    weights = gather_weights(accelerator, model)
    if weights is None:
        return None
    half = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    copied: CausalLM
    if isinstance(model_config, TransformersConfig):
        copied = load_model(model_config, weights)
    else:
        copied = model_from_weights(model_config, weights, "the model in training")
    return copied.to(accelerator.device, torch.bfloat16 if half else torch.float32).eval()
