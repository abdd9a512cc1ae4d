"""Documents from anywhere: here the rows of an SQLite database.

python data_source.py notes.db
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import minimind


class SQLiteDocuments:
    """Yields the texts of a table, tokenized once into the token cache."""

    def __init__(self, path: Path, query: str = "SELECT text FROM documents ORDER BY rowid") -> None:
        self.path, self.query = path, query
        # Any text that changes when the documents change: with the same one the cache is used again.
        self.fingerprint = f"{path.resolve()} {path.stat().st_mtime_ns} {query}"

    def __iter__(self) -> Iterator[str]:
        """Yield documents in a fixed order, one in memory at a time."""
        with closing(sqlite3.connect(self.path)) as database:
            for (text,) in database.execute(self.query):
                yield text


def train(path: Path, **options: Any) -> Any:
    """Train with the preset `tiny`, changed by `options`."""
    config = minimind.preset_config("tiny", output_dir="runs/sqlite", **options)
    return minimind.pretrain(config, data=SQLiteDocuments(path))


if __name__ == "__main__":
    print(train(Path(sys.argv[1])).history.losses)
