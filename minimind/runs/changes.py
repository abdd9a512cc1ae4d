"""Find changes since a run that may make its reproduction differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..config.options import PretrainConfig
from ..data.prepare import fingerprint_in_cache, prepare_data
from ..errors import UserError
from ..launch_env import device_type
from ..tokenizer import Tokenizer
from ..tracking.environment import describe_environment
from .info_text import device_text
from .record import RunRecord


def data_changes(
    run: RunRecord, config: PretrainConfig, tokenizer: Tokenizer | None, check: bool
) -> Iterator[str]:
    """Yield warnings about training data that changed or could not be compared.

    Args:
        config: its options, with paths valid from the current folder.
        tokenizer: tokenizer of `config`; None where it cannot be loaded.
        check: tokenize data that is not in the cache.
    """
    recorded = run.fingerprint("training text")
    if recorded is None:
        yield "the run did not record its data, so it could not be compared."
        return
    if tokenizer is None:
        return
    try:
        found = fingerprint_in_cache(config, tokenizer)
        if found is None and check:
            found = prepare_data(config, tokenizer).fingerprint
    except UserError as error:
        yield f"the data cannot be read: {error}"
        return
    if found is None:
        yield (
            "the data was not compared, since it is not in the token cache as it is now; pass --check-data "
            "to tokenize it."
        )
    elif found != recorded:
        yield "the training or validation data has changed."


def environment_changes(run: RunRecord) -> Iterator[str]:
    """Yield the differences between the run's environment and the current one."""
    then = run.environment
    if not then:
        yield "the run recorded no environment, so code, packages and device could not be compared."
        return
    device = device_type()
    if isinstance(launch := then.get("launch"), dict) and launch.get("on_cpu"):
        device = "cpu"
    now = describe_environment(device)
    packages = then.get("packages") or {}
    for name, version in now["packages"].items():
        if name in packages and packages[name] != version:
            what = "the code" if name == "minimind" else "the package"
            yield f"{what} {name} was {packages[name]} and is {version}."
    if then.get("python") not in (None, now["python"]):
        yield f"Python was {then['python']} and is {now['python']}."
    yield from _git_changes(then.get("git"), now["git"])
    if device_text(then) != device_text(now):
        yield f"the device was {device_text(then)} and is {device_text(now)}."


def _git_changes(then: Any, now: Any) -> Iterator[str]:
    if not isinstance(then, dict) or not then.get("commit"):
        return
    commit = str(then["commit"])
    if not isinstance(now, dict):
        yield f"the run was started in a git repository at {commit[:12]}, and this folder is in none."
    elif now.get("commit") != commit:
        yield f"the git commit of the working folder was {commit[:12]} and is {str(now['commit'])[:12]}."
    if then.get("changed"):
        yield f"files differed from the git commit {commit[:12]} when the run was started."
    elif isinstance(now, dict) and now.get("changed"):
        yield "files differ from the git commit now."


def caveats(run: RunRecord) -> Iterator[str]:
    """Yield properties of the run that no command reproduces."""
    if run.config.resume is not None:
        yield (
            "the run was resumed (--resume); the command has the options of its last part and starts from "
            "step 0."
        )
    if run.config.max_time is not None:
        yield f"--max-time {run.config.max_time} ends a run by wall time, so it may end at another step."
    if any(line.get("kind") == "rewind" for line in run.metrics):
        yield "the run rewound after a loss spike, which depends on the last digits of the losses."
    if run.unread:
        yield f"config.toml has {', '.join(run.unread)}, which this version does not support."
    if run.config.from_weight is not None:
        yield f"the weights in {run.config.from_weight} were not compared, since runs do not record them."
