"""Whose turn it is to load a series: one at a time, whatever happens to the one before."""

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
from ktrdr_pipelines.store.locks import taking_turn

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
HOLDER = """
import sys, time, pathlib
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.locks import taking_turn
with taking_turn(pathlib.Path(sys.argv[1]), Series(stock("AAPL"), TIMEFRAMES["1h"])):
    print("mine", flush=True)
    time.sleep(300)
"""


def test_a_second_load_waits_says_so_once_and_goes_on_when_the_first_ends(tmp_path: Path) -> None:
    told: list[Path] = []
    order: list[str] = []
    is_told, is_in = threading.Event(), threading.Event()

    def second() -> None:
        with taking_turn(tmp_path, AAPL_1H, on_wait=lambda lock: (told.append(lock), is_told.set())[0]):
            order.append("second")
        is_in.set()

    with taking_turn(tmp_path, AAPL_1H):
        thread = threading.Thread(target=second)
        thread.start()
        assert is_told.wait(10)
        assert not is_in.wait(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert told == [tmp_path / ".AAPL_1h.load.lock"]


def test_another_series_does_not_wait(tmp_path: Path) -> None:
    with (
        taking_turn(tmp_path, AAPL_1H),
        taking_turn(tmp_path, Series(stock("MSFT"), TIMEFRAMES["1h"]), on_wait=pytest.fail),
    ):
        pass


def test_a_killed_load_frees_its_turn(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    waited: list[Path] = []

    def kill(lock: Path) -> None:
        waited.append(lock)
        holder.send_signal(signal.SIGKILL)

    with taking_turn(tmp_path, AAPL_1H, on_wait=kill):
        assert waited
    holder.communicate()


def test_a_load_that_fails_frees_its_turn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), taking_turn(tmp_path, AAPL_1H):
        raise ValueError("broken")
    with taking_turn(tmp_path, AAPL_1H, on_wait=pytest.fail):
        pass


def test_a_folder_in_the_way_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".AAPL_1h.load.lock").mkdir()
    with (
        pytest.raises(StoreError, match=r"\.AAPL_1h\.load\.lock: there is a directory"),
        taking_turn(tmp_path, AAPL_1H),
    ):
        pass


def test_a_folder_that_cannot_be_written_has_no_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even root's system calls are refused on a read-only file system, which a test cannot mount."""
    refused: list[object] = []

    def refuse(path: object, *_: object) -> int:
        refused.append(path)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with taking_turn(tmp_path, AAPL_1H, on_wait=pytest.fail):
            assert refused == [tmp_path / ".AAPL_1h.load.lock"]
    assert list(tmp_path.iterdir()) == []
