"""Configuration of a model that transformers computes; imports neither torch nor transformers.

It has the fields of `MiniMindConfig`, which the rest of a run reads, and keeps the `config.json` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .config import SIZES, MiniMindConfig

# Model types that `MiniMindForCausalLM` computes.
OWN_TYPES = ("qwen3", "qwen3_moe")

# Keys of a `config.json` by the field that they set; the first that is there counts.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_inner", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "rope_theta": ("rope_theta",),
    "tie_word_embeddings": ("tie_word_embeddings",),
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers")
# Of a model without position embeddings, such as Mamba.
_UNLIMITED = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(MiniMindConfig):
    """Configuration of any causal language model of transformers.

    Sizes that its `config.json` does not name are None.

    Attributes:
        values: contents of the `config.json`.
        folder: with the `config.json`, the tokenizer and usually the weights; None where it is not known.
        resumed: whether the weights are those of a checkpoint that is loaded later.
        parameters: number of parameters, a tied matrix counted once; 0 where it is not known.
        active_parameters: those active per token.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    resumed: bool = False
    parameters: int = 0
    active_parameters: int = 0

    def __post_init__(self) -> None:
        for name, largest in SIZES.items():
            value, required = getattr(self, name), name in _REQUIRED
            if value is None and not required:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise ConfigError(
                    f"{name} is {value}, not a size from 1 to {largest}; use the config.json of the weights."
                )

    @property
    def architecture(self) -> str:
        """Name of the class in transformers."""
        return str((self.values.get("architectures") or [self.values["model_type"]])[0])

    @property
    def source(self) -> str:
        """What to call it in messages."""
        return self.folder or f"the {self.values.get('model_type')} model"

    def num_parameters(self) -> int:
        """Return the number of parameters, a tied matrix counted once."""
        return self.parameters

    def num_active_parameters(self) -> int:
        """Return the number of parameters active per token."""
        return self.active_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations per token in training; see `MiniMindConfig`."""
        embedding = self.vocab_size * self.hidden_size
        weights = self.active_parameters - (0 if self.tie_word_embeddings else embedding)
        heads = self.num_attention_heads or 0
        width = heads * self.head_dim if heads and self.head_dim else self.hidden_size if heads else 0
        return 6 * weights + 6 * self.num_hidden_layers * width * seq_len

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of its `config.json`."""
        return dict(self.values)

    @classmethod
    def of(
        cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, **fields: Any
    ) -> TransformersConfig:
        """Return the configuration of a `config.json`.

        Args:
            values: its contents.
            defaults: the same with the defaults of the class in transformers, where that was loaded.
            fields: further fields.

        Raises:
            ConfigError: without a vocabulary size, a hidden size or layers.
        """
        named = {**values, **(defaults or {})}
        # The language model of one that also reads images.
        named |= named["text_config"] if isinstance(named.get("text_config"), Mapping) else {}
        found: dict[str, Any] = {
            name: next((named[key] for key in keys if named.get(key) is not None), None)
            for name, keys in _KEYS.items()
        }
        for name in SIZES.keys() - set(_REQUIRED):
            if not isinstance(found[name], int):  # such as one for each layer
                found[name] = None
        if isinstance(rope := named.get("rope_parameters"), Mapping):  # of transformers 5
            found["rope_theta"] = rope.get("rope_theta", found["rope_theta"])
        if found["max_position_embeddings"] is None:
            found["max_position_embeddings"] = _UNLIMITED
        found["tie_word_embeddings"] = bool(found["tie_word_embeddings"])
        found |= dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
        return cls(**found, values=dict(values), **fields)


def config_of(values: Mapping[str, Any], **fields: Any) -> MiniMindConfig:
    """Return the configuration of a `config.json` of any architecture.

    Args:
        values: contents of the file.
        fields: fields of a `TransformersConfig`.

    Raises:
        ConfigError: for missing or invalid keys.
    """
    model_type = values.get("model_type")
    if model_type in OWN_TYPES or not isinstance(model_type, str):
        return MiniMindConfig.from_dict(values)
    return TransformersConfig.of(values, **fields)
