"""Model configuration; imports no torch.

Field names and meanings are those of Hugging Face's `Qwen3Config`, or `Qwen3MoeConfig` for a mixture of
experts, so that saved models need no conversion. `formats/huggingface.py` reads and writes the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..errors import ConfigError

# Keys of a Qwen3 config.json for which only one value is supported.
_FIXED: Mapping[str, Any] = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

# The same for Qwen3-MoE: every block has experts.
_FIXED_MOE: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}

# Fields of the mixture of experts, with the defaults of transformers' Qwen3MoeConfig for missing keys.
_MOE_DEFAULTS: Mapping[str, Any] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

# The largest value of each size: far beyond any model of this kind, so that what a damaged or hostile file
# asks for is refused before anything is allocated.
SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**22,
    "max_position_embeddings": 2**24,
}
_MOE_SIZES = {"num_experts": 2**16, "num_experts_per_tok": 2**16, "moe_intermediate_size": 2**22}
# Entries of the rotary table, positions x half a head: 512 MiB each for cosines and sines.
_MAX_ROTARY_ENTRIES = 2**27
_DERIVED = ("head_dim", "intermediate_size", "moe_intermediate_size")
_MAX_PARAMETERS = 10**13
# The range of each number. With a rope_theta of 1 or less the frequencies do not fall from pair to pair.
_NUMBERS = {
    "rope_theta": (1.001, 1e15),
    "rms_norm_eps": (0.0, 1.0),
    "dropout": (0.0, 0.999),
    "router_aux_loss_coef": (0.0, 1e6),
    "initializer_range": (0.0, 1e3),
}
_SWITCHES = ("use_moe", "tie_word_embeddings", "norm_topk_prob")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# The range of each number of YaRN.
_YARN_NUMBERS = {
    "factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1, 2**24),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
}


@dataclass(frozen=True, kw_only=True)
class MiniMindConfig:
    """Configuration of a decoder-only transformer.

    Attributes:
        vocab_size: number of token embeddings.
        hidden_size: width of the residual stream.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, each shared by a group of query heads.
        head_dim: dimension of a head; None means hidden_size / num_attention_heads.
        intermediate_size: inner width of SwiGLU; None means 8/3 of the hidden size, rounded up to a multiple
            of 64, so that its three matrices have as many parameters as two of width 4·hidden_size.
        max_position_embeddings: longest sequence, the size of the rotary table.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or YaRN with the keys of Hugging Face (`rope_type`, `factor`,
            `original_max_position_embeddings`, `beta_fast`, `beta_slow`, `attention_factor`, `truncate`).
        rms_norm_eps: added to the mean square in every norm.
        use_moe: use a mixture of SwiGLU experts instead of one SwiGLU layer in every block.
        num_experts: experts per block.
        num_experts_per_tok: experts activated per token (top-k).
        moe_intermediate_size: inner width of an expert; None means `intermediate_size`. Ignored without
            `use_moe`, like the other fields of experts.
        norm_topk_prob: normalize the router weights of a token's experts to a sum of 1; None does so for
            top-k with k > 1. With k = 1 the weight would always be 1 and the router would get no gradient
            from the language loss.
        router_aux_loss_coef: coefficient of the load-balancing loss.
        dropout: probability for attention weights and for the outputs of attention and SwiGLU.
        tie_word_embeddings: embedding and output layer share one matrix.
        initializer_range: standard deviation of initial weights.
        bos_token_id: token at the start of a document.
        eos_token_id: token at the end of a document.
        pad_token_id: padding, never a target.

    Raises:
        ConfigError: for an invalid configuration; all problems are listed.
    """

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    # None only before __post_init__; the type saves readers a check.
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float = 0.01
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        # The values may come from an edited file, so check types before computing with them.
        if problems := list(self._invalid_fields()):
            raise ConfigError(problems)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or set head_dim."
                )
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", -(-self.hidden_size * 8 // (3 * 64)) * 64)
        if self.use_moe and self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        if self.use_moe and self.norm_topk_prob is None:
            object.__setattr__(self, "norm_topk_prob", self.num_experts_per_tok > 1)
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _normalized_rope_scaling(self.rope_scaling))
        if problems := list(self._inconsistencies()):
            raise ConfigError(problems)

    def _invalid_fields(self) -> Iterator[str]:
        """Yield a sentence for each field of a wrong type or out of range."""
        for name, largest in (SIZES | (_MOE_SIZES if self.use_moe else {})).items():
            value = getattr(self, name)
            if value is None and name in _DERIVED:
                continue
            if not _is_whole(value) or not 1 <= value <= largest:
                yield f"{name} {value} is not a size; use a whole number from 1 to {largest}."
        for name, (lowest, highest) in _NUMBERS.items():
            value = getattr(self, name)
            if not _is_number(value) or not lowest <= value <= highest:
                yield f"{name} {value} is not a number from {lowest:g} to {highest:g}; correct it."
        for name in _SWITCHES:
            if (value := getattr(self, name)) not in (None, True, False):
                yield f"{name} {value} is neither true nor false; use one of them."
        for name in _TOKENS:
            if not _is_whole(value := getattr(self, name)):
                yield f"{name} {value} is not a token id; use a whole number."

    def _inconsistencies(self) -> Iterator[str]:
        """Yield a sentence for each field that does not fit the others."""
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor."
            )
        if self.head_dim % 2:
            yield f"head_dim {self.head_dim} is odd, but rotary embedding rotates pairs; make it even."
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            yield (
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts "
                f"{self.num_experts}; lower it."
            )
        if self.max_position_embeddings * self.head_dim // 2 > _MAX_ROTARY_ENTRIES:
            yield (
                f"max_position_embeddings {self.max_position_embeddings} is too large for a head_dim of "
                f"{self.head_dim}; use at most {2 * _MAX_ROTARY_ENTRIES // self.head_dim}."
            )
        if (number := self.num_parameters()) > _MAX_PARAMETERS:
            yield f"a model of {number:.1e} parameters is too large; the limit is {_MAX_PARAMETERS:.0e}."

    def num_parameters(self) -> int:
        """Return the number of parameters, a tied matrix counted once."""
        return self._count_parameters(self.num_experts)

    def num_active_parameters(self) -> int:
        """Return the number of parameters active per token: all but the experts outside its top-k."""
        return self._count_parameters(self.num_experts_per_tok)

    def _count_parameters(self, experts: int) -> int:
        """Return the number of parameters with `experts` experts per block."""
        c, d = self.hidden_size, self.head_dim
        attention = 2 * c * d * (self.num_attention_heads + self.num_key_value_heads) + 2 * d
        feed_forward = 3 * c * self.intermediate_size
        if self.use_moe:
            assert self.moe_intermediate_size is not None
            feed_forward = c * self.num_experts + experts * 3 * c * self.moe_intermediate_size
        block = attention + feed_forward + 2 * c
        embeddings = self.vocab_size * c * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + c

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations per token in training.

        6N + 6·L·H·D·T, after appendix B of PaLM (Chowdhery et al. 2022): one multiplication and addition per
        weight in the forward and two in the backward pass. N includes the vocabulary once, as the output
        layer, and of the experts those active for a token. PaLM's 12·L·H·D·T for attention is halved, as a
        causal query attends to half of the keys on average. Savings by the document mask and recomputation
        are not counted, so neither increases the MFU.

        Args:
            seq_len: T, sequence length in tokens.
        """
        weights = self.num_active_parameters()
        if not self.tie_word_embeddings:
            weights -= self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_len
        return 6 * weights + 6 * attention

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a Qwen3 or Qwen3-MoE `config.json`.

        transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`.
        """
        values = dataclasses.asdict(self)
        del values["dropout"], values["use_moe"]
        for name in _MOE_DEFAULTS if not self.use_moe else ():
            del values[name]
        scaling = dict(self.rope_scaling) if self.rope_scaling is not None else {"rope_type": "default"}
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.use_moe else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if self.use_moe else "qwen3",
            **values,
            "rope_scaling": scaling if self.rope_scaling is not None else None,
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
            "attention_dropout": self.dropout,
            **_FIXED,
            **(_FIXED_MOE if self.use_moe else {}),
            "use_cache": True,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiniMindConfig:
        """Read a Qwen3 or Qwen3-MoE `config.json`, written by transformers 4 or 5 or by `to_dict`.

        Raises:
            ConfigError: for an unsupported model, or missing or invalid keys.
        """
        model_type = values.get("model_type")
        if model_type not in ("qwen3", "qwen3_moe"):
            raise ConfigError(
                f"model_type is {model_type!r}, but only 'qwen3' and 'qwen3_moe' are supported."
            )
        use_moe = model_type == "qwen3_moe"
        for key, supported in {**_FIXED, **(_FIXED_MOE if use_moe else {})}.items():
            if values.get(key) not in (None, supported):
                raise ConfigError(f"{key} is {values[key]!r}, but only {supported!r} is supported.")
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: values[name] for name in names - _MOE_DEFAULTS.keys() if name in values}
        given["use_moe"] = use_moe
        if use_moe:
            given |= {name: values.get(name, default) for name, default in _MOE_DEFAULTS.items()}
            # transformers 5 writes this key instead of `num_experts`.
            given["num_experts"] = values.get("num_local_experts", given["num_experts"])
            given.setdefault("head_dim", None)
            # Not used without dense blocks.
            given.setdefault("intermediate_size", given["moe_intermediate_size"])
        missing = [
            name for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                              "num_key_value_heads", "intermediate_size") if given.get(name) is None
        ]  # fmt: skip
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing; use the config.json of the weights.")
        # Missing keys mean the defaults of transformers' Qwen3Config, where those differ from ours.
        given.setdefault("head_dim", 128)
        given.setdefault("tie_word_embeddings", False)
        given["dropout"] = values.get("attention_dropout") or 0.0
        rope = _rope_of(values)
        theta = rope.pop("rope_theta", 1e4)
        given["rope_theta"] = float(theta) if _is_number(theta) else theta
        given["rope_scaling"] = rope or None
        for name in _TOKENS:
            token = given.pop(name, None)
            # The first of several end tokens is the main one.
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                given[name] = token
        return cls(**given)


def _rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and the scaling of a `config.json`, which may state them in several places.

    Raises:
        ConfigError: when the places contradict each other, for example after one of them was edited: other
            programs would read another one.
    """
    rope: dict[str, Any] = {}
    top = {"rope_theta": theta} if (theta := values.get("rope_theta")) is not None else {}
    for key, table in (("", top), *((key, values.get(key)) for key in ("rope_scaling", "rope_parameters"))):
        found = dict(_table(key, table))
        if "type" in found:  # its name until transformers 4.43
            found.setdefault("rope_type", found.pop("type"))
        for name in found.keys() & rope.keys():
            if found[name] != rope[name]:
                raise ConfigError(
                    f"{name} is {rope[name]!r} in one place and {found[name]!r} in {key}; make them equal."
                )
        rope |= found
    return rope


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number that fits a tensor."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_whole(value: Any) -> TypeGuard[int]:
    return _is_number(value) and isinstance(value, int)


def _table(key: str, value: Any) -> Mapping[str, Any]:
    """Return a nested object of a file, empty if missing."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key} {value!r} is not a table of keys and values; correct it.")
    return value or {}


def _normalized_rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return YaRN settings in normalized form, None for no scaling."""
    scaling = _table("rope_scaling", scaling)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if rope_type in (None, "default"):
        return None
    if rope_type != "yarn":
        raise ConfigError(f"rope_scaling of type {rope_type!r} is not supported; use 'yarn' or none.")
    for key, (lowest, highest) in _YARN_NUMBERS.items():
        value = scaling.get(key)
        if value is None and key not in ("factor", "original_max_position_embeddings"):
            continue
        if not _is_number(value) or not lowest <= value <= highest:
            raise ConfigError(
                f"rope_scaling {key} is {value}; YaRN needs a number from {lowest:g} to {highest:g}."
            )
    # transformers warns about integers here, except for the length.
    known: dict[str, Any] = {"rope_type": "yarn"}
    known |= {key: float(scaling[key]) for key in _YARN_NUMBERS if scaling.get(key) is not None}
    known["original_max_position_embeddings"] = int(known["original_max_position_embeddings"])
    if scaling.get("truncate") is not None:
        known["truncate"] = bool(scaling["truncate"])
    unsupported = {key for key in ("mscale", "mscale_all_dim") if scaling.get(key)}
    if unsupported:
        raise ConfigError(
            f"rope_scaling {' and '.join(sorted(unsupported))} not supported; set attention_factor."
        )
    return known
