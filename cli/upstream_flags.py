"""Flags of the original's train_pretrain.py that are spelt otherwise here: its commands can be pasted."""

from __future__ import annotations

import typer

from .options import RESUME_NEWEST, hidden_option

# What to do instead of flags that have no meaning here.
_REPLACED = {
    "device": "leave it out: a GPU is used where there is one; choose which by CUDA_VISIBLE_DEVICES, "
    "or the CPU by ACCELERATE_USE_CPU=true.",
    "num_workers": "leave it out: text is tokenized once and read from a memory map, which needs no workers.",
    "save_weight": "leave it out: the model always goes to the folder 'model' in --output-dir.",
}
_ONE_OR_ZERO = {"1": True, "0": False}
_SWITCHES = ("use_compile", "from_resume", "use_moe")

HIDDEN = [
    *(hidden_option(name, str) for name in (*_SWITCHES, *_REPLACED)),
    hidden_option("use_wandb", bool),
]


def translate(ctx: typer.Context) -> tuple[dict[str, str], list[str]]:
    """Return the settings that the original's flags stand for, as text, and one sentence for each problem."""
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
    if on.get("use_moe"):
        problems.append("--use-moe 1 is not supported: every layer is dense; leave it out.")
    for name, advice in _REPLACED.items():
        if ctx.params[name] is not None:
            problems.append(f"{_flag(name)} has no meaning here; {advice}")
    return values, problems


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
