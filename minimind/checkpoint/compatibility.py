"""Which options may change when a run is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config.naming import flag_of
from ..config.options import CONFIG_SCHEMA, PretrainConfig
from ..data.batch_plan import BatchPlan
from ..data.prepare import PreparedData
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer
from .resume import missing_parts

_SHAPE = "the weights have a different shape; {give}, or start a new run"
_ORDER = "the data order would change; {give}, or start a new run"

# Settings that the saved weights or the data order depend on, with the reason and the fix: fields of the
# configuration, `global_batch_size` in sequences, and fingerprints.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("intermediate_size", "use_moe", "num_experts", "moe_intermediate_size"),
            *("vocab_size", "tie_word_embeddings"),
        ),
        _SHAPE,
    ),
    "rope_theta": "the weights were trained with different position embeddings; {give}, or start a new run",
    "num_experts_per_tok": "the weights were trained with a different top-k; {give}, or start a new run",
    "norm_topk_prob": "expert weights were normalized differently; give the original "
    "--from-weight, or start a new run",
    "optimizer": "the saved optimizer state is of another optimizer; {give}, or start a new run with "
    "--from-weight",
    "max_seq_len": _ORDER,
    "packing": _ORDER,
    "seed": _ORDER,
    "global_batch_size": "each step would train on other sequences; choose --batch-size and "
    "--accumulation-steps so that "
    "batch size x accumulation x processes is {old}, or {give}",
    "tokenizer_fingerprint": "token ids would change their meaning; give the original --tokenizer, or "
    "start a new run",
    "data_mixture": "the data order would change; pass the same --data and mixture weights, or "
    "start a new run",
    "data_fingerprint": "the training data has changed; give the same --data, "
    "--val-data, --val-fraction, --text-key and --bad-lines, or start a new run",
}

# Allowed with a warning: the results change.
CHANGED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio"),
            *("decay_ratio", "decay_steps", "decay_shape", "weight_decay", "beta1", "beta2", "grad_clip"),
            *("dropout", "router_aux_loss_coef", "on_spike", "spike_sigma"),
        ),
        "takes effect from the next step",
    ),
    "mixed_precision": "products are rounded differently from the next step",
    "reduce_dtype": "losses may differ in the last digits",
    "val_data": "validation losses before and after are not comparable",
}

# Without effect on the optimizer steps, or covered by a fingerprint.
FREE: frozenset[str] = frozenset(
    {
        *("data", "val_fraction", "tokenizer", "text_key", "cache_dir", "bad_lines", "from_weight"),
        *("epochs", "max_steps", "max_tokens", "batch_size", "accumulation_steps", "compile", "cuda_graphs"),
        *("activation_checkpointing", "profile", "log_interval", "eval_interval", "eval_batches"),
        *("save_interval", "keep_checkpoints", "keep_every", "sample_interval", "sample_prompt"),
        "score_interval",
        *("on_save_error", "budget", "budget_keeps", "max_time", "dist_timeout", "output_dir", "resume"),
        *("tracker", "project", "run_name", "verbose"),
    }
)

# Keys of the optimizer's parameter groups that an option sets.
_GROUP_VALUES = {"weight_decay": "weight_decay", "beta1": "betas", "beta2": "betas"}


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings of a checkpoint with those of the run that resumes from it.

    Values must be resolved (`head_dim`, `vocab_size`, `global_batch_size` as numbers, not None). A key that
    only one side has, as after an update of minimind, is not compared.

    Returns:
        One line per difference that prevents resuming, and one per difference that needs a warning.
    """
    refused, changed = _custom_parts(saved, now)
    if refused:
        return refused, []
    for key, reason in REFUSED.items():
        if _differ(key, saved, now):
            give = f"give {_spell(key, saved[key])}"
            refused.append(f"{_change(key, saved, now)}: {reason.format(give=give, old=saved[key])}.")
    for key, effect in CHANGED.items():
        if _differ(key, saved, now):
            changed.append(f"{_change(key, saved, now)}: {effect}.")
    return refused, changed


def _custom_parts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the parts that the callers of `pretrain` replaced; see `compare_settings`."""
    before, after = saved.get("custom_parts", {}), now.get("custom_parts", {})
    if (missing := missing_parts(before, after)) is not None:
        return [missing], []
    ours = after.get("optimizer")
    if "custom_parts" in saved and before.get("optimizer") != ours:
        theirs = before.get("optimizer") or saved.get("optimizer")
        return [
            f"optimizer= {theirs} → {ours}: the saved optimizer state is of another optimizer; pass the same "
            "one, or start a new run with from_weight."
        ], []
    if before.get("schedule") != after.get("schedule"):
        return [], [f"schedule= {after['schedule']}: takes effect from the next step."]
    return [], []


def changed_group_values(saved: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """Return keys of parameter groups whose options have changed; see `load_state_dict`."""
    return frozenset(value for key, value in _GROUP_VALUES.items() if _differ(key, saved, now))


def changes_evaluation(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether evaluations use another sample of the validation data than those of the checkpoint.

    Versions that did not store `evaluated_sequences` evaluated the first batches instead of a sample.
    """
    key = "evaluated_sequences"
    if key in saved or saved.get("eval_batches") is None:
        return bool(saved.get(key) != now.get(key))
    return True


def _differ(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return key in saved and key in now and _plain(saved[key]) != _plain(now[key])


def _plain(value: Any) -> Any:
    """Convert a value as a JSON round trip does."""
    return list(value) if isinstance(value, tuple) else value


def _change(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = (_short(values[key]) for values in (saved, now))
    derived = key in ("data_mixture", "norm_topk_prob") or key.endswith("fingerprint")
    name = key.replace("_", " ") if derived else flag_of(key)
    return f"{name} {old} → {new}"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:12] + "..."


def _spell(key: str, value: Any) -> str:
    """Return an option as typed; empty for a value that is no option."""
    field = CONFIG_SCHEMA.get(key)
    return " ".join(field.spell(value)) if field else ""


def settings_of_run(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    plan: BatchPlan,
    tokenizer: Tokenizer,
    data: PreparedData,
) -> dict[str, Any]:
    """Return the settings that are saved in checkpoints; see `compare_settings`."""
    return {
        **dataclasses.asdict(config),
        "global_batch_size": plan.global_batch_size,
        "norm_topk_prob": model_config.norm_topk_prob,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data_fingerprint": data.fingerprint,
        "data_mixture": data.mixture,
        # The sample of --eval-batches; None for all validation data.
        "evaluated_sequences": config.eval_batches and config.eval_batches * plan.global_batch_size,
    }
