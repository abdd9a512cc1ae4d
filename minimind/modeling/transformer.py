"""Decoder-only transformer of the Qwen3 architecture, with the parameter names of Hugging Face.

Shapes: B batch, T tokens, C hidden, V vocabulary, L blocks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from .attention import (
    SMALLEST_FLEX_HEAD,
    Attention,
    Mask,
    RMSNorm,
    cached_mask,
    document_block_mask,
    document_mask,
)
from .config import MiniMindConfig
from .documents import Documents, documents
from .feed_forward import SwiGLU
from .kernels import dispatch as fused
from .kv_cache import KVCache, LayerCache
from .loss import IGNORED, linear_cross_entropy
from .moe import MixtureOfExperts
from .rope import Rotary, RotaryTable


class CausalLMOutput(NamedTuple):
    """Output of a forward pass.

    Attributes:
        loss: float32 scalar, None without labels.
        logits: (B, T, V), None with `shift_labels`.
        routing: (L, 2, E) router statistics, None without experts; see `MixtureOfExperts.forward`. The loss
            does not include them; `moe.balance_loss` computes a loss from them.
    """

    loss: Tensor | None
    logits: Tensor | None
    routing: Tensor | None = None


class MiniMindBlock(nn.Module):
    """Pre-norm transformer block: attention, then SwiGLU or experts.

    The last output is returned next to the residual stream, so that the next norm adds and normalizes both in
    one kernel.
    """

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.use_moe else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        rotary: Rotary,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the residual stream (B, T, C), the output still to be added to it, and the (2, E) routing.

        `x` and `added` are the first two of the previous block; see `MixtureOfExperts.forward` for routing.
        """
        x, normed = self.input_layernorm.add(x, added)
        added = self.dropout(self.self_attn(normed, rotary, mask, cache))
        x, normed = self.post_attention_layernorm.add(x, added)
        routing = None
        if isinstance(self.mlp, MixtureOfExperts):
            added, routing = self.mlp(normed, token_mask)
        else:
            added = self.mlp(normed)
        return x, self.dropout(added), routing


class MiniMindModel(nn.Module):
    """Token embedding, blocks and final norm."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)
        # Activation checkpointing: recompute each block in the backward pass.
        self.recompute = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask | None = None,
        kv_cache: KVCache | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the normed (B, T, C) hidden states and the routing; see `MiniMindForCausalLM.forward`."""
        length = input_ids.shape[1]
        start = kv_cache.length if kv_cache is not None else 0
        if start + length > self.config.max_position_embeddings:
            raise ValueError(
                f"{start + length} tokens are more than max_position_embeddings "
                f"{self.config.max_position_embeddings}."
            )
        # Computed once and shared by all layers.
        if isinstance(mask, Documents):
            rotary = self.rotary.tables(position_ids, *input_ids.shape)
        else:
            rotary = self.rotary(position_ids, start, length)
        x: Tensor = self.embed_tokens(input_ids)
        added: Tensor | None = None
        routings: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training and kv_cache is None:
                # Add first, so that one tensor per block is saved. Dropout needs the same random state again.
                x = x if added is None else x + added
                x, added, routing = checkpoint(
                    layer,
                    *(x, None, rotary, mask, None, token_mask),
                    use_reentrant=False,
                    preserve_rng_state=self.config.dropout > 0,
                )
            else:
                cache = kv_cache.layers[index] if kv_cache is not None else None
                x, added, routing = layer(x, added, rotary, mask, cache, token_mask)
            if routing is not None:
                routings.append(routing)
        return self.norm.add(x, added)[1], torch.stack(routings) if routings else None


