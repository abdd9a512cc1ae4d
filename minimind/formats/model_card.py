"""Model cards: the README.md of a model folder, with what the run recorded of itself.

The front matter is that of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..formatting import count
from ..modeling.config import MiniMindConfig
from ..modeling.transformers_config import TransformersConfig
from ..tracking.metrics_file import read_metrics
from ..version import __version__

CARD = "README.md"

# A card without it was edited and is kept.
GENERATED = "<!-- Written by minimind-train. Delete this line to keep your changes when it saves again. -->"

_FRONT_MATTER = """---
# Choose one of https://huggingface.co/docs/hub/repositories-licenses:
# license: mit
pipeline_tag: text-generation
library_name: {library}
tags:
- minimind
---
"""
_RECIPE = {
    "optimizer": "optimizer",
    "learning_rate": "peak learning rate",
    "lr_schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "grad_clip": "gradient clipping",
    "global_batch_size": "sequences per step",
    "max_seq_len": "sequence length",
    "packing": "packing",
    "dropout": "dropout",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}
_NUMBERS = (
    ("tokens", "tokens", ",.0f"),
    ("step", "steps", ",.0f"),
    ("loss", "training loss, nats per token", ".4f"),
    ("val_loss", "validation loss, nats per token", ".4f"),
    ("val_bits_per_byte", "validation bits per byte", ".4f"),
)
_USAGE = """
## Use

```python
from transformers import pipeline

print(pipeline("text-generation", "FOLDER_OR_NAME")("Once upon a time"))
```

This is a base model: it continues text. It follows instructions only after fine-tuning, for which the
tokenizer has a chat template.
"""


def model_card(
    model: MiniMindConfig | str,
    *,
    settings: Mapping[str, Any] | None = None,
    numbers: Mapping[str, float] | None = None,
) -> str:
    """Return the text of a model card.

    Paths are reduced to their last part, since a card is published.

    Args:
        model: sizes of the model; a description of a model that transformers does not load.
        settings: settings of the run, as in its checkpoints; None where they are not known.
        numbers: any of step, tokens, loss, val_loss and val_bits_per_byte; NaN is omitted.
    """
    transformers = isinstance(model, MiniMindConfig)
    origin = "Pretrained with" if settings else "Converted by"
    known = {name: value for name, value in (numbers or {}).items() if math.isfinite(value)}
    lines = [
        _FRONT_MATTER.format(library="transformers" if transformers else "pytorch"),
        GENERATED,
        "\n# " + _title(settings) + "\n",
        f"{_describe(model)}. {origin} minimind-train {__version__}.\n",
        "## Training\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(settings or {}, known)),
    ]
    text = "\n".join(lines) + "\n" + (_USAGE if transformers else "")
    if settings and (recipe := list(_recipe(settings))):
        text += "\n## Recipe\n\n| option | value |\n|---|---|\n"
        text += "".join(f"| {name} | {value} |\n" for name, value in recipe)
    return text


def recorded_numbers(metrics: Path, step: int) -> dict[str, float]:
    """Return the last loss, val_loss and val_bits_per_byte in a run's metrics.jsonl up to a step."""
    found: dict[str, float] = {}
    for line in read_metrics(metrics) if metrics.is_file() else ():
        if line["step"] <= step:
            names = ("loss", "val_loss", "val_bits_per_byte")
            found |= {name: line[name] for name in names if isinstance(line.get(name), (int, float))}
    return found


def keeps_own_card(folder: Path) -> bool:
    """Return whether a folder has a card that somebody edited."""
    try:
        return GENERATED not in (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _describe(model: MiniMindConfig | str) -> str:
    if isinstance(model, str):
        return model
    name = "Qwen3-MoE" if model.use_moe else "Qwen3"
    if isinstance(model, TransformersConfig):
        name = model.architecture
    sizes = f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}"
    return f"{name} with {count(model.num_parameters())} parameters: {sizes}, {model.vocab_size:,} tokens"


def _title(settings: Mapping[str, Any] | None) -> str:
    named = settings and (settings.get("run_name") or settings.get("output_dir"))
    return _cell(Path(str(named)).name) if named else "A small language model"


def _facts(settings: Mapping[str, Any], numbers: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    if settings:
        names = [_cell(Path(str(entry)).name) for entry in settings.get("data") or ()]
        yield "data", ", ".join(names) or "the documentation built into Python (English)"
        if (initial := settings.get("from_weight")) is not None:
            hub = str(initial).startswith("hf://")
            yield "initialized from", _cell(str(initial) if hub else Path(str(initial)).name)
    for key, name, form in _NUMBERS:
        if key in numbers:
            yield name, format(numbers[key], form)
    if not settings and not numbers:
        yield "data", "not recorded: fill in"


def _recipe(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, name in _RECIPE.items():
        if (value := settings.get(key)) is not None:
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            yield name, f"{shown:g}" if isinstance(shown, float) else _cell(str(shown))


def _cell(text: str) -> str:
    """Return text that stays in its table cell."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")
