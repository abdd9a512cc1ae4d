"""The options of `--budget`, and its value: a time, tokens, FLOPs, or money at a price per hour."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from .schema import ConfigField, FieldInfo

EXAMPLES = "30m, 2h, 500M tokens, $3 at $2.50/h or 12e18 FLOPs"

# What --budget chooses.
BUDGET_OPTIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("tokenizer", "max_seq_len", "batch_size", "global_batch_size", "epochs", "learning_rate"),
    *("lr_schedule", "warmup_steps", "min_lr_ratio", "decay_ratio", "decay_shape", "weight_decay"),
    *("val_fraction", "log_interval", "eval_interval", "eval_batches", "save_interval", "compile"),
)

_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_COUNT = re.compile(rf"{_NUMBER} ?([kmbgt]?) ?(tokens?|tok|flops?)", re.IGNORECASE)
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_MONEY = rf"[^\w\s.]? ?{_NUMBER} ?(?:[a-z]{{3}})?"
_PRICE = re.compile(rf"{_MONEY} (?:at|@) {_MONEY} ?(?:/|per) ?h(?:our)?", re.IGNORECASE)
_TIME_PART = re.compile(
    rf"{_NUMBER} ?(days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)(?![a-z])", re.IGNORECASE
)
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Budget"""

    budget: Annotated[
        str | None,
        FieldInfo(
            f"Choose every training option that is not set, for this much: {EXAMPLES}.",
            metavar="BUDGET",
            common=True,
        ),
    ] = None
    budget_keeps: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Option that --budget does not choose, such as max_seq_len. Repeatable.",
            metavar="NAME",
            default_text="those that are set",
        ),
    ] = ()

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Note which options are given, for --budget keeps those."""
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def record_kept_options(self, schema: Mapping[str, ConfigField]) -> None:
        """Add to `budget_keeps` the options that are given or differ from their default.

        Args:
            schema: of the configuration.
        """
        given: frozenset[str] = self.__dict__.pop("_given", frozenset())
        if self.budget is None or not isinstance(self.budget_keeps, tuple):
            return
        if "budget_keeps" in given or given >= schema.keys():  # `dataclasses.replace` gives all options
            given = frozenset()
        named = {str(name).lstrip("-").replace("-", "_") for name in self.budget_keeps}
        changed = {
            name
            for name in BUDGET_OPTIONS
            if getattr(self, name) not in (schema[name].default, schema[name].info.unset)
        }
        kept = [name for name in BUDGET_OPTIONS if name in named | given | changed]
        object.__setattr__(self, "budget_keeps", (*kept, *sorted(named.difference(BUDGET_OPTIONS))))

    @property
    def budget_chooses(self) -> tuple[str, ...]:
        """The options that --budget has yet to choose; none without it, and none after the choice."""
        if self.budget is None:
            return ()
        return tuple(name for name in BUDGET_OPTIONS if name not in self.budget_keeps)


@dataclass(frozen=True)
class Budget:
    """What a run may use, exactly one of the three.

    Attributes:
        seconds: of training, over all attempts: from the start of training to the final model.
        tokens: training tokens.
        flops: FLOPs of the model, as `MiniMindConfig.flops_per_token` counts them.
    """

    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None


def parse_budget(text: str) -> Budget:
    """Parse a budget such as `30m`, `1h30m`, `500M tokens`, `$3 at $2.50/h` or `12e18 FLOPs`.

    Money becomes time at its price. A currency may stand before a number as a sign or behind it as three
    letters; it is not converted.

    Raises:
        ValueError: for anything else, and for a budget of nothing.
    """
    plain = " ".join(text.split())
    budget = _parse(plain)
    if budget is None:
        raise ValueError(f"{text!r} is not a budget such as {EXAMPLES}")
    amount = next(value for value in (budget.seconds, budget.tokens, budget.flops) if value is not None)
    if not math.isfinite(amount) or amount <= 0:
        raise ValueError(f"{text!r} is a budget of nothing, or without end")
    return budget


def _parse(text: str) -> Budget | None:
    if match := _COUNT.fullmatch(text):
        amount = float(match[1]) * _SCALE[match[2].lower()]
        return Budget(tokens=amount) if match[3].lower().startswith("tok") else Budget(flops=amount)
    if match := _PRICE.fullmatch(text):
        money, price = float(match[1]), float(match[2])
        return Budget(seconds=money / price * 3600 if price else math.inf)
    rest = _TIME_PART.sub("", text)
    parts = _TIME_PART.findall(text)
    if not parts or rest.strip():
        return None
    return Budget(seconds=sum(float(number) * _SECONDS[unit[0].lower()] for number, unit in parts))
