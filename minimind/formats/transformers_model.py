"""A causal language model of transformers, in training, evaluation and generation like one of minimind.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..modeling.attention import document_mask
from ..modeling.loss import IGNORED
from ..modeling.transformer import CausalLMOutput
from ..modeling.transformers_config import TransformersConfig

# How documents in a packed sequence are kept apart: by restarting positions, which transformers recognizes,
# by a mask besides, or not at all.
Separation = Literal["positions", "mask", "none"]


def matrices_of(network: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the matrices of linear layers and the stacked ones of experts, except the output layer.

    A `Conv1D` of GPT-2 is a linear layer that stores its matrix transposed.
    """
    output = network.get_output_embeddings()  # type: ignore[operator]
    for name, module in network.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        for parameter in module.parameters(recurse=False) if module is not output else ():
            if (linear and parameter.ndim == 2) or (name.endswith(".experts") and parameter.ndim == 3):
                yield parameter


class TransformersModel(nn.Module):
    """A model of transformers with the interface of `MiniMindForCausalLM` in training and evaluation.

    It also generates, in place of an `InferenceEngine`. Its submodules are those of the network, so that
    state dicts have the names of transformers.

    Attributes:
        network: the model of transformers.
        config: its configuration.
        separation: how documents in a packed sequence are kept apart.
    """

    network: Any

    def __init__(self, network: Any, config: TransformersConfig) -> None:
        """Wrap a model and measure how it keeps documents apart.

        Raises:
            ConfigError: for a model in which tokens attend to later ones.
        """
        super().__init__()
        # Not registered as a submodule, which would add to the names.
        self.__dict__["network"] = network
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = getattr(network, shared)
        self.config = config
        accepted = inspect.signature(network.forward).parameters
        self._accepted = frozenset(accepted)
        self._fixed = {"use_cache": False} if "use_cache" in accepted else {}
        # transformers 4 has the longer name.
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        # Read by Accelerate: FSDP shards each module of these classes as a unit.
        classes = {type(module).__name__ for module in network.modules()}
        self._no_split_modules = sorted(classes.intersection(network._no_split_modules or ()))
        self.separation = self._measure_separation()

    def train(self, mode: bool = True) -> TransformersModel:
        """Set training or evaluation mode, of the network itself too."""
        self.network.training = mode
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.network.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer."""
        return self.network.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Whether embedding and output layer share one parameter."""
        output = self.get_output_embeddings()
        return output is not None and output.weight is self.get_input_embeddings().weight

    def tie_weights(self) -> None:
        """Tie the output layer to the embedding if configured."""
        self.network.tie_weights()

    def matrices(self) -> Iterator[nn.Parameter]:
        """Yield the matrices that Muon may update; see `matrices_of`."""
        return matrices_of(self.network)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what training with packed documents leaves open."""
        if self.separation != "none":
            return ()
        return (
            "documents in a packed sequence are not kept apart, because "
            f"{self.config.architecture} of transformers takes no positions or mask that would do so; "
            "--no-packing gives each document a sequence.",
        )

    def recompute_activations(self) -> None:
        """Recompute each block in the backward pass.

        Raises:
            ConfigError: for a model that transformers cannot train like this.
        """
        try:
            # The second name is that of transformers 4.
            enable = getattr(self.network, "activation_checkpointing_enable", None)
            (enable or self.network.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"--activation-checkpointing is not implemented in {self.config.architecture}; omit it."
            ) from error

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> CausalLMOutput:
        """Return loss and logits; see `MiniMindForCausalLM.forward`."""
        logits = self._logits(input_ids, document_ids, position_ids)
        if shift_labels is None and labels is None:
            return CausalLMOutput(None, logits)
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        targets = shift_labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
        return CausalLMOutput(loss / num_items_in_batch, None if labels is None else logits)

    def _logits(self, input_ids: Tensor, document_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        given: dict[str, Tensor] = {}
        if document_ids is not None and position_ids is not None and self.separation != "none":
            given["position_ids"] = position_ids.long()
            if self.separation == "mask":
                given["attention_mask"] = document_mask(document_ids)
        return self.network(input_ids=input_ids, **given, **self._fixed).logits

    @torch.no_grad()
    def _measure_separation(self) -> Separation:
        """Compare two documents in one sequence with one of them alone, and with another neighbour.

        Raises:
            ConfigError: for a model in which tokens attend to later ones.
        """
        was_training = self.training
        self.eval()
        device, vocabulary = self.device, self.config.vocab_size
        first, second = (torch.arange(start, start + 6, device=device)[None] for start in (3, 17))
        first, other, second = (ids % vocabulary for ids in (first, first + 7, second))
        changed = torch.cat((second[:, :-1], (second[:, -1:] + 1) % vocabulary), 1)
        alone = self._logits(second, None, None)
        self._refuse_if_not_causal(alone, self._logits(changed, None, None))
        pairs = torch.cat((torch.cat((first, second), 1), torch.cat((other, second), 1)))
        document_ids = (torch.arange(12, device=device) // 6).expand(2, -1)
        position_ids = (torch.arange(12, device=device) % 6).expand(2, -1)
        found: Separation = "none"
        # With a sliding window the mask would have to include it.
        tried: tuple[Separation, ...] = ("positions",) if self._has_window() else ("positions", "mask")
        for separation in tried if "position_ids" in self._accepted else ():
            self.separation = separation
            try:
                packed = self._logits(pairs, document_ids, position_ids)[:, 6:]
            except (TypeError, ValueError, RuntimeError, IndexError):  # a mask of another kind
                continue
            if _close(packed[0], packed[1]) and _close(packed[0], alone[0]):
                found = separation
                break
        self.train(was_training)
        return found

    def _refuse_if_not_causal(self, logits: Tensor, with_other_end: Tensor) -> None:
        if not _close(logits[:, :-1], with_other_end[:, :-1]):
            raise ConfigError(
                f"{self.config.source}: in a {self.config.architecture} tokens attend to later ones, so it "
                "cannot be trained to predict the next token; use a causal language model."
            )

    def _has_window(self) -> bool:
        config = self.network.config.get_text_config()
        return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[_DecodeBatch, Tensor]:
        """Prefill the cache with prompts; see `InferenceEngine.begin`."""
        length = max(map(len, prompts))
        padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        visible = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        batch = _DecodeBatch(*(torch.tensor(ids, device=self.device) for ids in (padded, visible)))
        return batch, self._extend(batch)

    @torch.inference_mode()
    def step(self, batch: _DecodeBatch, tokens: Tensor) -> Tensor:
        """Append one token to each sequence; see `InferenceEngine.step`."""
        batch.tokens = torch.cat((batch.tokens, tokens[:, None]), 1)
        batch.visible = F.pad(batch.visible, (0, 1), value=1)
        return self._extend(batch)

    def _extend(self, batch: _DecodeBatch) -> Tensor:
        """Return (B, V) float32 logits of the next tokens."""
        given: dict[str, Any] = {"attention_mask": batch.visible}
        if not batch.visible.all() and "attention_mask" not in self._accepted:
            raise ConfigError(
                f"{self.config.architecture} generates for prompts of one length only; give one at a time."
            )
        new = batch.tokens if batch.cache is None else batch.tokens[:, -1:]
        given["position_ids"] = (batch.visible.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        # A model without such a cache computes all tokens again.
        given |= {"use_cache": True, self._cache_name: batch.cache}
        given = {name: value for name, value in given.items() if name in self._accepted}
        output = self.network(input_ids=new, **given)
        batch.cache = output.get(self._cache_name) if self._cache_name in self._accepted else None
        return output.logits[:, -1].float()


@dataclass
class _DecodeBatch:
    """A batch of sequences during decoding, padded on the left: (B, T) ids, and 0 for padding, else 1."""

    tokens: Tensor
    visible: Tensor
    cache: Any = None


def _close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-5 * second.abs().max())
