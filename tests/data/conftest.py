"""Fixtures for tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from minimind.data.shards import TokenShards
from support.made_text import ByteTokenizer, write_shards


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenShards]:
    return lambda lengths, **kwargs: write_shards(tmp_path_factory.mktemp("shards"), lengths, **kwargs)
