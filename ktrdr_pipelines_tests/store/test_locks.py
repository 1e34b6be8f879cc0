"""The series lock: one load of a series at a time, whatever happens to the one before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.locks import series_lock

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
LOCK = ".AAPL_1h.load.lock"
OTHER_LOAD = """
import sys, time, pathlib
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.locks import series_lock
with series_lock(pathlib.Path(sys.argv[1]), Series(stock("AAPL"), TIMEFRAMES["1h"])):
    print("locked", flush=True)
    time.sleep(300)
"""


def test_a_second_load_waits_reports_it_once_and_starts_when_the_first_ends(tmp_path: Path) -> None:
    reports: list[str] = []
    order: list[str] = []
    is_waiting, is_in = threading.Event(), threading.Event()

    def report(reason: str) -> None:
        reports.append(reason)
        is_waiting.set()

    def second() -> None:
        with series_lock(tmp_path, AAPL_1H, on_wait=report):
            order.append("second")
        is_in.set()

    with series_lock(tmp_path, AAPL_1H):
        thread = threading.Thread(target=second)
        thread.start()
        assert is_waiting.wait(10)
        assert not is_in.wait(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert len(reports) == 1
    assert str(AAPL_1H) in reports[0]
    assert f"process {os.getpid()}, since 20" in reports[0]


def test_another_series_does_not_wait(tmp_path: Path) -> None:
    with (
        series_lock(tmp_path, AAPL_1H),
        series_lock(tmp_path, Series(stock("MSFT"), TIMEFRAMES["1h"]), on_wait=pytest.fail),
    ):
        pass


def test_a_killed_load_frees_the_lock(tmp_path: Path) -> None:
    """The report names the process that was killed."""
    other = subprocess.Popen([sys.executable, "-c", OTHER_LOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    reports: list[str] = []

    def kill(reason: str) -> None:
        reports.append(reason)
        other.send_signal(signal.SIGKILL)

    with series_lock(tmp_path, AAPL_1H, on_wait=kill):
        assert f"process {other.pid}, " in reports[0]
    other.communicate()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"process none, since ever\n" * 1000])
def test_the_content_of_the_lock_file_decides_nothing(content: bytes, tmp_path: Path) -> None:
    """Whatever is in the file, a free lock is free and a taken one is taken; the report then names the file."""
    (tmp_path / LOCK).write_bytes(b"process 1, since 2024-01-02 14:02 UTC\n")
    reports: list[str] = []

    def second() -> None:
        with series_lock(tmp_path, AAPL_1H, on_wait=reports.append):
            pass

    with series_lock(tmp_path, AAPL_1H, on_wait=pytest.fail):
        (tmp_path / LOCK).write_bytes(content)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(10)
    assert LOCK in reports[0]


def test_a_load_that_fails_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), series_lock(tmp_path, AAPL_1H):
        raise ValueError("broken")
    with series_lock(tmp_path, AAPL_1H, on_wait=pytest.fail):
        pass


def test_a_directory_in_place_of_the_lock_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(StoreError, match=r"\.AAPL_1h\.load\.lock: there is a directory"),
        series_lock(tmp_path, AAPL_1H),
    ):
        pass


def test_a_folder_that_cannot_be_written_has_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even root's system calls are refused on a read-only file system, which a test cannot mount."""
    refused: list[object] = []

    def refuse(path: object, *_: object) -> int:
        refused.append(path)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with series_lock(tmp_path, AAPL_1H, on_wait=pytest.fail):
            assert refused == [tmp_path / LOCK]
    assert list(tmp_path.iterdir()) == []
