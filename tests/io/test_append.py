"""Records that survive a disk that refuses them for a while."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.io import append
from minimind.io.append import AppendFile


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([None, errno.ENOSPC, errno.EDQUOT, errno.EIO])))
)
def test_no_record_is_lost_torn_or_repeated(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, int | None]]
) -> None:
    """Each attempt to write takes some bytes, then fails or not."""
    path = tmp_path_factory.mktemp("append") / "file"
    write, left = os.write, list(attempts)

    def unreliable(handle: int, data: bytes) -> int:
        if not left:
            return write(handle, data)
        size, number = left.pop(0)
        written = write(handle, data[: max(size, number is None)])
        if number is not None:
            raise OSError(number, os.strerror(number))
        return written

    errors: list[OSError] = []
    file = AppendFile(path, errors.append)
    records = [b"record %d\n" % number for number in range(20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append.os, "write", unreliable)
        for record in records:
            file.append(record)
        left.clear()
        file.close()
    assert path.read_bytes() == b"".join(records)
    assert file.num_pending == file.dropped == 0


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "MAX_PENDING_BYTES", 100)
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    errors: list[OSError] = []
    file = AppendFile(folder / "file", errors.append)
    for number in range(10):
        file.append(b"%018d\n\n" % number)
    assert (file.num_pending, file.dropped, len(errors)) == (5, 5, 1)
    folder.unlink()
    file.close()
    assert (folder / "file").read_bytes().split() == [b"%018d" % number for number in range(5, 10)]


def test_a_closed_file_can_be_closed_again_and_opens_for_a_late_record(tmp_path: Path) -> None:
    errors: list[OSError] = []
    file = AppendFile(tmp_path / "file", errors.append)
    file.append(b"early\n")
    file.close()
    file.close()
    file.append(b"late\n")
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"early\nlate\n"
    assert not errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_links_and_fifos_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "fifo")
    errors: list[OSError] = []
    for name in ("link", "fifo"):
        AppendFile(tmp_path / name, errors.append).append(b"x")
    assert len(errors) == 2
    assert (tmp_path / "victim").read_text() == "precious"
