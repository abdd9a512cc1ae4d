"""Estimates the GPU memory of a training run before anything is allocated.

The peak is either at the start of the backward pass, with all activations of a micro-batch stored, or at its
end, with all gradients; in between activations are freed as gradients are computed. The CUDA context and
fragmentation of the allocator (about 1 GB) come on top.

N tokens of a micro-batch, C hidden, H heads, K kv heads, D head dim, F inner, V vocabulary. With experts F
is the sum over the experts of a token; the estimate is then rougher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..modeling.config import MiniMindConfig

# How the model is compiled: `MiniMindForCausalLM.compile_for_training`, or not at all.
Compiled = Literal["whole", "blocks", "no"]

_FLOAT = 4
_INDEX = 8
# Workspace of matrix products on a Hopper GPU, and small tensors that are not counted here.
_WORKSPACE = 64 << 20
# Logits that the loss holds at once on a GPU; see `modeling.loss`.
_LOGITS_AT_ONCE = 1 << 26
# Muon stacks gradients and momentum of equal shapes, at most so many elements (see `optim.matrix_batches`),
# and iterates on copies: six matrices in fp16, and without its kernels float32 input and output, twice.
_MUON_BATCH = 1 << 26
_MUON_ITERATES, _MUON_COPIES = 6 * 2, 4 * _FLOAT
# Batches of orthogonal factors, in fp16, that processes have gathered and not applied yet.
_GATHERED_BATCHES = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        weights: the parameters in float32.
        weight_copies: the same in half precision, kept for the backward pass.
        gradients: in float32.
        activations: stored by the forward pass of one micro-batch for the backward pass.
        working: temporary memory on top of the activations, in the loss or in one block.
        optimizer_working: temporary memory of the optimizer step.
        gradients_stay: whether gradients exist while activations are stored, from the micro-batch before or
            in the buckets of DDP.
        gradients_twice: whether a micro-batch computes all its gradients before they are accumulated.
    """

    weights: int
    weight_copies: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    optimizer_working: int
    gradients_stay: bool
    gradients_twice: bool

    @property
    def peak(self) -> int:
        """Peak memory."""
        always = self.weights + self.optimizer + _WORKSPACE
        begin = self.weight_copies + self.activations + self.working
        begin += self.gradients if self.gradients_stay else 0
        end = self.gradients * (2 if self.gradients_twice else 1)
        step = self.gradients + self.optimizer_working
        return always + max(begin, end, step)


def activation_bytes_per_token_layer(
    model_config: MiniMindConfig, *, half: bool, compiled: Compiled, seq_len: int, fused: bool = False
) -> int:
    """Return the bytes per token that one block stores for the backward pass.

    This mirrors what the modules save; `tests/planning/test_memory.py` compares it with the tensors that
    autograd holds. Change it with the model.

    Args:
        half: matrix products in bf16 or fp16, else all in float32.
        compiled: a compiled block recomputes cheap values instead of storing them.
        seq_len: sequence length, for the mask of a block that is not compiled.
    """
    c, f = model_config.hidden_size, _inner_width(model_config)
    q, kv = (
        heads * model_config.head_dim
        for heads in (model_config.num_attention_heads, model_config.num_key_value_heads)
    )
    low = 2 if half else _FLOAT
    # 1 / rms in float32, of both norms and of each head; the log of each head's softmax sum.
    small = _FLOAT * (2 + 2 * model_config.num_attention_heads + model_config.num_key_value_heads)
    experts = 0
    if model_config.use_moe:
        k = model_config.num_experts_per_tok
        # Tokens sorted by expert, and their outputs; no kernel recomputes silu(gate)·up.
        experts = low * (2 * k * c + (f if fused else 0))
        # Probabilities, weights and indices of experts, and the permutation of tokens and its inverse.
        experts += _FLOAT * (model_config.num_experts + k) + 3 * _INDEX * k
    if fused:
        # Outputs of both norms, of the projections q, k, v, gate and up, and of attention; 1 / rms of both
        # norms and the log of each head's softmax sum.
        return (
            low * (2 * c + 2 * q + 2 * kv + 2 * f) + _FLOAT * (2 + model_config.num_attention_heads) + experts
        )
    # What the attention kernel keeps: queries and keys as rotated, values, and its own result.
    kernel = low * (2 * q + 2 * kv)
    if compiled == "no":
        stream = 2 * _FLOAT * c + 2 * _FLOAT * c  # before and after each norm's division
        inputs = low * 5 * c if half else low * 2 * c  # one cast each for q, k, v, gate and up
        if half and model_config.use_moe:
            inputs = low * 3 * c + _FLOAT * c  # the router, not cast, replaces gate and up
        heads = 2 * _FLOAT * (q + kv)  # before and after the division in the norms of heads
        inner = low * 4 * f  # gate, silu(gate), up and their product
        # On a GPU, a masked kernel takes keys and values for every query head and the mask as numbers.
        kernel += low * 2 * (q - kv) + low * seq_len
        return stream + inputs + heads + kernel + inner + small + experts
    # One graph stores the stream before both norms, a graph a block the first one and what attention added.
    stream = 2 * _FLOAT * c if compiled == "whole" else _FLOAT * c + low * c
    inputs = low * 2 * c  # the results of both norms
    heads = low * (q + kv)  # queries and keys before their norms
    inner = low * 3 * f  # gate, up and silu(gate)·up
    return stream + inputs + heads + kernel + inner + small + experts


