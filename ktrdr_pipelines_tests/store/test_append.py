"""Bars after the last one: appended in place, as safe as a splice, and in proportion to what is new."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from ktrdr_pipelines.bars.schema import empty_bars
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import DataError, StoreError
from ktrdr_pipelines.store import sidecar_cache
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.csv_format import render_rows
from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.store.test_store import (
    _WRITES,
    AAPL_1M,
    NOW,
    T0,
    QuickDisk,
    Writes,
    answers_from,
    edit_lines,
    make_absence,
    make_bars,
    opens_of,
    window_of,
    write,
)


class CountingDisk(QuickDisk):
    """Counts the bytes written to files, and the syncs."""

    def __init__(self) -> None:
        self.written = self.copied = self.syncs = 0

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.written += len(data)
        return super().write(fd, data)

    def copy(self, target: int, source: int, offset: int, count: int) -> int:
        self.copied += count
        return super().copy(target, source, offset, count)

    def sync(self, fd: int) -> None:
        self.syncs += 1


class NoAppends(QuickDisk):
    """A file system that refuses every change in place: all writes are splices, all sidecars are written as a whole."""

    def open(self, path: Path) -> int:
        if not path.exists():
            return super().open(path)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.fixture
def with_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars of any size have journals."""
    monkeypatch.setattr(sidecar_cache, "SMALL_BYTES", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Ten answered bars."""
    store = Store(tmp_path / "data", disk=QuickDisk())
    write(store, make_bars(range(10)), window_of(0, 10))
    return store


def grow(store: Store, first: int = 10, after: int = 20) -> None:
    write(store, make_bars(range(first, after)), window_of(first, after))


# ---------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("first", [3000, 2990])
def test_a_tail_costs_what_it_brings(tmp_path: Path, first: int) -> None:
    """Twenty new bars of a long file, with and without held ones before them: no byte of the old rows is written again."""
    write(Store(tmp_path, disk=QuickDisk()), make_bars(range(3000)), window_of(0, 3000))
    path = tmp_path / "AAPL_1m.csv"
    size, inode = path.stat().st_size, path.stat().st_ino
    disk = CountingDisk()
    written = write(Store(tmp_path, disk=disk), make_bars(range(first, 3020)), window_of(first, 3020))
    assert written.rows_added == 20
    assert path.stat().st_ino == inode
    assert disk.copied == 0
    sidecar = (tmp_path / "AAPL_1m.meta.json").stat().st_size
    assert disk.written == path.stat().st_size - size + sidecar
    assert disk.syncs == 2


@pytest.mark.slow
def test_a_long_load_writes_its_file_about_once(tmp_path: Path) -> None:
    """Four hundred days, one by one: bars, journal and sidecar together are less than one and a half times the file."""
    disk = CountingDisk()
    store = Store(tmp_path, disk=disk)
    for day in range(400):
        first = 1440 * day
        write(store, make_bars(range(first, first + 60)), window_of(first, first + 60))
    store.merge_journal(AAPL_1M)
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert disk.copied == 0
    assert disk.written < 1.5 * files
    assert len(store.read_sidecar(AAPL_1M).partitions) > 250
    assert store.verify(AAPL_1M) == []


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(writes=_WRITES)
def test_appends_and_splices_make_the_same_files(writes: Writes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any sequence of answers: the same CSV, the same claims, the same counts as where every write is a splice."""
    folder = tmp_path_factory.mktemp("same")
    stores = [Store(folder / name, disk=disk) for name, disk in (("appends", QuickDisk()), ("splices", NoAppends()))]
    small, sidecar_cache.SMALL_BYTES = sidecar_cache.SMALL_BYTES, 0
    try:
        for bars in answers_from(writes):
            opens_s = opens_of(bars)
            window = Window.from_epoch(int(opens_s[0]), int(opens_s[-1]) + 60)
            one, other = (write(each, bars, window) for each in stores)
            assert (one.rows_added, one.rows_revised) == (other.rows_added, other.rows_revised)
            assert without_times(one.sidecar.model_dump()) == without_times(other.sidecar.model_dump())
        contents = []
        for each in stores:
            fresh = Store(each.data_dir)
            known = fresh.read_sidecar(AAPL_1M)
            each.merge_journal(AAPL_1M)
            assert json.loads(each.sidecar_path(AAPL_1M).read_text()) == known.model_dump(mode="json")
            contents.append((each.csv_path(AAPL_1M).read_bytes(), without_times(known.model_dump())))
            assert fresh.verify(AAPL_1M) == []
    finally:
        sidecar_cache.SMALL_BYTES = small
    assert contents[0] == contents[1]


def without_times(sidecar: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in sidecar.items() if key != "file"}


# ---------------------------------------------------------------------------------------------------- where it is not done


def test_a_second_name_of_the_file_keeps_what_it_has(store: Store, tmp_path: Path) -> None:
    """A backup made of hard links must not grow."""
    backup = tmp_path / "backup.csv"
    backup.hardlink_to(store.csv_path(AAPL_1M))
    before = backup.read_bytes()
    grow(store)
    assert backup.read_bytes() == before
    assert len(store.held_opens(AAPL_1M)) == 20
    assert store.csv_path(AAPL_1M).stat().st_nlink == 1


def test_a_file_that_cannot_be_changed_in_place_is_replaced(store: Store) -> None:
    """Read-only CSV and journal in a folder that takes new files: the bars arrive, the permissions stay."""
    store.csv_path(AAPL_1M).chmod(0o444)
    splicing = Store(store.data_dir, disk=NoAppends())  # root may write to read-only files
    grow(splicing)
    assert len(store.held_opens(AAPL_1M)) == 20
    assert store.csv_path(AAPL_1M).stat().st_mode & 0o777 == 0o444
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 20),)


