"""Mistakes a user can mend. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """One or more wrong options, reported together.

    Attributes:
        problems: one sentence per wrong option, each naming the option and the fix.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Training text that cannot be used; the message names the file and, where there is one, the line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not belong to this run."""


class TrainingError(UserError):
    """A run that cannot usefully go on; the message gives advice."""


class RankError(UserError):
    """One process of several that failed, no longer answers, or differs; the message names it."""
