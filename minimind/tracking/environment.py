"""Description of a run's environment: versions, hardware, source revision and command line."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil  # a dependency of Accelerate
import torch
from accelerate import Accelerator

from ..config.options import CONFIG_SCHEMA
from ..version import __version__

PACKAGES = ("torch", "accelerate", "tokenizers", "safetensors", "numpy", "tensorboard")
# Words of a name, and ends of a name without separators, that mark a secret.
_SECRET_WORDS = {"key", "token", "secret", "password", "passwd", "pass", "pwd", "passphrase", "credential",
                 "credentials", "auth", "authorization", "bearer"}  # fmt: skip
_SECRET_ENDS = (
    *("apikey", "accesskey", "secretkey", "authkey", "privatekey"),
    *("token", "secret", "password", "passwd"),
)
# Values that show by their prefix what they are, whatever stands before them.
_SECRET_VALUES = re.compile(
    r"\b(hf_|ghp_|gho_|ghs_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{16,}|(?i:(?<=bearer ))\S+"
)
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|password|passwd|auth|signature)[^=&\s]*=)[^&\s]+", re.I
)
HIDDEN = "***"


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Return a JSON-serializable description of machine and software. Never raises."""
    device = torch.device(device)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide_secrets(sys.argv),
        "working_folder": _working_folder(),
        "git": _git_revision(),
        "python": platform.python_version(),
        # The metadata of a CUDA build may lack the local label of its version.
        "packages": {"minimind": __version__}
        | {name: _version(name) for name in PACKAGES}
        | {"torch": torch.__version__},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": str(device),
        **_accelerators(),
    }


def describe_launch(accelerator: Accelerator, *, precision: str, compiled: bool) -> dict[str, Any]:
    """Return how the processes of a run were launched; `precision` is that of matrix products."""
    kind = "one process" if accelerator.num_processes == 1 else "DDP"
    return {
        "processes": accelerator.num_processes,
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "kind": "FSDP2" if accelerator.is_fsdp2 else kind,
        "on_cpu": accelerator.device.type == "cpu",
        "precision": precision,
        "compiled": compiled,
        # How FSDP shards the model; other variables may hold secrets.
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("FSDP_", "PARALLELISM_CONFIG_"))
        },
    }


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line without the values that look like keys, tokens or passwords.

    A value is hidden after an option such as `--api-key` (or in `--api-key=...`, `WANDB_API_KEY=...`) that
    is not an option of this program, and between `//` and `@` in an address.
    """
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        header, colon, _ = argument.partition(":")
        if colon and _is_secret(header) and not set("/\\.=") & set(header):  # `Authorization: ...`
            name, equals = header, colon
        if hide_next and not argument.startswith("--"):
            shown.append(HIDDEN)
            hide_next = False
            continue
        secret = _is_secret(name)
        hide_next = secret and not equals and argument.startswith("-")
        text = f"{name}{equals}{HIDDEN}" if secret and equals else argument
        text = re.sub(r"(://)[^/@\s]+@", rf"\1{HIDDEN}@", text)
        shown.append(_SECRET_VALUES.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", text)))
    return shown


def _is_secret(option: str) -> bool:
    name = option.lstrip("-").replace("-", "_")
    if name.lower() in CONFIG_SCHEMA:
        return False
    # `wandbApiKey` has three words, `WANDB.API.KEY` as well.
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    parts = re.split(r"[^a-z0-9]+", words)
    return not _SECRET_WORDS.isdisjoint(parts) or any(part.endswith(_SECRET_ENDS) for part in parts)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerators() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"cuda": None, "gpus": []}
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _git_revision() -> dict[str, Any] | None:
    """Return the commit of the working directory and whether files differ from it; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", *arguments]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
