"""Options of upstream's train_pretrain.py, so that its commands work here.

docs/migration.md lists all of them.
"""

from __future__ import annotations

import os

import typer

from minimind.config.naming import flag_of
from minimind.config.options import AUTO
from minimind.launch_env import world_size

from .options import hidden_option

# Ignored options, and why.
_IGNORED = {
    "num_workers": "data is tokenized once and memory-mapped, without workers",
    "save_weight": "the model is always saved in the folder 'model' of --output-dir",
    "device": "a GPU is used if available",
}
_ONE_OR_ZERO = {"1": True, "0": False}
_SWITCHES = ("use_compile", "from_resume")

HIDDEN = [
    *(hidden_option(name, str) for name in (*_SWITCHES, *_IGNORED)),
    hidden_option("use_wandb", bool),
]


def translate(ctx: typer.Context) -> tuple[dict[str, str], list[str], list[str]]:
    """Translate upstream's options to fields of the configuration.

    `--device cpu` disables GPUs for this process and its children.

    Returns:
        The values as strings by field name, a sentence for each problem, and one for each ignored option.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    enabled: dict[str, bool] = {}
    for name in _SWITCHES:
        text = ctx.params[name]
        if text in _ONE_OR_ZERO:
            enabled[name] = _ONE_OR_ZERO[text]
        elif text is not None:
            problems.append(f"{flag_of(name)} {text} is not 0 or 1; write 0 or 1.")
    if "use_compile" in enabled:
        values["compile"] = str(enabled["use_compile"])
    if enabled.get("from_resume"):
        values["resume"] = AUTO
    device = ctx.params["device"]
    problems += _choose_device(device)
    notes = [
        f"{flag_of(name)} {ctx.params[name]} is ignored: {why}."
        for name, why in _IGNORED.items()
        if ctx.params[name] is not None and (name, device) != ("device", "cpu")
    ]
    return values, problems, notes


def _choose_device(device: str | None) -> list[str]:
    """Apply --device; return a problem if the process can no longer choose that device."""
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    kind, _, number = (device or "").partition(":")
    # Under a launcher upstream, too, uses the GPU of the process.
    if kind == "cuda" and number not in ("", "0") and world_size() == 1:
        return [f"--device {device} is not supported; put CUDA_VISIBLE_DEVICES={number} before the command."]
    return []