@pytest.mark.parametrize(
    "change", [lambda d: d.replace(b"\n", b"\r\n"), lambda d: d[:-1], lambda d: d.replace(b",", b";")]
)
def test_nothing_is_appended_to_a_file_of_another_program(store: Store, change: Callable[[bytes], bytes]) -> None:
    """Line ends, a missing last line end, another separator: adopted or refused first, as at any other write."""
    path = store.csv_path(AAPL_1M)
    edited = change(path.read_bytes())
    path.write_bytes(edited)
    try:
        grow(store)
    except DataError:
        assert path.read_bytes() == edited
        return
    (backup,) = path.parent.glob("AAPL_1m.csv.bak-*")
    assert backup.read_bytes() == edited
    assert len(store.held_opens(AAPL_1M)) == (20 if b"\r" in edited else 19)
    assert store.verify(AAPL_1M) == []


def test_a_bar_between_held_ones_is_spliced(store: Store) -> None:
    """New bars before the last held one, or a revised one: the file is replaced."""
    grow(store, 12, 20)
    inode = store.csv_path(AAPL_1M).stat().st_ino
    write(store, make_bars(range(10, 25)))
    assert store.csv_path(AAPL_1M).stat().st_ino != inode
    assert store.held_opens(AAPL_1M).tolist() == [T0 + 60 * m for m in range(25)]
    inode = store.csv_path(AAPL_1M).stat().st_ino
    assert write(store, make_bars(range(24, 26), value=50.0)).rows_revised == 1
    assert store.csv_path(AAPL_1M).stat().st_ino != inode
    assert store.verify(AAPL_1M) == []


# ---------------------------------------------------------------------------------------------------- unfinished lines


def tear(store: Store, size: int = 25) -> bytes:
    """What a killed append leaves: part of a row. Returns the rows."""
    path = store.csv_path(AAPL_1M)
    rows = path.read_bytes()
    with path.open("ab") as file:
        file.write(b"2024-01-02T14:40:00Z,101.25,101.75,101.0,101.25,30\n"[:size])
    return rows


