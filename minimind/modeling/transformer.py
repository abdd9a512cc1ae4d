"""The model: a Qwen3-shaped decoder with the parameter names of Hugging Face.

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
    """What a forward pass returns.

    Attributes:
        loss: float32 scalar, None without labels.
        logits: (B, T, V), None where only the loss was asked for.
        routing: (L, 2, E) what the routers chose, None without experts; see `MixtureOfExperts.forward`. No
            part of it is in the loss; `moe.balance_loss` makes one of it.
    """

    loss: Tensor | None
    logits: Tensor | None
    routing: Tensor | None = None


class MiniMindBlock(nn.Module):
    """Attention, then SwiGLU or experts, each behind a norm and added to the residual stream.

    What the last of them adds is handed on beside the stream: the sum is made where the next norm reads it.
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
        """Map the stream, (B, T, C), and what is still to be added to it, to those of the next block.

        The third is what the router chose, (2, E); see `MixtureOfExperts.forward`.
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
    """Embedding, blocks and final norm."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)
        # Drop what a block computes on the way forward and compute it again in the backward pass.
        self.recompute = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask | None = None,
        kv_cache: KVCache | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the (B, T, C) normed hidden states and the routing; see `MiniMindForCausalLM.forward`."""
        length = input_ids.shape[1]
        start = kv_cache.length if kv_cache is not None else 0
        if start + length > self.config.max_position_embeddings:
            raise ValueError(
                f"{start + length} tokens are more than max_position_embeddings "
                f"{self.config.max_position_embeddings}."
            )
        # Built once and shared: every layer sees the same positions and the same documents.
        if isinstance(mask, Documents):
            rotary = self.rotary.tables(position_ids, *input_ids.shape)
        else:
            rotary = self.rotary(position_ids, start, length)
        x: Tensor = self.embed_tokens(input_ids)
        added: Tensor | None = None
        routings: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training and kv_cache is None:
                # The generator is set back for the second time, so that dropout draws the same.
                # One tensor is kept for a block, not the two parts of a sum.
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
    """The matrix from hidden states to logits, which is also asked for a loss without holding the logits.

    The loss is computed inside `forward` because FSDP2 makes the weight whole only around that call.
    """

    def forward(self, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the logits (..., V) of `x`, or what `loss` makes of the weight (V, C)."""
        return super().forward(x) if loss is None else loss(self.weight)


class MiniMindForCausalLM(nn.Module):
    """The backbone and its output matrix.

    New weights are normal with standard deviation `initializer_range`. Those that write to the residual
    stream (`o_proj`, `down_proj`) are smaller by √(2L), so that the sum of 2L contributions does not grow
    with depth (GPT-2, Radford et al. 2019, section 2.3). Norms begin at 1.

    Args:
        config: the shape. The generator of `torch.manual_seed` draws the weights.
    """

    # Read by Accelerate: FSDP shards each of these as a unit.
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
        # Set where FSDP2 gathers weights in another dtype than that of its shards, which are all that is to
        # be seen of them between two blocks.
        self.gathered_dtype: torch.dtype | None = None
        # Set where attention runs compiled, so that FlexAttention may be used.
        self._create_block_mask: Callable[..., BlockMask] | None = None

    def _init_weights(self) -> None:
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and not parameter.is_meta:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if writes else std)

    def tie_weights(self) -> None:
        """Make embedding and output one parameter where the config says so; moving off meta undoes it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output matrix."""
        return self.lm_head

    def compile_for_training(self, mode: Literal["whole", "blocks"]) -> None:
        """Compile the inner parts in place, before the model is wrapped; state-dict keys do not change.

        The wrappers of Accelerate, DDP and FSDP stay outside of the compiled code. Shapes are taken as fixed:
        each new one compiles again.

        Args:
            mode: "whole" makes one graph of the backbone, the fastest to run; "blocks" compiles one block and
                uses it for all, which is quick to compile and leaves FSDP's hooks between the blocks.
        """
        if mode == "whole":
            self.model.compile(fullgraph=True, dynamic=False)
        else:
            for layer in self.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        self.compiled = True
        if self.config.head_dim >= SMALLEST_FLEX_HEAD:
            # Compiled by itself: made inside a graph without gradients, torch 2.11 hands the kernel a mask
            # that points outside of its memory.
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
            labels: (B, T) int64, `input_ids` with -100 where there is nothing to predict; they are shifted
                here. The loss is their mean cross-entropy, and logits are returned.
            shift_labels: (B, T) int64, what follows each input token, or -100. The loss is the sum of their
                cross-entropy over `num_items_in_batch`; logits are not returned and never held whole.
            num_items_in_batch: divides the loss of `shift_labels`; None means the number of real ones.
            position_ids: (B, T) position of each token; None counts up from the cache's length.
            document_ids: (B, T) int32; tokens attend within equal ids only. None: a row is one document.
            kv_cache: keys and values of earlier tokens, extended by these.
            token_mask: (B, T) bool, False for padding, which experts leave out; dense blocks do not look.
        """
        mask = self._mask(input_ids, document_ids, kv_cache)
        hidden, routing = self.model(input_ids, position_ids, mask, kv_cache, token_mask)
        if shift_labels is not None:
            rows, targets = hidden.flatten(0, 1), shift_labels.flatten()
            loss = self.lm_head(rows, lambda weight: self._summed_loss(rows, weight, targets))
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != IGNORED).sum().clamp(min=1)
            return CausalLMOutput(loss / num_items_in_batch, None, routing)
        logits = self.lm_head(hidden)
        if labels is None:
            return CausalLMOutput(None, logits, routing)
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
        )
        return CausalLMOutput(loss, logits, routing)

    def _mask(self, input_ids: Tensor, document_ids: Tensor | None, kv_cache: KVCache | None) -> Mask | None:
        """Return what each token may see, in the form that suits the device; None is all before it."""
        if kv_cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids and kv_cache do not go together: a cache holds one document.")
            return cached_mask(kv_cache.length, input_ids.shape[1], input_ids.device)
        dropout = self.training and self.config.dropout > 0
        dtype = self.gathered_dtype or fused.compute_dtype(input_ids, self.model.embed_tokens.weight)
        if not dropout and fused.attention_wanted(input_ids.device, dtype, self.config.head_dim):
            return self._documents(document_ids, *input_ids.shape, input_ids.device)
        if document_ids is None:
            return None
        if self._create_block_mask is not None and input_ids.device.type == "cuda" and not dropout:
            return document_block_mask(document_ids, self._create_block_mask)
        return document_mask(document_ids)
