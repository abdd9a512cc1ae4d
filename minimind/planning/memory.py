"""How much memory of a GPU a training run takes, worked out before anything is allocated.

The peak comes either when the backward pass begins, with all activations of a micro-batch stored, or at its
end, with all gradients there; between the two the one makes room for the other. What the CUDA context and
unused pieces of the allocator take (about 1 GB) comes on top.

N tokens of a micro-batch, C hidden, H heads, K kv heads, D head dim, F inner, V vocabulary. With experts F
stands for the inner values of all that a token passes; the estimate is then a rougher one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..modeling.config import MiniMindConfig

# How the model is compiled: `MiniMindForCausalLM.compile_for_training`, or not at all.
Compiled = Literal["whole", "blocks", "no"]

_FLOAT = 4
_INDEX = 8
# What matrix products on a Hopper GPU set aside, with the small tensors that are not counted here.
_WORKSPACE = 64 << 20
# Logits that the loss holds at once on a GPU; see `modeling.loss`.
_LOGITS_AT_ONCE = 1 << 26
# Muon stacks gradients and momentum of equal shapes, and iterates on copies: float32 in and out, twice, and
# four matrices in bf16.
_MUON_WORK = 4 * _FLOAT + 4 * 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        weights: the parameters in float32.
        weight_copies: the same in half precision, kept for the backward pass.
        gradients: in float32.
        optimizer: what it remembers.
        activations: what the forward pass of one micro-batch stores for the backward pass.
        working: the most that comes and goes on top of the activations, in the loss or in one block.
        optimizer_working: the most that comes and goes while the optimizer steps.
        gradients_stay: there are gradients while activations are stored, from the micro-batch before or in
            the buckets of DDP.
        gradients_twice: a micro-batch makes all its gradients before they are added to those that stay.
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
        """The most held at one time."""
        always = self.weights + self.optimizer + _WORKSPACE
        begin = self.weight_copies + self.activations + self.working
        begin += self.gradients if self.gradients_stay else 0
        end = self.gradients * (2 if self.gradients_twice else 1)
        step = self.gradients + self.optimizer_working
        return always + max(begin, end, step)


def activation_bytes_per_token_layer(
    shape: MiniMindConfig, *, half: bool, compiled: Compiled, seq_len: int, fused: bool = False
) -> int:
    """Return the bytes that one block keeps of one token for the backward pass.

    The one place that follows what the modules save; `tests/planning/test_memory.py` counts the tensors that
    autograd holds and compares. Change it with the model.

    Args:
        shape: of the model.
        half: products in bf16 or fp16, else all in float32.
        compiled: a compiled block computes cheap values again instead of keeping them.
        seq_len: tokens of a row, for the mask of a block that is not compiled.
        fused: the kernels of `modeling.fused` are used.
    """
    c, f = shape.hidden_size, _inner_width(shape)
    q, kv = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    low = 2 if half else _FLOAT
    # 1 / rms in float32, of both norms and of each head; the log of each head's softmax sum.
    small = _FLOAT * (2 + 2 * shape.num_attention_heads + shape.num_key_value_heads)
    experts = 0
    if shape.use_moe:
        k = shape.num_experts_per_tok
        # Rows sorted by expert, and those that come back; there is no kernel that makes silu(gate)·up again.
        experts = low * (2 * k * c + (f if fused else 0))
        # Probabilities and weights of experts, which they are, and the order of rows there and back.
        experts += _FLOAT * (shape.num_experts + k) + 3 * _INDEX * k
    if fused:
        # The results of both norms, of the products for queries, keys and values and for gate and up, and of
        # attention; 1 / rms of both norms and the log of each head's softmax sum.
        return low * (2 * c + 2 * q + 2 * kv + 2 * f) + _FLOAT * (2 + shape.num_attention_heads) + experts
    # What the attention kernel keeps: queries and keys as rotated, values, and its own result.
    kernel = low * (2 * q + 2 * kv)
    if compiled == "no":
        stream = 2 * _FLOAT * c + 2 * _FLOAT * c  # before and after each norm's division
        inputs = low * 5 * c if half else low * 2 * c  # a cast of its own for each of q, k, v, gate and up
        if half and shape.use_moe:
            inputs = low * 3 * c + _FLOAT * c  # of the last two the router's, which is none
        heads = 2 * _FLOAT * (q + kv)  # before and after the division of the norms of heads
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
    shape: MiniMindConfig,
    *,
    rows: int,
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
    """Return what training takes on one GPU of those that share the work.

    Args:
        shape: of the model.
        rows: of a micro-batch.
        seq_len: tokens of a row.
        precision: of the matrix products: `no`, `bf16` or `fp16`.
        compiled: how.
        optimizer: `adamw` or `muon`.
        accumulation_steps: micro-batches of a step.
        num_processes: GPUs.
        shards: into so many FSDP2 divides weights, gradients and moments; a rougher estimate.
        recompute: --activation-checkpointing.
        fused: the kernels of `modeling.fused` are used.
    """
    tokens, layers = rows * seq_len, shape.num_hidden_layers
    c, f, vocabulary = shape.hidden_size, _inner_width(shape), shape.vocab_size
    half = precision != "no"
    low = 2 if half else _FLOAT
    parameters, matrices = shape.num_parameters(), _block_matrices(shape)
    # Gathered: the block at work and the next one, with embedding and output; else all blocks' matrices.
    at_hand = 2 * matrices // layers + parameters - matrices if shards > 1 else matrices

    block = activation_bytes_per_token_layer(
        shape, half=half, compiled=compiled, seq_len=seq_len, fused=fused
    )
    kept = (low if fused else _FLOAT) * c if recompute else block
    again = block * tokens if recompute else 0
    if fused:
        last = low * c
        # Of the stream and what is added to it, of SwiGLU's inner values, gate and up; and those values.
        gradients = low * tokens * (2 * c + 4 * f)
    else:
        # After the last block: one graph keeps what it added, otherwise the norm keeps its two float32.
        last = low * c if compiled == "whole" else 2 * _FLOAT * c
        # Of the stream twice, of gate and up.
        gradients = tokens * (2 * _FLOAT * c + 2 * low * f)
    backward = gradients + _FLOAT * vocabulary * c + again
    return MemoryEstimate(
        weights=_FLOAT * parameters // shards,
        weight_copies=low * at_hand if half or shards > 1 else 0,
        gradients=_FLOAT * parameters // shards,
        optimizer=optimizer_bytes(shape, optimizer) // shards,
        activations=tokens * (layers * kept + last),
        working=max(backward, _loss_bytes(tokens, c, vocabulary, low, compiled)),
        optimizer_working=_MUON_WORK * 2 * layers * _inner_weights(shape) // 3 if optimizer == "muon" else 0,
        gradients_stay=accumulation_steps > 1 or (num_processes > 1 and shards == 1),
        gradients_twice=accumulation_steps > 1 and compiled == "whole",
    )


def optimizer_bytes(shape: MiniMindConfig, optimizer: str) -> int:
    """Return the bytes of what the optimizer remembers: two numbers a parameter, by Muon one in blocks."""
    both = 2 * _FLOAT * shape.num_parameters()
    return both - _FLOAT * _block_matrices(shape) if optimizer == "muon" else both


def _inner_width(shape: MiniMindConfig) -> int:
    """Return F: the inner values of one token in a block."""
    if not shape.use_moe:
        return shape.intermediate_size
    assert shape.moe_intermediate_size is not None
    return shape.num_experts_per_tok * shape.moe_intermediate_size


def _inner_weights(shape: MiniMindConfig) -> int:
    """Return the parameters of the three matrices, or stacks of experts, behind attention in one block."""
    stacked = shape.num_experts / shape.num_experts_per_tok if shape.use_moe else 1
    return round(3 * shape.hidden_size * _inner_width(shape) * stacked)


def _block_matrices(shape: MiniMindConfig) -> int:
    """Return the parameters of all matrices inside the blocks but the routers', which stay in float32."""
    c, d = shape.hidden_size, shape.head_dim
    attention = 2 * c * d * (shape.num_attention_heads + shape.num_key_value_heads)
    return shape.num_hidden_layers * (attention + _inner_weights(shape))


def _loss_bytes(tokens: int, c: int, vocabulary: int, low: int, compiled: Compiled) -> int:
    """Return the most that the loss holds: while it goes through the logits, or when it joins its pieces."""
    piece = min(tokens, 1 << max((_LOGITS_AT_ONCE // vocabulary).bit_length() - 1, 0))
    # Compiled, logits and their gradient in half precision; otherwise also the softmax in float32.
    logits = piece * vocabulary * (2 * low if compiled != "no" else _FLOAT + 2 * low)
    matrix = vocabulary * c * (_FLOAT + low)
    return matrix + _FLOAT * c * tokens + max(logits + _FLOAT * c * tokens, 2 * _FLOAT * c * tokens)
