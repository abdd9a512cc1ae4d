"""The environment of a run, as `environment.json` holds it, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
