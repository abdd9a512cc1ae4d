"""User errors: the command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

from collections.abc import Sequence


def needs_package(what: str, package: str) -> str:
    """Return the sentence for a package that is not installed; `what` needs it."""
    return f"{what} needs the package {package}, which is not installed; pip install {package}."


class UserError(Exception):
    """An error the user can fix; the message says what is wrong, where, and how to fix it."""


class ConfigError(UserError):
    """One or more invalid options, reported together.

    Attributes:
        problems: one sentence per invalid option, with its name and the fix.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Invalid training data; the message names the file and, if known, the line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, corrupt, or of another run."""


class TrainingError(UserError):
    """A run that cannot usefully continue; the message gives advice."""


class RankError(UserError):
    """A rank that failed, no longer answers, or disagrees with the others; the message names it."""
