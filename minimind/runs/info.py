"""Describe a run, a checkpoint, a model folder or a weight file, and suggest next commands."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import (
    MANIFEST,
    MODEL,
    TRAINER,
    StoredCheckpoint,
    best_checkpoint,
    folder_bytes,
    is_checkpoint_name,
    open_checkpoint,
)
from ..errors import CheckpointError, ConfigError
from ..formats.weight_header import WeightHeader, check_layers, read_headers
from ..formatting import count, size
from ..io.checksums import check_files
from ..io.reading import read_json
from ..launch_env import resume_command
from ..modeling.parameter_count import count_parts
from ..modeling.transformers_config import TransformersConfig, config_of
from ..run_folder import RunFolder
from .info_text import (
    device_text,
    fingerprint_rows,
    launch_text,
    loss_text,
    measured,
    model_rows,
    time_text,
    trained_text,
    versions_text,
)
from .record import FINGERPRINTS, RunRecord, read_run

CONFIG = "config.json"


@dataclass(frozen=True)
class Info:
    """A description.

    Attributes:
        kind: `run`, `checkpoint`, `model` or `weights`.
        values: everything, as JSON types.
        rows: key and value of each printed line.
        next: suggested command lines, each with its minimind-train command.
    """

    kind: str
    values: dict[str, Any]
    rows: list[tuple[str, str]]
    next: list[tuple[str, str]]


def read_info(path: Path) -> Info:
    """Describe what is at a path.

    Raises:
        UserError: when it is none of these, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a run, a checkpoint, a model or a weight file.")
    if path.is_file():
        return _weights(path)
    if ((path / MANIFEST).is_file() and (path / TRAINER).is_file()) or is_checkpoint_name(path.name):
        return _checkpoint(open_checkpoint(path))
    if RunFolder(path).holds_a_run():
        return _run(read_run(path))
    if (path / CONFIG).is_file():
        return _model(path)
    raise ConfigError(
        f"{path} is no run, checkpoint, model folder or weight file; name one, such as the --output-dir of a "
        "run."
    )


def _run(run: RunRecord) -> Info:
    parts = run_parts(run)
    best, environment = run.best(), run.environment
    times = [line["time"] for line in run.metrics if isinstance(line.get("time"), str)]
    seconds = run.seconds
    checkpoints = run.checkpoints
    disk = {
        "all": folder_bytes(run.path),
        "checkpoints": sum(checkpoint.num_bytes for checkpoint in checkpoints),
        "model": folder_bytes(run.folder.model),
    }
    marked = best_checkpoint(run.folder.checkpoints)
    values: dict[str, Any] = {
        "kind": "run",
        "path": str(run.path),
        "finished": run.finished,
        "shape": {name: getattr(run.config, name) for name in SHAPE} if run.folder.config.is_file() else {},
        "parameters": parts,
        "steps": run.steps,
        "tokens": run.tokens,
        "passes": run.last("epoch"),
        "loss": run.last("loss"),
        "best": None
        if best is None
        else {name: best.get(name) for name in ("step", "val_loss", "val_bits_per_byte")},
        "best_checkpoint": None if marked is None else marked[0],
        "checkpoints": [checkpoint.step for checkpoint in checkpoints],
        "began": min(times, default=environment.get("started")),
        "last_report": max(times, default=None),
        "training_seconds": seconds,
        "tokens_per_second": run.last("total_tokens_per_second") or run.last("tokens_per_second"),
        "packages": environment.get("packages", {}),
        "python": environment.get("python"),
        "git": environment.get("git"),
        "device": device_text(environment),
        "launch": environment.get("launch"),
        "data": list(run.config.data),
        "fingerprints": {what: run.fingerprint(what) for what in FINGERPRINTS},
        "bytes": disk,
        "report": str(run.folder.report) if run.folder.report.is_file() else None,
    }
    state = "finished" if run.finished else "not finished"
    rows = [
        ("run", f"{run.path}, {state}"),
        *model_rows(values["shape"], parts),
        ("trained", trained_text(run.steps, run.tokens, values["passes"])),
        *measured("loss", loss_text(values["loss"], best)),
        *measured("time", time_text(values["began"], values["last_report"], seconds)),
        *measured("speed", f"{count(speed)} tokens/s" if (speed := values["tokens_per_second"]) else ""),
        ("device", values["device"] + launch_text(environment)),
        *measured("versions", versions_text(environment)),
        ("data", ", ".join(run.config.data) or "built-in corpus"),
        *fingerprint_rows(values["fingerprints"]),
        (
            "disk",
            f"{size(disk['all'])}: {len(checkpoints)} checkpoints {size(disk['checkpoints'])}, "
            f"model {size(disk['model'])}",
        ),
        *measured("report", values["report"] or ""),
    ]
    folder = shlex.quote(str(run.path))
    following = _uses(folder) if run.finished or checkpoints else []
    if checkpoints:
        resume = resume_command(run.path, environment.get("launch") or {})
        more = f" {_limit(run)} N" if run.finished else ""
        following.insert(0, ("pretrain", resume + more))
    following.append(("reproduce", f"minimind-train reproduce {folder}"))
    return Info("run", values, rows, following)