class OutputMatrix(nn.Linear):
    """Output layer, which can also compute a loss without materializing the logits.

    The loss is computed inside `forward`, because FSDP2 gathers the weight only for that call.
    """

    def forward(self, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the logits (..., V) of `x`, or `loss(weight)` with the (V, C) weight."""
        return super().forward(x) if loss is None else loss(self.weight)


class MiniMindForCausalLM(nn.Module):
    """Transformer with a language-modeling head.

    Weights are initialized from a normal distribution with standard deviation `initializer_range`, divided by
    √(2L) for the projections into the residual stream (`o_proj`, `down_proj`), so that the sum of 2L outputs
    does not grow with depth (GPT-2, Radford et al. 2019, section 2.3). Norm weights start at 1.

    Args:
        config: of the model. Initial weights depend on `torch.manual_seed`.
    """

    # Read by Accelerate: FSDP shards each module of these classes as a unit.
    _no_split_modules: ClassVar[list[str]] = ["MiniMindBlock"]

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MiniMindModel(config)
        self.lm_head = OutputMatrix(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self._init_weights()
        self._summed_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_cross_entropy
        self.compiled = False
        self._documents: Callable[..., Documents] = documents
        # The dtype in which FSDP2 gathers weights, if it differs from that of the shards, which is what
        # parameters show outside of a forward pass.
        self.gathered_dtype: torch.dtype | None = None
        # Set if attention is compiled, which FlexAttention needs.
        self._create_block_mask: Callable[..., BlockMask] | None = None

    def _init_weights(self) -> None:
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and not parameter.is_meta:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if writes else std)

    def tie_weights(self) -> None:
        """Tie the output layer to the embedding if configured; `to_empty` from `meta` unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output layer."""
        return self.lm_head

    def train_in_float8(self) -> None:
        """Compute the products of attention and SwiGLU in FP8 in training mode on the path of the kernels.

        Call it before compiling; see `modeling.float8`. Weights and evaluation stay as they are.
        """
        for module in self.modules():
            if isinstance(module, (Attention, SwiGLU)):
                module.float8 = True

    def compile_for_training(self, mode: Literal["whole", "blocks"]) -> None:
        """Compile submodules in place, before the model is wrapped; state-dict keys do not change.

        The wrappers of Accelerate, DDP and FSDP stay outside of the compiled code. Shapes are static: each
        new shape recompiles.

        Args:
            mode: "whole" compiles the transformer as one graph, the fastest to run; "blocks" compiles one
                block and reuses it for all, which compiles quickly and keeps FSDP's hooks between blocks.
        """
        if mode == "whole":
            self.model.compile(fullgraph=True, dynamic=False)
        else:
            for layer in self.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        self.compiled = True
        if self.config.head_dim >= SMALLEST_FLEX_HEAD:
            # Compiled separately: created inside a graph without gradients, the block mask points to invalid
            # memory with torch 2.11.
            self._create_block_mask = torch.compile(create_block_mask, dynamic=False)
        self._documents = torch.compile(documents, dynamic=False)
        self._summed_loss = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        token_mask: Tensor | None = None,
    ) -> CausalLMOutput:
        """Run the model.

        Args:
            input_ids: (B, T) int64 token ids.
            labels: (B, T) int64, `input_ids` with -100 to ignore; shifted here. The loss is the mean
                cross-entropy, and logits are returned.
            shift_labels: (B, T) int64, the next token of each input token, -100 to ignore. The loss is the
                summed cross-entropy divided by `num_items_in_batch`; logits are never materialized.
            num_items_in_batch: divisor of the loss of `shift_labels`; None means the number of targets.
            position_ids: (B, T) position of each token; None counts from the cache's length.
            document_ids: (B, T) int32; tokens attend within equal ids. None: one document per sequence.
            kv_cache: keys and values of earlier tokens; these tokens are appended.
            token_mask: (B, T) bool, False for padding, which is not routed to experts; else unused.
        """
        mask = self._mask(input_ids, document_ids, kv_cache)
        hidden, routing = self.model(input_ids, position_ids, mask, kv_cache, token_mask)
        if shift_labels is not None:
            tokens, targets = hidden.flatten(0, 1), shift_labels.flatten()
            loss = self.lm_head(tokens, lambda weight: self._summed_loss(tokens, weight, targets))
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != IGNORED).sum().clamp(min=1)
            return CausalLMOutput(loss / num_items_in_batch, None, routing)
        logits = self.lm_head(hidden)
        if labels is None:
            return CausalLMOutput(None, logits, routing)
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return CausalLMOutput(loss, logits, routing)

    def _mask(self, input_ids: Tensor, document_ids: Tensor | None, kv_cache: KVCache | None) -> Mask | None:
        """Return the attention mask in the form that suits the device; None is causal attention."""
        if kv_cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids and kv_cache cannot be combined: a cache holds one document.")
            return cached_mask(kv_cache.length, input_ids.shape[1], input_ids.device)
        dropout = self.training and self.config.dropout > 0
        dtype = self.gathered_dtype or fused.compute_dtype(input_ids, self.model.embed_tokens.weight)
        if not dropout and fused.attention_supported(input_ids.device, dtype, self.config.head_dim):
            return self._documents(document_ids, *input_ids.shape, input_ids.device)
        if document_ids is None:
            return None
        if self._create_block_mask is not None and input_ids.device.type == "cuda" and not dropout:
            return document_block_mask(document_ids, self._create_block_mask)
        return document_mask(document_ids)
