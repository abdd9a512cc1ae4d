"""Names of options in messages: flags as typed, or fields as in Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import ConfigError, UserError

# Whether messages name options as typed (`--max-steps 0`) or as in Python (`max_steps=0`).
_typed: ContextVar[bool] = ContextVar("typed", default=False)


def flag_of(name: str) -> str:
    """Return the command-line option of a field name."""
    return "--" + name.replace("_", "-")


def options_are_typed() -> bool:
    """Return whether messages name options by their command-line flags."""
    return _typed.get()


@contextmanager
def options_were_typed() -> Iterator[None]:
    """Name options in messages by their command-line flags."""
    token = _typed.set(True)
    try:
        yield
    finally:
        _typed.reset(token)


def for_caller(message: str, names: Iterable[str]) -> str:
    """Replace the flags of options by the names of their fields, unless the options were typed.

    A command to type keeps its flags.
    """
    if _typed.get():
        return message
    fields = {flag_of(name): name for name in names}
    return re.sub(
        r"(?:minimind-train|accelerate launch)[^;,\n]*|--[a-z][a-z0-9-]*",
        lambda found: fields.get(found[0], found[0]),
        message,
    )


@contextmanager
def errors_for_caller(names: Iterable[str]) -> Iterator[None]:
    """Apply `for_caller` to the errors that leave the block, or the function that this decorates."""
    try:
        yield
    except UserError as error:
        error.args = (for_caller(str(error), names),)
        if isinstance(error, ConfigError):
            error.problems = [for_caller(problem, names) for problem in error.problems]
        raise