def _limit(run: RunRecord) -> str:
    """Return the option that limits a finished run, to be raised on resume."""
    if run.config.max_steps is not None and run.steps >= run.config.max_steps:
        return "--max-steps"
    epochs = run.last("epoch")
    if run.config.max_tokens is not None and epochs is not None and epochs < run.config.max_epochs:
        return "--max-tokens"
    return "--epochs"


def _checkpoint(checkpoint: StoredCheckpoint) -> Info:
    trainer = checkpoint.trainer
    settings: Mapping[str, Any] = trainer.get("settings", {})
    header = read_headers([checkpoint.path / MODEL])
    best = best_checkpoint(checkpoint.path.parent)
    if best is not None and best[0] != checkpoint.step:
        best = None
    state: Mapping[str, Any] = trainer.get("state", {})
    shape = {name: settings.get(name) for name in SHAPE}
    fingerprints = {what: settings.get(key) for what, key in FINGERPRINTS.items()}
    values: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "shape": shape,
        "parameters": _parameters(header),
        "dtypes": list(header.dtypes),
        "steps": checkpoint.step,
        "tokens": trainer.get("tokens"),
        "best": {"step": best[0], "val_loss": best[1]} if best is not None else None,
        "digest": state.get("digest"),
        "written": _written(checkpoint.path),
        "packages": trainer.get("versions", {}),
        "fingerprints": fingerprints,
        "bytes": {"all": checkpoint.num_bytes},
    }
    rows = [
        ("checkpoint", f"{checkpoint.path}, intact" + (", the best of its run" if best else "")),
        *model_rows(shape, values["parameters"]),
        ("trained", trained_text(checkpoint.step, trainer.get("tokens"), None)),
        *measured("loss", f"validation {best[1]:.4f}" if best else ""),
        ("written", values["written"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["packages"].items())),
        *fingerprint_rows(fingerprints),
        ("disk", size(checkpoint.num_bytes)),
    ]
    folder = shlex.quote(str(checkpoint.path))
    run = RunFolder(checkpoint.path.parent.parent)
    following = _uses(folder)
    if run.config.is_file():
        resume = f"minimind-train pretrain --resume {folder} --output-dir {shlex.quote(str(run.path))}"
        following.insert(0, ("pretrain", resume))
    return Info("checkpoint", values, rows, following)


def _model(path: Path) -> Info:
    check_files(path)
    try:
        config = read_json(path / CONFIG)
        model_config = config_of(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / CONFIG} cannot be read ({error}); copy it again.") from error
    except (ConfigError, AttributeError) as error:
        raise ConfigError(f"{path / CONFIG} is not of a supported model: {error}") from error
    files = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    if not files:
        raise ConfigError(f"{path} has no .safetensors; name a folder with config.json and weights.")
    header = read_headers(files)
    if isinstance(model_config, TransformersConfig):
        shape = {name: getattr(model_config, name) for name in SHAPE}
    else:
        check_layers(model_config, header.shapes, path)
        shape = dataclasses.asdict(model_config)
    return _described(path, "model", header, shape, folder_bytes(path))


def _weights(path: Path) -> Info:
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"{path} is no weight file; name a .safetensors or .pth.")
    return _described(path, "weights", read_headers([path]), {}, path.stat().st_size)


def _described(path: Path, kind: str, header: WeightHeader, shape: dict[str, Any], num_bytes: int) -> Info:
    values: dict[str, Any] = {
        "kind": kind,
        "path": str(path),
        "shape": shape,
        "parameters": _parameters(header),
        "dtypes": list(header.dtypes),
        "tensors": len(header.shapes),
        "written": _written(path),
        "tokenizer": (path / "tokenizer.json").is_file(),
        "bytes": {"all": num_bytes},
    }
    rows = [
        (kind, f"{path}, {', '.join(header.dtypes)}, {len(header.shapes)} tensors"),
        *model_rows(shape, values["parameters"]),
        ("written", values["written"]),
        ("disk", size(num_bytes)),
    ]
    # Other commands read a .safetensors by its folder, if that has a config.
    folder = path.parent if path.suffix == ".safetensors" else path
    readable = folder == path or (folder / CONFIG).is_file() or (folder / TRAINER).is_file()
    quoted = shlex.quote(str(folder))
    following = _uses(quoted) if readable else []
    if kind == "model":
        following.append(("pretrain", f"minimind-train pretrain --from-weight {quoted} --data TEXT"))
    return Info(kind, values, rows, following)


def _parameters(header: WeightHeader) -> dict[str, int]:
    """Return the number of parameters, of all and by part."""
    parts = count_parts(header.shapes)
    return {"all": sum(parts.values()), **parts}


def _written(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def _uses(quoted: str) -> list[tuple[str, str]]:
    """Return the commands that use the weights at a path."""
    return [
        ("generate", f"minimind-train generate {quoted}"),
        ("export", f"minimind-train export {quoted} --output FOLDER"),
    ]


SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "use_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("vocab_size", "tie_word_embeddings"),
)


def run_parts(run: RunRecord) -> dict[str, int]:
    """Return the parameters by part from the newest weights; empty without weights."""
    files = [run.folder.model / "model.safetensors"]
    files += [checkpoint.path / MODEL for checkpoint in reversed(run.checkpoints)]
    for file in files:
        if file.is_file():
            with suppress(ConfigError, CheckpointError):
                return _parameters(read_headers([file]))
    return {}
