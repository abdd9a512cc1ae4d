"""Text continuation, one token at a time.

Shapes: T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .errors import ConfigError
from .modeling.kv_cache import KVCache
from .modeling.transformer import MiniMindForCausalLM


def generate(
    model: MiniMindForCausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return the token ids that continue a prompt, the end token included where the model wrote it.

    Fewer than `max_new_tokens` come back when the end token is drawn or the model's positions are used up.

    Args:
        model: in whatever mode it is; dropout is off here, and the mode is put back.
        input_ids: (1, T) prompt, T at least 1.
        max_new_tokens: tokens to write at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among so many of the most likely tokens; None draws among all.
        eos_token_id: stop after this token; None goes on.
        generator: source of the draws, on the model's device; None is torch's own.

    Raises:
        ConfigError: when the prompt is empty or leaves no position to write to.
    """
    length, positions = input_ids.shape[1], model.config.max_position_embeddings
    if length == 0:
        raise ConfigError("the prompt is empty; begin with at least the bos token.")
    if length >= positions:
        raise ConfigError(
            f"the prompt has {length} tokens, but the model has {positions} positions; shorten the prompt."
        )
    weight = model.get_output_embeddings().weight
    capacity = min(length + max_new_tokens, positions)
    cache = KVCache(model.config, capacity, device=weight.device, dtype=weight.dtype)
    new = input_ids.to(weight.device)
    written: list[int] = []
    was_training = model.training
    model.eval()
    try:
        # Lengths change with every token, so code compiled for the shapes of training does not fit.
        eager = torch.compiler.set_stance("force_eager") if model.compiled else nullcontext()
        with torch.inference_mode(), eager:
            while length + len(written) < capacity:
                logits = model(new, kv_cache=cache).logits[0, -1]
                token = _choose(logits.float(), temperature, top_k, generator)
                written.append(token)
                if token == eos_token_id:
                    break
                new = torch.tensor([[token]], device=weight.device)
    finally:
        model.train(was_training)
    return written


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """Return the id drawn from (V,) float32 logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.shape[0]:
        logits, ids = logits.topk(top_k)
    else:
        ids = torch.arange(logits.shape[0], device=logits.device)
    drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
    return int(ids[drawn])
