"""Flags of the original's train_pretrain.py that are spelt otherwise here: its commands can be pasted.

docs/migration.md lists all of its options.
"""

from __future__ import annotations

import os

import typer

from minimind.launch_env import world_size

from .options import RESUME_NEWEST, hidden_option

# Flags that change nothing here, and why.
_NEEDLESS = {
    "num_workers": "text is tokenized once and read from a memory map, which needs no workers",
    "save_weight": "the model always goes to the folder 'model' in --output-dir",
    "device": "a GPU is used where there is one",
}
_ONE_OR_ZERO = {"1": True, "0": False}
_SWITCHES = ("use_compile", "from_resume")

HIDDEN = [
    *(hidden_option(name, str) for name in (*_SWITCHES, *_NEEDLESS)),
    hidden_option("use_wandb", bool),
]


def translate(ctx: typer.Context) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the settings that the original's flags stand for, as text.

    `--device cpu` keeps this process, and those it starts, from the GPUs.

    Returns:
        The settings, one sentence for each problem, and one for each flag that is passed over.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    on: dict[str, bool] = {}
    for name in _SWITCHES:
        text = ctx.params[name]
        if text in _ONE_OR_ZERO:
            on[name] = _ONE_OR_ZERO[text]
        elif text is not None:
            problems.append(f"{_flag(name)} {text} is not 0 or 1; write 0 or 1.")
    if "use_compile" in on:
        values["compile"] = str(on["use_compile"])
    if on.get("from_resume"):
        values["resume"] = RESUME_NEWEST
    device = ctx.params["device"]
    problems += _choose_device(device)
    remarks = [
        f"{_flag(name)} {ctx.params[name]} is passed over: {why}."
        for name, why in _NEEDLESS.items()
        if ctx.params[name] is not None and (name, device) != ("device", "cpu")
    ]
    return values, problems, remarks


def _choose_device(device: str | None) -> list[str]:
    """Do as --device says; return a sentence where that is too late inside of the process."""
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    kind, _, number = (device or "").partition(":")
    # Under a launcher the original, too, takes the GPU that belongs to the process.
    if kind == "cuda" and number not in ("", "0") and world_size() == 1:
        return [f"--device {device} is not read; put CUDA_VISIBLE_DEVICES={number} before the command."]
    return []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
