"""The series lock: one load of a series at a time, whatever happens to the one before."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.locks import SeriesLock

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
LOCK = ".AAPL_1h.load.lock"
OTHER_LOAD = """
import sys, time, pathlib
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.locks import SeriesLock
lock = SeriesLock(pathlib.Path(sys.argv[1]), Series(stock("AAPL"), TIMEFRAMES["1h"]))
assert lock.try_acquire() == ""
print("locked", flush=True)
time.sleep(300)
"""


def test_a_second_load_learns_which_process_has_the_lock_and_gets_it_at_its_end(tmp_path: Path) -> None:
    first, second = SeriesLock(tmp_path, AAPL_1H), SeriesLock(tmp_path, AAPL_1H)
    assert first.try_acquire() == ""
    holder = second.try_acquire()
    assert str(AAPL_1H) in holder
    assert f"process {os.getpid()}, since 20" in holder
    first.release()
    assert second.try_acquire() == ""
    second.release()


def test_another_series_has_a_lock_of_its_own(tmp_path: Path) -> None:
    msft = Series(stock("MSFT"), TIMEFRAMES["1h"])
    locks = [SeriesLock(tmp_path, each) for each in (AAPL_1H, msft)]
    assert [lock.try_acquire() for lock in locks] == ["", ""]


def test_a_killed_load_frees_the_lock(tmp_path: Path) -> None:
    """Until then the holder is named."""
    other = subprocess.Popen([sys.executable, "-c", OTHER_LOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    lock = SeriesLock(tmp_path, AAPL_1H)
    assert f"process {other.pid}, " in lock.try_acquire()
    other.kill()
    other.communicate()
    assert lock.try_acquire() == ""


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"process none, since ever\n" * 1000])
def test_the_content_of_the_lock_file_decides_nothing(content: bytes, tmp_path: Path) -> None:
    """Whatever is in the file, a free lock is free and a taken one is taken; then the file is named."""
    (tmp_path / LOCK).write_bytes(b"process 1, since 2024-01-02 14:02 UTC\n")
    lock = SeriesLock(tmp_path, AAPL_1H)
    assert lock.try_acquire() == ""
    (tmp_path / LOCK).write_bytes(content)
    assert LOCK in SeriesLock(tmp_path, AAPL_1H).try_acquire()
    lock.release()


def test_a_directory_in_place_of_the_lock_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StoreError, match=r"\.AAPL_1h\.load\.lock: there is a directory"):
        SeriesLock(tmp_path, AAPL_1H).try_acquire()


def test_a_folder_that_cannot_be_written_has_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even root's system calls are refused on a read-only file system, which a test cannot mount."""
    refused: list[object] = []

    def refuse(path: object, *_: object) -> int:
        refused.append(path)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    lock = SeriesLock(tmp_path, AAPL_1H)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert lock.try_acquire() == ""
        lock.release()
    assert refused == [tmp_path / LOCK]
    assert list(tmp_path.iterdir()) == []