@pytest.mark.parametrize("size", [1, 20, 25, 50])
def test_readers_ignore_an_unfinished_line(store: Store, size: int) -> None:
    """Without the lock and without changing anything: bars, claims, extent, snapshot, verification."""
    bars = store.read_bars(AAPL_1M)
    tear(store, size)
    torn = store.csv_path(AAPL_1M).read_bytes()
    sidecar = store.sidecar_path(AAPL_1M).read_bytes()
    reader = Store(store.data_dir, disk=NoAppends(), lock_timeout_s=0)
    assert reader.read_bars(AAPL_1M).equals(bars)
    assert reader.read_bars(AAPL_1M, window_of(8, 20)).equals(bars.iloc[8:].reset_index(drop=True))
    assert len(reader.held_opens(AAPL_1M)) == 10
    extent = reader.extent(AAPL_1M)
    assert extent is not None
    assert extent.last_open_s == T0 + 540
    assert reader.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    assert reader.verify(AAPL_1M) == []
    with peek(reader, AAPL_1M, now=NOW) as (view, _):
        assert len(view.read_bars(AAPL_1M)) == 10
    assert store.csv_path(AAPL_1M).read_bytes() == torn
    assert store.sidecar_path(AAPL_1M).read_bytes() == sidecar


def test_the_next_load_removes_an_unfinished_line_and_reports_it(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows and claims stay as they were; no copy is kept of a part of a row, whose text is in the notice."""
    rows = tear(store)
    with caplog.at_level(logging.WARNING):
        prepared = store.prepare(AAPL_1M, now=NOW)
    assert store.csv_path(AAPL_1M).read_bytes() == rows
    assert (prepared.adopted, prepared.changed_partitions) == (None, ())
    assert "2024-01-02T14:40:00Z,101." in prepared.notices[0]
    assert "2024-01-02T14:40:00Z,101." in caplog.text
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    assert store.prepare(AAPL_1M, now=NOW) == Prepared()


@pytest.mark.parametrize("header", [b"timestamp,open,high,low,close,volume\n", b"Date,Open,High,Low,Close,Volume\n"])
def test_a_longer_file_in_its_place_is_adopted_as_it_is(store: Store, header: bytes) -> None:
    """Another program's file, without a line end after its last row: nothing is cut from it, the copy has all of it."""
    path = store.csv_path(AAPL_1M)
    theirs = header + b"".join(render_rows(make_bars(range(1440, 1470), value=7.0)).splitlines(keepends=True))[:-1]
    assert len(theirs) > path.stat().st_size
    path.write_bytes(theirs)
    prepared = store.prepare(AAPL_1M, now=NOW)
    assert prepared.adopted is not None
    assert prepared.adopted.backup is not None
    assert prepared.adopted.backup.read_bytes() == theirs
    assert store.read_sidecar(AAPL_1M).answered == ()
    assert store.verify(AAPL_1M) == []


def test_rows_whose_claim_was_lost_withdraw_no_other_claim(store: Store) -> None:
    """Killed between CSV and sidecar: the new rows are held, what was claimed of the same day still counts."""
    before = store.sidecar_path(AAPL_1M).read_bytes()
    grow(store)
    store.sidecar_path(AAPL_1M).write_bytes(before)
    late = Store(store.data_dir)
    assert late.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    assert late.prepare(AAPL_1M, now=NOW) == Prepared()
    assert len(late.held_opens(AAPL_1M)) == 20
    assert late.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    assert late.verify(AAPL_1M) == []


def test_an_edit_beside_such_rows_withdraws_as_ever(store: Store) -> None:
    """A row of before is gone as well."""
    before = store.sidecar_path(AAPL_1M).read_bytes()
    grow(store)
    store.sidecar_path(AAPL_1M).write_bytes(before)
    edit_lines(store, lambda lines: [lines[0], *lines[2:]])
    assert store.read_sidecar(AAPL_1M).answered_windows == ()
    assert store.prepare(AAPL_1M, now=NOW).changed_partitions == ("2024-01-02",)


class WatchedDisk(QuickDisk):
    """A reader looks at the files after each byte or so that a write brings."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.look = look

    def write(self, fd: int, data: bytes | memoryview) -> int:
        written = super().write(fd, data[:17])
        self.look()
        return written

    def sync(self, fd: int) -> None:
        self.look()


@pytest.mark.usefixtures("with_journals")
def test_a_reader_sees_complete_rows_and_true_claims_at_every_moment_of_an_append(store: Store) -> None:
    """Bars only ever increase, each is right, and every claim is about bars that are there."""
    store.note_unfinished(AAPL_1M, None, None, now=NOW)
    seen: list[int] = []

    def look() -> None:
        reader = Store(store.data_dir, lock_timeout_s=0)
        claims = reader.read_sidecar(AAPL_1M).answered_windows
        bars = reader.read_bars(AAPL_1M)
        assert bars.equals(make_bars(range(len(bars))))
        assert all(claim.end_s <= T0 + 60 * len(bars) for claim in claims)
        assert claims
        seen.append(len(bars))

    grow(Store(store.data_dir, disk=WatchedDisk(look)))
    assert seen == sorted(seen)
    assert set(seen) == set(range(10, 21))


# ---------------------------------------------------------------------------------------------------- refused


class FullDisk(QuickDisk):
    """Takes ``room`` bytes, then no more; ``stuck``: it cannot be cut either."""

    def __init__(self, room: int, *, stuck: bool = False) -> None:
        self.room, self.stuck = room, stuck

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(fd, data[: self.room])
        self.room -= written
        return written

    def truncate(self, fd: int, size: int) -> None:
        if self.stuck:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(fd, size)


@pytest.mark.parametrize("room", [0, 10, 300])
def test_a_full_disk_during_an_append_leaves_the_file_as_it_was(store: Store, room: int) -> None:
    """One clear error; the file has its bytes and its time of change, so that nothing counts as edited."""
    path = store.csv_path(AAPL_1M)
    before, state = path.read_bytes(), state_of(path)
    with pytest.raises(StoreError, match="the disk is full") as caught:
        grow(Store(store.data_dir, disk=FullDisk(room)))
    assert "Free some space" in caught.value.advice
    assert (path.read_bytes(), state_of(path)) == (before, state)
    assert store.prepare(AAPL_1M, now=NOW) == Prepared()
    grow(store)
    assert len(store.held_opens(AAPL_1M)) == 20


def test_a_disk_that_can_neither_write_nor_cut_loses_nothing(store: Store) -> None:
    """The unfinished line stays until the next write, unseen."""
    with pytest.raises(StoreError, match="the disk is full"):
        grow(Store(store.data_dir, disk=FullDisk(120, stuck=True)))
    assert len(store.csv_path(AAPL_1M).read_bytes().splitlines()) == 14
    assert len(store.held_opens(AAPL_1M)) == 12
    grow(store)
    assert len(store.held_opens(AAPL_1M)) == 20
    assert store.verify(AAPL_1M) == []
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 20),)


@pytest.mark.usefixtures("with_journals")
def test_a_disk_that_fills_up_in_the_journal_keeps_the_bars(store: Store) -> None:
    """Only the claim is lost; the next line of the journal goes where the damaged one began."""
    room = len(render_rows(make_bars(range(10, 20))))
    with pytest.raises(StoreError, match="the disk is full"):
        grow(Store(store.data_dir, disk=FullDisk(room + 20)))
    assert len(store.held_opens(AAPL_1M)) == 20
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    grow(store, 20, 30)
    assert Store(store.data_dir).read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10), window_of(20, 30))


# ---------------------------------------------------------------------------------------------------- journals


@pytest.fixture
def journaled(with_journals: None, store: Store) -> Store:
    """The ten bars of before, and ten more that are in the journal only."""
    grow(store)
    assert store.paths(AAPL_1M)[1].exists()
    return store


def test_claims_in_the_journal_count_for_every_reader(journaled: Store) -> None:
    """And the sidecar as it stands claims less, never more."""
    assert Store(journaled.data_dir).read_sidecar(AAPL_1M).answered_windows == (window_of(0, 20),)
    alone = json.loads(journaled.sidecar_path(AAPL_1M).read_text())
    assert [span["end"] for span in alone["answered"]] == ["2024-01-02T14:40:00Z"]
    with peek(journaled, AAPL_1M, now=NOW) as (view, found):
        assert (view, found) == (journaled, Prepared())


def test_the_state_of_the_sidecar_shows_that_its_journal_grew(journaled: Store) -> None:
    """Sensors look no further than that."""
    os.utime(journaled.sidecar_path(AAPL_1M), ns=(1, 1))
    write(journaled, empty_bars(), window_of(30, 40))
    state = state_of(journaled.sidecar_path(AAPL_1M))
    assert state is not None
    assert state.mtime_ns > 1


@pytest.mark.parametrize("end", [Store.merge_journal, lambda s, of: s.note_unfinished(of, None, None, now=NOW)])
def test_a_load_ends_without_a_journal(journaled: Store, end: Callable[[Store, object], object]) -> None:
    """Merged, the sidecar has everything; to merge again does nothing."""
    known = journaled.read_sidecar(AAPL_1M)
    end(journaled, AAPL_1M)
    assert not journaled.paths(AAPL_1M)[1].exists()
    merged = journaled.read_sidecar(AAPL_1M)
    assert (merged.answered, merged.partitions, merged.file) == (known.answered, known.partitions, known.file)
    before = state_of(journaled.sidecar_path(AAPL_1M))
    journaled.merge_journal(AAPL_1M)
    assert state_of(journaled.sidecar_path(AAPL_1M)) == before


def test_a_lost_journal_costs_requests_never_bars(journaled: Store) -> None:
    """As a lost sidecar does."""
    journaled.paths(AAPL_1M)[1].unlink()
    late = Store(journaled.data_dir)
    assert late.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    late.prepare(AAPL_1M, now=NOW)
    assert len(late.held_opens(AAPL_1M)) == 20
    assert late.verify(AAPL_1M) == []


def test_an_unreadable_sidecar_takes_its_journal_with_it(journaled: Store) -> None:
    """A new sidecar is built from the CSV."""
    journaled.sidecar_path(AAPL_1M).write_text("{")
    late = Store(journaled.data_dir)
    assert late.prepare(AAPL_1M, now=NOW).corrupt_sidecar is not None
    assert not late.paths(AAPL_1M)[1].exists()
    assert late.read_sidecar(AAPL_1M).answered == ()
    assert len(late.held_opens(AAPL_1M)) == 20


def test_a_withdrawn_claim_stays_withdrawn(journaled: Store) -> None:
    """An edit after claims were journaled, absent bars among them: what goes is gone in the journal too."""
    journaled.write(
        AAPL_1M, empty_bars(), answered=None, source="simulator", now=NOW, proven_empty=[make_absence(30, 33)]
    )
    edit_lines(journaled, lambda lines: lines[:-1])
    assert journaled.prepare(AAPL_1M, now=NOW).changed_partitions == ("2024-01-02",)
    late = Store(journaled.data_dir).read_sidecar(AAPL_1M)
    assert (late.answered, [r.window for r in late.proven_empty]) == ((), [window_of(30, 33)])
    write(journaled, make_bars([31]))
    assert Store(journaled.data_dir).read_sidecar(AAPL_1M).proven_empty == ()


def test_the_file_is_known_after_each_write(journaled: Store) -> None:
    """A load sees that nothing but itself changed the file; a growth by another process is not taken for its own."""
    written = write(journaled, make_bars(range(20, 30)), window_of(20, 30))
    assert journaled.is_unchanged(written)
    assert journaled.is_as_left(AAPL_1M)
    grow(Store(journaled.data_dir), 30, 40)
    assert not journaled.is_unchanged(written)
    assert journaled.is_as_left(AAPL_1M)
    grown = replace(written, sidecar=journaled.read_sidecar(AAPL_1M))
    assert journaled.is_unchanged(grown)
    assert np.array_equal(journaled.held_opens(AAPL_1M), T0 + 60 * np.arange(40))
