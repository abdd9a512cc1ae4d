"""Lines that `info` prints for runs, checkpoints and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formatting import count, duration


def model_rows(shape: Mapping[str, Any], parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the rows of the sizes and of the parameters by part; either may be empty."""
    rows = []
    if shape:
        inner = shape["intermediate_size"]
        if shape.get("use_moe"):
            inner = (
                f"{shape['moe_intermediate_size']} in each of {shape['num_experts']} experts "
                f"(top-{shape['num_experts_per_tok']})"
            )
        described = [
            f"{shape['num_hidden_layers']} layers, hidden size {shape['hidden_size']}",
            *(
                [
                    f"{shape['num_attention_heads']} heads" + _known(" of ", shape["head_dim"]),
                    f"{shape['num_key_value_heads']} key/value heads",
                ]
                if shape["num_attention_heads"] is not None
                else []
            ),
            _known("intermediate size ", inner),
            _known("vocabulary ", shape["vocab_size"]),
        ]
        total = f"{count(parts['all'])} parameters: " if parts else ""
        rows.append(("model", total + ", ".join(filter(None, described))))
    if parts:
        listed = [
            f"{'LM head' if part == 'head' else part} {count(number)}"
            + (" (tied)" if part == "head" and not number else "")
            for part, number in parts.items()
            if part != "all"
        ]
        rows.append(("parameters", ", ".join(listed)))
    return rows


def _known(name: str, value: Any) -> str:
    """Return a size with its name, nothing where it is not resolved."""
    return "" if value is None else f"{name}{value}"


def measured(key: str, text: str) -> list[tuple[str, str]]:
    """Return the row of a measurement, no row where nothing was measured."""
    return [(key, text)] if text else []


def trained_text(steps: int, tokens: Any, epochs: float | None) -> str:
    """Return the steps, tokens and epochs of a training."""
    text = f"{steps:,} steps"
    text += f", {count(tokens)} tokens" if isinstance(tokens, int) else ""
    return text + (f", {epochs:.3g} epochs" if epochs is not None else "")


def loss_text(loss: float | None, best: Mapping[str, Any] | None) -> str:
    """Return the last training loss and the best evaluation, as far as they were measured."""
    parts = [] if loss is None else [f"{loss:.4f}"]
    if best is not None:
        bits = best.get("val_bits_per_byte")
        shown = f" ({bits:.4f} bits/byte)" if isinstance(bits, int | float) else ""
        parts.append(f"best validation {best['val_loss']:.4f}{shown} at step {best['step']:,}")
    return "; ".join(parts)


def time_text(began: Any, last: Any, seconds: float | None) -> str:
    """Return start, last report and training time of a run, as far as they were recorded."""
    parts = [f"started {_moment(began)}"] if began else []
    parts += [f"last report {_moment(last)}"] if last else []
    parts += [f"{duration(seconds)} of training"] if seconds is not None else []
    return ", ".join(parts)


def _moment(text: str) -> str:
    """Return an ISO 8601 time to the second."""
    return f"{text[:19].replace('T', ' ')} UTC"


def fingerprint_rows(fingerprints: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Return the row of fingerprints, none without any."""
    known = [f"{what} {value[:12]}" for what, value in fingerprints.items() if value and value != "none"]
    return measured("fingerprint", ", ".join(known))


def device_text(environment: Mapping[str, Any]) -> str:
    """Return the kinds of device of an environment."""
    gpus = environment.get("gpus") or []
    device = str(environment.get("device", "not recorded"))
    if device.startswith("cuda") and gpus:
        return ", ".join(sorted(set(map(str, gpus))))
    # Under a launcher devices are numbered, such as `cpu:0`.
    kind = device.partition(":")[0]
    return kind.upper() if kind in ("cpu", "mps") else device


def launch_text(environment: Mapping[str, Any]) -> str:
    """Return processes, precision and compilation, to follow the device; empty where not recorded."""
    launch = environment.get("launch")
    if not isinstance(launch, dict):
        return ""
    compiled = "compiled" if launch.get("compiled") else "not compiled"
    precision = {"no": "float32"}.get(launch.get("precision", ""), launch.get("precision"))
    processes = launch.get("processes", 1)
    ranks = "1 process" if processes == 1 else f"{processes} processes ({launch.get('kind')})"
    return f", {ranks}, {precision}, {compiled}"


def versions_text(environment: Mapping[str, Any]) -> str:
    """Return the versions and the git commit of an environment; empty where not recorded."""
    packages = environment.get("packages") or {}
    parts = [f"{name} {version}" for name, version in packages.items() if name in ("minimind", "torch")]
    parts += [f"Python {environment['python']}"] if environment.get("python") else []
    git = environment.get("git")
    if isinstance(git, dict) and git.get("commit"):
        parts.append(f"git {str(git['commit'])[:12]}" + (" with changes" if git.get("changed") else ""))
    return ", ".join(parts)
