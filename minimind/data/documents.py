"""Documents that are not read from files: those of the caller, and the corpus embedded in Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError, DataError
from .builtin_corpus import builtin_documents, builtin_fingerprint
from .readers import Reading


class Documents(Protocol):
    """Training documents of the caller, for `pretrain(data=...)`: tokenized once into the token cache.

    Attributes:
        fingerprint: any text that changes when the documents change; it is part of the key of the cache.
    """

    fingerprint: str

    def __iter__(self) -> Iterator[str]:
        """Yield the documents, in the same order each time; one is in memory at a time."""


@dataclass(frozen=True)
class CustomDocuments:
    """The documents of the caller, as the tokenization reads them."""

    documents_of_caller: Documents

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the caller.

        Raises:
            ConfigError: where there is none, or nothing to iterate over.
        """
        found = getattr(self.documents_of_caller, "fingerprint", None)
        if not isinstance(found, str) or not found or not hasattr(self.documents_of_caller, "__iter__"):
            raise ConfigError(
                f"data= got a {type(self.documents_of_caller).__name__}; it must yield documents when it is "
                "iterated over, and have the attribute `fingerprint`, a text that changes with them."
            )
        return found

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the documents; see `readers.TextFile.documents`."""
        for number, text in enumerate(self.documents_of_caller, 1):
            if not isinstance(text, str):
                raise DataError(
                    f"data=: document {number} is a {type(text).__name__}; yield the text of each document."
                )
            if reading.keeps(text):
                yield text


class BuiltinCorpus:
    """The corpus embedded in Python, the default of --data."""

    def __init__(self) -> None:
        """Identify the documents of this Python version."""
        self.fingerprint = builtin_fingerprint()

    def __iter__(self) -> Iterator[str]:
        return builtin_documents()
