"""What the store leaves behind when a process is killed or the disk refuses: the old file or the new one, always."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ktrdr_pipelines.bars.schema import bars_from_columns, empty_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store import store as series_store
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.results import Written
from ktrdr_pipelines.store.settle import settle
from ktrdr_pipelines.store.store import Store

T0 = 1_704_205_800  # 2024-01-02T14:30:00Z
NOW = datetime(2025, 1, 1, tzinfo=UTC)
AAPL_1M = Series(stock("AAPL"), parse_timeframe("1m"))
WORKER = Path(__file__).with_name("crash_worker.py")


def make_bars(minutes: range, value: float = 100.0) -> pd.DataFrame:
    opens_s = T0 + 60 * np.asarray(minutes, np.int64)
    price = value + np.asarray(minutes) / 8
    return bars_from_columns(opens_s, price, price + 0.5, price - 0.25, price, np.asarray(minutes) * 3.0)


def window_of(first: int, after: int) -> Window:
    return Window.from_epoch(T0 + 60 * first, T0 + 60 * after)


def write(store: Store, minutes: range) -> Written:
    window = window_of(minutes.start, minutes.stop)
    return store.write(AAPL_1M, make_bars(minutes), answered=window, source="simulator", now=NOW)


def run_worker(*arguments: object) -> dict[str, Any]:
    """What `crash_worker.py` reports."""
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


# ---------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["middle", "end"])
def test_writers_killed_at_random_instants_lose_nothing(tmp_path: Path, place: str) -> None:
    """Forty SIGKILLs. In the middle the CSV is byte for byte one of two each time; at the end it has every finished answer and
    readers find complete rows only. Every claim is true, and the next writer goes on."""
    report = run_worker("kills", place, tmp_path, 20240102, 40)
    assert report["failures"] == []
    assert report["kills"] == 40
    assert report["mid_write"] > 0, "no blow fell inside a write: the test proved nothing"
    assert report["answers"] > 0
    assert report["leftovers"] == []
    assert report["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["middle", "end"])
def test_writers_killed_at_every_call_lose_nothing(tmp_path: Path, place: str) -> None:
    """Before, in the middle of and after each call that reaches the disk: as above, and no finished answer loses its claim."""
    report = run_worker("calls", place, tmp_path)
    assert report["failures"] == []
    assert report["deaths"] >= 15
    assert report["old"] > 0
    assert report["new"] > 0
    assert report["problems"] == []


@pytest.mark.slow
def test_two_processes_writing_one_series_lose_nothing(tmp_path: Path) -> None:
    """Sixty overlapping answers from two processes at once: all bars, all claims, no problem."""
    report = run_worker("together", tmp_path)
    assert report == {
        "codes": [0, 0],
        "whole": True,
        "answered": ["2024-01-02T14:30:00Z..2024-01-03T00:32:00Z"],
        "problems": [],
    }


# ---------------------------------------------------------------------------------------------------- refused


class RefusingDisk(Disk):
    """Fails at the n-th call with ``code``; with ``short`` it first does part of the work, as a full disk does."""

    def __init__(self, number: int, code: int, *, short: bool = False) -> None:
        self.number, self.code, self.short = number, code, short
        self.calls: list[str] = []

    def _count(self, name: str, part: Callable[[], object] | None = None) -> None:
        self.calls.append(name)
        if len(self.calls) == self.number:
            if self.short and part is not None:
                part()
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path, mode: int) -> int:
        self._count("create")
        return super().create(path, mode)

    def open(self, path: Path) -> int:
        self._count("open")
        return super().open(path)

    def truncate(self, fd: int, size: int) -> None:
        self._count("truncate")
        super().truncate(fd, size)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._count("write", lambda: Disk.write(self, fd, data[: len(data) // 2]))
        return super().write(fd, data)

    def copy(self, target: int, source: int, offset: int, count: int) -> int:
        self._count("copy", lambda: Disk.copy(self, target, source, offset, count // 2))
        return super().copy(target, source, offset, count)

    def sync(self, fd: int) -> None:
        self._count("sync")

    def replace(self, source: Path, target: Path) -> None:
        self._count("replace")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._count("remove")
        super().remove(path)

    def sync_directory(self, path: Path) -> None:
        self._count("sync_directory")


def visible_files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("short", [False, True])
def test_a_disk_that_refuses_any_call_leaves_whole_files(tmp_path: Path, short: bool) -> None:
    """ENOSPC at the first, second, … call: a StoreError, the old CSV or the new one, true claims; then it works again."""
    quick = RefusingDisk(0, errno.ENOSPC)
    write(Store(tmp_path / "new", disk=quick), range(10))
    write(Store(tmp_path / "new", disk=quick), range(20, 30))
    quick.calls.clear()
    write(Store(tmp_path / "new", disk=quick), range(10, 20))
    new = (tmp_path / "new" / "AAPL_1m.csv").read_bytes()
    outcomes = []
    for number in range(1, len(quick.calls) + 1):
        directory = tmp_path / str(number)
        store = Store(directory, disk=RefusingDisk(0, 0))
        write(store, range(10))
        write(store, range(20, 30))
        before = visible_files(directory)
        with pytest.raises(StoreError, match="the disk is full") as caught:
            write(Store(directory, disk=RefusingDisk(number, errno.ENOSPC, short=short)), range(10, 20))
        assert "Free some space" in caught.value.advice
        after = visible_files(directory)
        assert after["AAPL_1m.csv"] in (before["AAPL_1m.csv"], new)
        outcomes.append(after["AAPL_1m.csv"] == new)
        for window in Store(directory).read_sidecar(AAPL_1M).answered_windows:
            assert len(store.held_opens(AAPL_1M, window)) == (window.end_s - window.start_s) // 60
        write(store, range(10, 20))
        assert visible_files(directory).keys() == before.keys()
        assert (directory / "AAPL_1m.csv").read_bytes() == new
        assert store.verify(AAPL_1M) == []
    assert outcomes == sorted(outcomes), "once the new CSV is there it stays"
    assert set(outcomes) == {False, True}
    assert {"create", "write", "copy", "sync", "replace", "sync_directory"} <= set(quick.calls)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_refused_first_write_leaves_nothing(tmp_path: Path, number: int) -> None:
    """No CSV, no sidecar, no temporary file when the very first write of a series fails before the rename."""
    with pytest.raises(StoreError):
        write(Store(tmp_path, disk=RefusingDisk(number, errno.ENOSPC, short=True)), range(10))
    assert visible_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("code", "observed", "advice"),
    [
        (errno.ENOSPC, "the disk is full", "Free some space"),
        (errno.EDQUOT, "quota", "Free some space"),
        (errno.EROFS, "read-only", "KTRDR_DATA_DIR"),
        (errno.EACCES, "permission denied", "writable"),
        (errno.EPERM, "does not permit", "immutable"),
        (errno.ENAMETOOLONG, "name is too long", "shorter alias"),
        (errno.EFBIG, "larger than the system allows", "ulimit"),
        (errno.EIO, "input/output error", "disk"),
        (errno.ENXIO, "No such device", "run it again"),
    ],
)
def test_each_refusal_is_one_clear_line(tmp_path: Path, code: int, observed: str, advice: str) -> None:
    """The message names the file, the reason and what to do."""
    store = Store(tmp_path, disk=RefusingDisk(2, code))
    with pytest.raises(StoreError, match=observed) as caught:
        write(store, range(10))
    assert "AAPL_1m.csv" in str(caught.value)
    assert advice in caught.value.advice
    assert "\n" not in str(caught.value)
    assert caught.value.doing.startswith("writing bars of AAPL 1m")


def test_a_data_directory_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    """A file in place of the directory, and a path too long, refused by the real system."""
    (tmp_path / "file").write_text("here")
    with pytest.raises(StoreError, match=r"not a directory|File exists"):
        write(Store(tmp_path / "file" / "data"), range(3))
    with pytest.raises(StoreError, match="name is too long"):
        write(Store(tmp_path / ("x" * 300)), range(3))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.slow
def test_a_real_limit_in_the_middle_of_a_copy_leaves_the_old_file(tmp_path: Path) -> None:
    """The system itself stops the copy half-way (file size limit): old bytes, no leftovers, and then it works again."""
    store = Store(tmp_path)
    write(store, range(20_000))
    write(store, range(20_100, 20_110))
    before = visible_files(tmp_path)
    with (
        file_size_limit(len(before["AAPL_1m.csv"]) - 10_000),
        pytest.raises(StoreError, match="larger than the system allows"),
    ):
        write(store, range(20_010, 20_020))
    assert visible_files(tmp_path) == before
    assert write(store, range(20_010, 20_020)).rows_added == 10


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    """Half a temporary file of a killed writer is gone after the next write."""
    store = Store(tmp_path)
    write(store, range(10))
    for name in (".AAPL_1m.csv.new", ".AAPL_1m.meta.json.new"):
        (tmp_path / name).write_bytes(b"half a f")
    write(store, range(10, 20))
    assert sorted(visible_files(tmp_path)) == ["AAPL_1m.csv", "AAPL_1m.meta.json"]


class MeddlingDisk(Disk):
    """Another program changes the CSV while it is being copied (a splice) or synced (an append), ``times`` times."""

    def __init__(self, path: Path, times: int, edit: Callable[[list[bytes]], list[bytes]]) -> None:
        self.path, self.times, self.edit = path, times, edit

    def _meddle(self) -> None:
        if self.times:
            self.times -= 1
            self.path.write_bytes(b"".join(self.edit(self.path.read_bytes().splitlines(keepends=True))))
            os.utime(self.path, ns=(self.times, self.times))

    def copy(self, target: int, source: int, offset: int, count: int) -> int:
        copied = super().copy(target, source, offset, count)
        self._meddle()
        return copied

    def sync(self, fd: int) -> None:
        if os.fstat(fd).st_ino == self.path.stat().st_ino:
            self._meddle()


def edited_store(
    folder: Path, place: str, times: int, edit: Callable[[list[bytes]], list[bytes]]
) -> tuple[Store, MeddlingDisk]:
    """Ten bars, and ten later ones if new bars belong in the ``middle``; an editor is at work during the next write."""
    write(Store(folder), range(10))
    if place == "middle":
        write(Store(folder), range(40, 50))
    editor = MeddlingDisk(folder / "AAPL_1m.csv", times, edit)
    return Store(folder, disk=editor), editor


@pytest.mark.parametrize("place", ["middle", "end"])
def test_an_editor_at_work_during_a_write_is_not_overwritten(tmp_path: Path, place: str) -> None:
    """A change between reading and the end of the write starts the write anew from the changed file."""
    store, _ = edited_store(tmp_path, place, 1, lambda lines: [lines[0], *lines[2:]])
    written = write(store, range(20, 30))
    assert written.prepared.changed_partitions == ("2024-01-02",)
    assert len(store.held_opens(AAPL_1M)) == (29 if place == "middle" else 19)
    assert store.read_sidecar(AAPL_1M).answered_windows == ()  # what the load knew of the edited partition is in doubt
    assert store.verify(AAPL_1M) == []


@pytest.mark.parametrize("place", ["middle", "end"])
def test_a_correction_of_the_same_length_during_a_write_is_not_overwritten(tmp_path: Path, place: str) -> None:
    """The new rows are on disk and beside them is another file by then: the write starts anew, and the correction stays."""
    corrected = []

    def correct(lines: list[bytes]) -> list[bytes]:
        corrected.append(lines[10].replace(b",101.125,", b",101.375,"))
        assert corrected[0] != lines[10]
        return [*lines[:10], corrected[0], *lines[11:]]

    store, _ = edited_store(tmp_path, place, 1, correct)
    write(store, range(20, 30))
    assert len(corrected) == 1
    assert corrected[0] in (tmp_path / "AAPL_1m.csv").read_bytes()
    assert len(Store(tmp_path).held_opens(AAPL_1M)) == (30 if place == "middle" else 20)
    assert store.verify(AAPL_1M) == []


def test_a_claim_about_bars_that_an_editor_removed_meanwhile_is_not_recorded(tmp_path: Path) -> None:
    """Bars are written, an editor saves the file without them, and only then their window is claimed as answered: they are
    missing, so the sidecar must not claim it."""
    store = Store(tmp_path)
    write(store, range(10))
    before = store.csv_path(AAPL_1M).read_bytes()
    store.write(AAPL_1M, make_bars(range(10, 20)), answered=None, source="simulator", now=NOW)
    store.csv_path(AAPL_1M).write_bytes(before)
    store.write(AAPL_1M, empty_bars(), answered=window_of(10, 20), source="simulator", now=NOW)
    assert len(store.held_opens(AAPL_1M)) == 10
    assert store.read_sidecar(AAPL_1M).answered_windows == ()


@pytest.mark.parametrize("minutes", [range(0), range(2000, 2010)])
def test_an_edit_right_before_a_write_is_not_taken_for_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: range
) -> None:
    """The editor saves after the file was looked at and before it is opened for the write: the write looks again."""
    store = Store(tmp_path)
    write(store, range(10))
    path = store.csv_path(AAPL_1M)
    saves = [path.read_bytes().splitlines(keepends=True)[:-1]]

    def settle_and_save(*arguments: Any, **more: Any) -> Any:
        settled = settle(*arguments, **more)
        if saves:
            path.write_bytes(b"".join(saves.pop()))
        return settled

    monkeypatch.setattr(series_store, "settle", settle_and_save)
    bars = make_bars(minutes) if minutes else empty_bars()
    written = store.write(AAPL_1M, bars, answered=None, source="simulator", now=NOW)
    assert written.prepared.changed_partitions == ("2024-01-02",)
    assert store.read_sidecar(AAPL_1M).answered_windows == ()
    assert store.verify(AAPL_1M) == []


@pytest.mark.parametrize("place", ["middle", "end"])
def test_an_editor_that_never_stops_is_a_clear_error(tmp_path: Path, place: str) -> None:
    """After three tries the write gives up, with the editor's file as it is."""
    store, editor = edited_store(tmp_path, place, 99, lambda lines: lines[:-1])
    with pytest.raises(StoreError, match="changed by another program"):
        write(store, range(20, 30))
    lines = (tmp_path / "AAPL_1m.csv").read_text().splitlines()
    assert len(lines) == (21 - (99 - editor.times) if place == "middle" else 20)
    assert not (tmp_path / ".AAPL_1m.csv.new").exists()


@pytest.mark.slow
def test_a_disk_without_sendfile_and_hard_links_is_fine(tmp_path: Path) -> None:
    """Where the kernel cannot copy, bytes go through memory; where there are no links, the backup is a copy."""

    class PlainDisk(Disk):
        def copy(self, target: int, source: int, offset: int, count: int) -> int:
            return self.copy_through_memory(target, source, offset, count)

        def link(self, source: Path, name: Path) -> None:
            raise OSError(errno.ENOTSUP, "no links here")

    store = Store(tmp_path, disk=PlainDisk())
    write(store, range(30_000))
    write(store, range(40_000, 40_010))
    write(store, range(35_000, 35_010))
    assert len(store.held_opens(AAPL_1M)) == 30_020
    path = tmp_path / "AAPL_1m.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    edited = path.read_bytes()
    adopted = store.adopt(AAPL_1M, now=NOW)
    assert adopted.backup is not None
    assert adopted.backup.read_bytes() == edited
    assert adopted.backup.stat().st_ino != path.stat().st_ino
