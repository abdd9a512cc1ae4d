"""The lines of `info` that a run, a checkpoint and a model folder share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formatting import count, duration


def model_rows(shape: Mapping[str, Any], parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the rows of a shape and of parameters by part; either may be empty."""
    rows = []
    if shape:
        inner = shape["intermediate_size"]
        if shape.get("use_moe"):
            each, passed = shape["moe_intermediate_size"], shape["num_experts_per_tok"]
            inner = f"{each} in each of {shape['num_experts']} experts ({passed} a token)"
        described = [
            f"{shape['num_hidden_layers']} blocks {shape['hidden_size']} wide",
            f"{shape['num_attention_heads']} heads" + _known(" of ", shape["head_dim"]),
            f"{shape['num_key_value_heads']} key/value heads",
            _known("inner width ", inner),
            _known("vocabulary ", shape["vocab_size"]),
        ]
        total = f"{count(parts['all'])} parameters: " if parts else ""
        rows.append(("model", total + ", ".join(filter(None, described))))
    if parts:
        tied = " (the embedding's)" if not parts["head"] else ""
        listed = [f"{part} {count(number)}" for part, number in parts.items() if part != "all"]
        rows.append(("parameters", ", ".join(listed).replace("head 0", "head 0" + tied)))
    return rows


def _known(name: str, value: Any) -> str:
    """Return a size with its name, nothing where the options leave it to be worked out."""
    return "" if value is None else f"{name}{value}"


def trained_text(steps: int, tokens: Any, passes: float | None) -> str:
    """Return how far a training went."""
    text = f"{steps:,} steps"
    text += f", {count(tokens)} tokens" if isinstance(tokens, int) else ""
    return text + (f", {passes:.3g} passes" if passes is not None else "")


def loss_text(loss: float | None, best: Mapping[str, Any] | None) -> str:
    """Return the last training loss and the best evaluation."""
    text = "not reported" if loss is None else f"{loss:.4f}"
    if best is not None:
        bits = best.get("val_bits_per_byte")
        text += f"; best validation {best['val_loss']:.4f}"
        text += f" ({bits:.4f} bits/byte)" if isinstance(bits, int | float) else ""
        text += f" at step {best['step']:,}"
    return text


def time_text(began: Any, last: Any, seconds: float | None) -> str:
    """Return when a run was, and how long it trained."""
    text = f"began {_moment(began)}" if began else "not recorded"
    text += f", last report {_moment(last)}" if last else ""
    return text + (f", {duration(seconds)} of training" if seconds is not None else "")


def _moment(text: str) -> str:
    """Return a time of ISO 8601 to the second, as it is read best."""
    return f"{text[:19].replace('T', ' ')} UTC"


def fingerprint_rows(fingerprints: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Return the row of fingerprints, none where none is known."""
    known = [f"{what} {value[:12]}" for what, value in fingerprints.items() if value and value != "none"]
    return [("fingerprint", ", ".join(known))] if known else []


def device_text(environment: Mapping[str, Any]) -> str:
    """Return the kinds of device that an environment names; how many took part is told by its launch."""
    gpus = environment.get("gpus") or []
    device = str(environment.get("device", "not recorded"))
    if device.startswith("cuda") and gpus:
        return ", ".join(sorted(set(map(str, gpus))))
    # Under a launcher each process has a number of its own, such as `cpu:0`.
    kind = device.partition(":")[0]
    return kind.upper() if kind in ("cpu", "mps") else device


def launch_text(environment: Mapping[str, Any]) -> str:
    """Return how the processes were started, as what follows the device; empty where it is not recorded."""
    launch = environment.get("launch")
    if not isinstance(launch, dict):
        return ""
    compiled = "compiled" if launch.get("compiled") else "not compiled"
    precision = {"no": "float32"}.get(launch.get("precision", ""), launch.get("precision"))
    processes = launch.get("processes", 1)
    together = "1 process" if processes == 1 else f"{processes} processes ({launch.get('kind')})"
    return f", {together}, {precision}, {compiled}"


def versions_text(environment: Mapping[str, Any]) -> str:
    """Return the versions and the source revision that an environment names."""
    packages = environment.get("packages") or {}
    parts = [f"{name} {version}" for name, version in packages.items() if name in ("minimind", "torch")]
    parts += [f"Python {environment['python']}"] if environment.get("python") else []
    git = environment.get("git")
    if isinstance(git, dict) and git.get("commit"):
        parts.append(f"git {str(git['commit'])[:12]}" + (" with changes" if git.get("changed") else ""))
    return ", ".join(parts) or "not recorded"
