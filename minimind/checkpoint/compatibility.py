"""Whether a run may go on with other options than those it began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config.options import PretrainConfig
from ..config.schema import flag_of, schema_of
from ..data.batch_plan import BatchPlan
from ..data.prepare import PreparedData
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer

_SHAPE = "the weights have another shape; {give}, or start a new run"
_ORDER = "the rows would come in another order; {give}, or start a new run"

# What the saved weights or the order of the rows depend on, with the reason and the way out. The names are
# fields of the configuration and what the trainer works out: `global_batch_size` in rows, and fingerprints.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "use_moe",
            "num_experts",
            "moe_intermediate_size",
            "vocab_size",
            "tie_word_embeddings",
        ),
        _SHAPE,
    ),
    "rope_theta": "the weights were trained with other positions; {give}, or start a new run",
    "num_experts_per_tok": "the weights were trained with another number; {give}, or start a new run",
    "norm_topk_prob": "the experts of a token were weighted otherwise; give the --from-weight that the run "
    "began with, or start a new run",
    "optimizer": "the saved moments are those of another optimizer; {give}, or start a new run with "
    "--from-weight",
    "max_seq_len": _ORDER,
    "packing": _ORDER,
    "seed": _ORDER,
    "global_batch_size": "a step would hold other rows; choose --batch-size and --accumulation-steps so that "
    "batch size x accumulation x processes is {old}, or {give}",
    "tokenizer_fingerprint": "token ids would mean other text; name the --tokenizer the run began with, "
    "or start a new run",
    "data_mixture": "the rows would come in another order; give the same --data with the same weights, "
    "or start a new run",
    "data_fingerprint": "the training text is not the one the run began with; give the same --data, "
    "--val-data, --val-fraction, --text-key and --bad-lines, or start a new run",
}

# Sound, but the run is then no longer the one that was begun: said aloud.
CHANGED: Mapping[str, str] = {
    "learning_rate": "takes effect from the next step",
    "lr_schedule": "takes effect from the next step",
    "warmup_steps": "takes effect from the next step",
    "min_lr_ratio": "takes effect from the next step",
    "decay_ratio": "takes effect from the next step",
    "decay_steps": "takes effect from the next step",
    "decay_shape": "takes effect from the next step",
    "weight_decay": "takes effect from the next step",
    "beta1": "takes effect from the next step",
    "beta2": "takes effect from the next step",
    "grad_clip": "takes effect from the next step",
    "dropout": "takes effect from the next step",
    "router_aux_loss_coef": "takes effect from the next step",
    "on_spike": "takes effect from the next step",
    "spike_sigma": "takes effect from the next step",
    "mixed_precision": "losses may differ in the last digits",
    "val_data": "validation losses before and after do not compare",
}

# No effect on the steps themselves, or covered by a fingerprint above.
FREE: frozenset[str] = frozenset(
    {
        *("data", "val_fraction", "tokenizer", "text_key", "cache_dir", "bad_lines", "from_weight"),
        *("epochs", "max_steps", "max_tokens", "batch_size", "accumulation_steps", "compile"),
        "cuda_graphs",
        *("activation_checkpointing", "profile"),
        *("log_interval", "eval_interval", "eval_batches", "save_interval", "keep_checkpoints"),
        "keep_every",
        *("sample_interval", "sample_prompt"),
        *(
            "on_save_error",
            "max_time",
            "dist_timeout",
            "output_dir",
            "resume",
            "tracker",
            "project",
            "run_name",
        ),
    }
)

# Which values of the optimizer's parameter groups an option sets.
_GROUP_VALUES = {"weight_decay": "weight_decay", "beta1": "betas", "beta2": "betas"}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings a checkpoint was written with to those of the run that would go on from it.

    Give values as they were worked out (`head_dim`, `vocab_size`, `global_batch_size` as numbers), not None
    for "by default". A key that only one side has, as after an update of minimind, is not compared.

    Args:
        saved: from the checkpoint.
        now: of this run.

    Returns:
        One line for each difference that forbids going on, and one for each that is merely worth a warning.
    """
    refused, changed = [], []
    for key, reason in REFUSED.items():
        if _differ(key, saved, now):
            give = f"give {_spell(key, saved[key])}"
            refused.append(f"{_change(key, saved, now)}: {reason.format(give=give, old=saved[key])}.")
    for key, effect in CHANGED.items():
        if _differ(key, saved, now):
            changed.append(f"{_change(key, saved, now)}: {effect}.")
    return refused, changed


def changed_group_values(saved: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """Return the values of parameter groups that were changed on purpose; see `training_state.restore`."""
    return frozenset(value for key, value in _GROUP_VALUES.items() if _differ(key, saved, now))


def _differ(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return key in saved and key in now and _plain(saved[key]) != _plain(now[key])


def _plain(value: Any) -> Any:
    """Return what JSON makes of a value: one side has been through it."""
    return list(value) if isinstance(value, tuple) else value


def _change(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = (_short(values[key]) for values in (saved, now))
    worked_out = key in ("data_mixture", "norm_topk_prob") or key.endswith("fingerprint")
    name = key.replace("_", " ") if worked_out else flag_of(key)
    return f"{name} {old} → {new}"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:12] + "..."


def _spell(key: str, value: Any) -> str:
    """Return an option as typed; empty for a value that is no option."""
    field = schema_of(PretrainConfig).get(key)
    return " ".join(field.spell(value)) if field else ""


def settings_of_run(
    config: PretrainConfig, shape: MiniMindConfig, plan: BatchPlan, tokenizer: Tokenizer, data: PreparedData
) -> dict[str, Any]:
    """Return everything that decides whether a checkpoint belongs to this run; see `resume.differences`."""
    return {
        **dataclasses.asdict(config),
        "global_batch_size": plan.global_batch_size,
        "norm_topk_prob": shape.norm_topk_prob,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data_fingerprint": data.fingerprint,
        "data_mixture": data.mixture,
    }