def estimate_memory(
    model_config: MiniMindConfig,
    *,
    sequences: int,
    seq_len: int,
    precision: str,
    compiled: Compiled,
    optimizer: str,
    accumulation_steps: int = 1,
    num_processes: int = 1,
    shards: int = 1,
    recompute: bool = False,
    fused: bool = False,
) -> MemoryEstimate:
    """Return the memory that training takes on one GPU.

    Args:
        sequences: of a micro-batch.
        seq_len: sequence length in tokens.
        precision: of matrix products: `no`, `bf16` or `fp16`.
        optimizer: `adamw` or `muon`.
        shards: FSDP2 shards of weights, gradients and optimizer state; a rougher estimate.
        recompute: --activation-checkpointing.
    """
    tokens, layers = sequences * seq_len, model_config.num_hidden_layers
    c, f, vocabulary = model_config.hidden_size, _inner_width(model_config), model_config.vocab_size
    half = precision != "no"
    low = 2 if half else _FLOAT
    parameters, matrices = model_config.num_parameters(), _block_matrices(model_config)
    # Gathered by FSDP: the current and the next block, embedding and LM head; else all matrices of blocks.
    gathered = 2 * matrices // layers + parameters - matrices if shards > 1 else matrices

    block = activation_bytes_per_token_layer(
        model_config, half=half, compiled=compiled, seq_len=seq_len, fused=fused
    )
    kept = (low if fused else _FLOAT) * c if recompute else block
    again = block * tokens if recompute else 0
    if fused:
        last = low * c
        # Of the residual stream and what is added to it, of SwiGLU's output, gate and up; and that output.
        gradients = low * tokens * (2 * c + 4 * f)
    else:
        # After the last block: one graph stores what the block adds, otherwise the norm stores two float32.
        last = low * c if compiled == "whole" else 2 * _FLOAT * c
        # Of the residual stream twice, of gate and up.
        gradients = tokens * (2 * _FLOAT * c + 2 * low * f)
    backward = gradients + _FLOAT * vocabulary * c + again
    return MemoryEstimate(
        weights=_FLOAT * parameters // shards,
        weight_copies=low * gathered if half or shards > 1 else 0,
        gradients=_FLOAT * parameters // shards,
        optimizer=optimizer_bytes(model_config, optimizer) // shards,
        activations=tokens * (layers * kept + last),
        working=max(backward, _loss_bytes(tokens, c, vocabulary, low, compiled)),
        optimizer_working=_muon_bytes(model_config, fused, num_processes if shards == 1 else 1)
        if optimizer != "adamw"
        else 0,
        gradients_stay=accumulation_steps > 1 or (num_processes > 1 and shards == 1),
        gradients_twice=accumulation_steps > 1 and compiled == "whole",
    )


def optimizer_bytes(model_config: MiniMindConfig, optimizer: str) -> int:
    """Return the bytes of optimizer state: two numbers per parameter, one with Muon inside blocks."""
    both = 2 * _FLOAT * model_config.num_parameters()
    return both if optimizer == "adamw" else both - _FLOAT * _block_matrices(model_config)


def _muon_bytes(model_config: MiniMindConfig, kernels: bool, ranks: int) -> int:
    """Return the temporary memory of Muon's step, in which `ranks` share the orthogonalization."""
    one = _inner_weights(model_config) // 3
    # Gate and up of all blocks have the same shape.
    batch = min(2 * model_config.num_hidden_layers * one, max(_MUON_BATCH, one))
    gathered = min(_GATHERED_BATCHES * batch * ranks, _block_matrices(model_config)) if ranks > 1 else 0
    return (_MUON_ITERATES + (0 if kernels else _MUON_COPIES)) * batch + 2 * gathered


def _inner_width(model_config: MiniMindConfig) -> int:
    """Return F."""
    if not model_config.use_moe:
        return model_config.intermediate_size
    assert model_config.moe_intermediate_size is not None
    return model_config.num_experts_per_tok * model_config.moe_intermediate_size


def _inner_weights(model_config: MiniMindConfig) -> int:
    """Return the parameters of the feed-forward matrices, or of all experts, in one block."""
    stacked = model_config.num_experts / model_config.num_experts_per_tok if model_config.use_moe else 1
    return round(3 * model_config.hidden_size * _inner_width(model_config) * stacked)


def _block_matrices(model_config: MiniMindConfig) -> int:
    """Return the parameters of all matrices inside the blocks except routers, which stay in float32."""
    c, d = model_config.hidden_size, model_config.head_dim
    attention = 2 * c * d * (model_config.num_attention_heads + model_config.num_key_value_heads)
    return model_config.num_hidden_layers * (attention + _inner_weights(model_config))


def _loss_bytes(tokens: int, c: int, vocabulary: int, low: int, compiled: Compiled) -> int:
    """Return the peak memory of the loss: while it computes logits in chunks, or when it joins the chunks."""
    piece = min(tokens, 1 << max((_LOGITS_AT_ONCE // vocabulary).bit_length() - 1, 0))
    # Compiled, logits and their gradient in half precision; otherwise also the softmax in float32.
    logits = piece * vocabulary * (2 * low if compiled != "no" else _FLOAT + 2 * low)
    matrix = vocabulary * c * (_FLOAT + low)
    return matrix + _FLOAT * c * tokens + max(logits + _FLOAT * c * tokens, 2 * _FLOAT * c * tokens)
