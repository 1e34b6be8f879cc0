"""The store's promises: exact, never shrinking, idempotent, in any order, one kind of bars in one file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.bars.schema import bars_from_columns, empty_bars, opens_of, rules_for
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import DataError, StoreError
from ktrdr_pipelines.store.atomic import Disk, state_of
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.partition_marks import mark_partitions
from ktrdr_pipelines.store.results import Extent, Written
from ktrdr_pipelines.store.sidecar import Evidence, HistoryStart, PartitionMark, ProvenEmpty
from ktrdr_pipelines.store.splice import splice_bars
from ktrdr_pipelines.store.store import Store

T0 = 1_704_205_800  # 2024-01-02T14:30:00Z, a Tuesday
NOW = datetime(2025, 1, 1, tzinfo=UTC)
AAPL_1M = Series(stock("AAPL"), parse_timeframe("1m"))
AAPL_1H = Series(stock("AAPL"), parse_timeframe("1h"))
EURUSD_1H = Series(forex("EURUSD"), parse_timeframe("1h"))


class QuickDisk(Disk):
    """The real disk without waiting for it: for tests of what is written, not of crashes."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


def make_bars(minutes: Sequence[int], value: float = 100.0, *, start_s: int = T0) -> pd.DataFrame:
    opens_s = start_s + 60 * np.asarray(minutes, np.int64)
    price = value + np.asarray(minutes) / 8
    return bars_from_columns(opens_s, price, price + 0.5, price - 0.25, price, np.asarray(minutes) * 3.0)


def window_of(first: int, after: int) -> Window:
    return Window.from_epoch(T0 + 60 * first, T0 + 60 * after)


def write(store: Store, bars: pd.DataFrame, answered: Window | None = None, series: Series = AAPL_1M) -> Written:
    return store.write(series, bars, answered=answered, source="simulator", now=NOW)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", disk=QuickDisk())


# ---------------------------------------------------------------------------------------------------- reading


def test_what_is_written_is_read_back_exactly(store: Store) -> None:
    """Bars, opens, extent and sidecar agree, to the last bit."""
    bars = make_bars(range(5), value=0.1 + 0.2)
    written = write(store, bars, window_of(0, 5))
    assert (written.rows_added, written.rows_revised) == (5, 0)
    assert written.path.name == "AAPL_1m.csv"
    assert list(written.sidecar.partitions) == ["2024-01-02"]
    pd.testing.assert_frame_equal(store.read_bars(AAPL_1M), bars, check_exact=True)
    assert store.held_opens(AAPL_1M).tolist() == opens_of(bars).tolist()
    assert store.extent(AAPL_1M) == Extent(T0, T0 + 240)
    sidecar = store.read_sidecar(AAPL_1M)
    assert sidecar.answered_windows == (window_of(0, 5),)
    assert sidecar.rows == 5
    assert sidecar.source == "simulator"


def test_a_fresh_store_holds_nothing_and_creates_nothing(store: Store) -> None:
    """Reading makes no file and no directory."""
    pd.testing.assert_frame_equal(store.read_bars(AAPL_1M), empty_bars())
    assert store.held_opens(AAPL_1M).tolist() == []
    assert store.extent(AAPL_1M) is None
    assert store.read_sidecar(AAPL_1M).answered == ()
    assert store.verify(AAPL_1M) == []
    assert not store.data_dir.exists()


@pytest.mark.parametrize(("first", "after"), [(0, 10), (3, 7), (3, 4), (3, 3), (-5, 2), (8, 50), (20, 30), (-9, -3)])
def test_a_window_is_half_open(store: Store, first: int, after: int) -> None:
    """The bar at the start is in, the one at the end is not, wherever the window lies."""
    write(store, make_bars(range(10)))
    expected = [T0 + 60 * m for m in range(10) if first <= m < after]
    assert store.held_opens(AAPL_1M, window_of(first, after)).tolist() == expected
    assert opens_of(store.read_bars(AAPL_1M, window_of(first, after))).tolist() == expected


# ---------------------------------------------------------------------------------------------------- writing


def test_a_load_never_shrinks_a_file(store: Store) -> None:
    """Held bars inside the answered window that are not in the new answer stay."""
    write(store, make_bars(range(10)))
    written = write(store, make_bars([4]), window_of(0, 10))
    assert written.rows_added == 0
    assert len(store.held_opens(AAPL_1M)) == 10


def test_the_newer_value_wins_and_the_older_is_reported(store: Store) -> None:
    """A revised bar replaces the held one; both are in the result."""
    write(store, make_bars(range(5), value=100.0))
    written = write(store, make_bars([1, 2], value=50.0))
    assert (written.rows_added, written.rows_revised) == (0, 2)
    assert written.revised_from["open"].tolist() == [100.125, 100.25]
    assert written.revised_to["open"].tolist() == [50.125, 50.25]
    assert store.read_bars(AAPL_1M)["open"].tolist() == [100.0, 50.125, 50.25, 100.375, 100.5]


def test_writing_the_same_again_does_not_touch_the_file(store: Store) -> None:
    """Idempotent to the byte, and to the inode."""
    write(store, make_bars(range(5)), window_of(0, 5))
    before = store.csv_path(AAPL_1M).stat()
    sidecar = store.sidecar_path(AAPL_1M).read_bytes()
    written = write(store, make_bars(range(5)), window_of(0, 5))
    after = store.csv_path(AAPL_1M).stat()
    assert (written.rows_added, written.rows_revised) == (0, 0)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert store.sidecar_path(AAPL_1M).read_bytes() == sidecar


def test_an_empty_answer_is_remembered_without_a_csv(store: Store) -> None:
    """An answer without bars is recorded in the sidecar; it makes no CSV."""
    write(store, empty_bars(), window_of(0, 60))
    assert not store.csv_path(AAPL_1M).exists()
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 60),)
    assert store.extent(AAPL_1M) is None


def test_a_bad_bar_touches_nothing(store: Store) -> None:
    """Validation comes first: neither file is changed, the error shows the rows."""
    write(store, make_bars(range(5)), window_of(0, 5))
    before = (store.csv_path(AAPL_1M).read_bytes(), store.sidecar_path(AAPL_1M).read_bytes())
    bad = make_bars(range(5, 9))
    bad.loc[2, "high"] = 1.0
    with pytest.raises(DataError, match="high is below"):
        write(store, bad, window_of(5, 9))
    assert (store.csv_path(AAPL_1M).read_bytes(), store.sidecar_path(AAPL_1M).read_bytes()) == before


def test_permissions_and_links_survive_a_write(store: Store, tmp_path: Path) -> None:
    """A group-readable file stays one, and a link to another disk stays a link."""
    write(store, make_bars(range(2)))
    path = store.data_dir / "AAPL_1m.csv"
    elsewhere = tmp_path / "elsewhere.csv"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    elsewhere.chmod(0o640)
    write(store, make_bars([5]))
    assert path.is_symlink()
    assert elsewhere.stat().st_mode & 0o777 == 0o640
    assert len(store.held_opens(AAPL_1M)) == 3


Writes = list[tuple[int, list[int], int]]
"""Start minute, steps between bars, and a value: one answer of IB."""

_WRITES = st.lists(
    st.tuples(st.integers(0, 4000), st.lists(st.integers(1, 90), max_size=25), st.integers(1, 3)),
    min_size=1,
    max_size=14,
)


def answers_from(writes: Writes) -> list[pd.DataFrame]:
    return [make_bars((start + np.cumsum([0, *steps])).tolist(), float(value)) for start, steps, value in writes]


def as_dict(bars: pd.DataFrame) -> dict[int, tuple[float, ...]]:
    return dict(zip(opens_of(bars).tolist(), bars.iloc[:, 1:].itertuples(index=False, name=None), strict=True))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(writes=_WRITES)
def test_any_sequence_of_writes_equals_a_dictionary(writes: Writes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Overlapping answers in any order: the file is what a dictionary of bars would be, counts included."""
    store = Store(tmp_path_factory.mktemp("model"), disk=QuickDisk())
    model: dict[int, tuple[float, ...]] = {}
    for bars in answers_from(writes):
        new = as_dict(bars)
        written = write(store, bars)
        assert written.rows_added == len(new.keys() - model.keys())
        assert written.rows_revised == sum(model.get(k, v) != v for k, v in new.items())
        model |= new
    assert as_dict(store.read_bars(AAPL_1M)) == dict(sorted(model.items()))
    assert store.held_opens(AAPL_1M).tolist() == sorted(model)
    assert store.verify(AAPL_1M) == []
    assert store.read_sidecar(AAPL_1M).rows == len(model)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(writes=_WRITES)
def test_thousands_of_splices_equal_a_dictionary(writes: Writes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The splice alone, without schema and sidecar: bytes, counts and partition marks after any sequence."""
    path = tmp_path_factory.mktemp("splice") / "x.csv"
    model: dict[int, tuple[float, ...]] = {}
    marks: dict[str, PartitionMark] = {}
    for bars in answers_from(writes):
        spliced = splice_bars(QuickDisk(), path, bars, AAPL_1M.timeframe, rules_for(AAPL_1M), is_settled=lambda _: True)
        assert spliced.merged.added == len(as_dict(bars).keys() - model.keys())
        model |= as_dict(bars)
        marks |= spliced.marks
        assert spliced.state == state_of(path)
    data = path.read_bytes()
    expected = bars_from_columns(*zip(*((k, *v) for k, v in sorted(model.items())), strict=True))
    assert data == HEADER + render_rows(expected)
    with path.open("rb") as file:
        assert marks == mark_partitions(file.fileno(), AAPL_1M.timeframe, len(HEADER), len(data))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(writes=_WRITES, seed=st.randoms(use_true_random=False))
def test_the_order_of_agreeing_writes_does_not_matter(
    writes: Writes, seed: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Answers that do not contradict each other lead to the same bytes, in both files, whatever comes first."""
    answers = answers_from([(start, steps, 1) for start, steps, _ in writes])
    shuffled = list(answers)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    contents = []
    for order in (answers, shuffled, shuffled + answers):
        store = Store(tmp_path_factory.mktemp("order"), disk=QuickDisk())
        for bars in order:
            opens_s = opens_of(bars)
            write(store, bars, Window.from_epoch(int(opens_s[0]), int(opens_s[-1]) + 60))
        sidecar = json.loads(store.sidecar_path(AAPL_1M).read_bytes())
        del sidecar["file"]["mtime_ns"]
        contents.append((store.csv_path(AAPL_1M).read_bytes(), sidecar))
    assert contents[0] == contents[1] == contents[2]


def test_bars_far_apart_land_in_their_own_partitions(store: Store) -> None:
    """Friday's window runs to Monday, so a Saturday stamp belongs to Friday; each partition has rows and checksum."""
    friday = 3 * 1440
    write(store, make_bars([0, friday, friday + 1440, friday + 3 * 1440]))
    marks = store.read_sidecar(AAPL_1M).partitions
    assert {key: mark.rows for key, mark in marks.items()} == {"2024-01-02": 1, "2024-01-05": 2, "2024-01-08": 1}


# ---------------------------------------------------------------------------------------------------- claims


def test_answered_windows_merge(store: Store) -> None:
    """Touching and overlapping windows become one, others stay apart."""
    for first, after in [(0, 10), (30, 40), (10, 20), (35, 50)]:
        write(store, empty_bars(), window_of(first, after))
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 20), window_of(30, 50))


def test_nothing_is_claimed_about_bars_that_may_still_be_forming(store: Store) -> None:
    """An answered window that reaches beyond the last complete bar would hide that bar."""
    now = datetime.fromtimestamp(T0 + 90 * 60, UTC)
    window = window_of(0, 120)
    store.write(AAPL_1H, empty_bars(), answered=window, source="simulator", now=now)
    (claimed,) = store.read_sidecar(AAPL_1H).answered_windows
    assert claimed.start == window.start
    assert claimed.end_s == T0 + 30 * 60 + 1  # a bar opening later than this is not an hour old
    store.write(
        AAPL_1H, empty_bars(), answered=window, source="simulator", now=now, complete_until=now - timedelta(minutes=30)
    )
    assert store.read_sidecar(AAPL_1H).answered_windows[0].end_s == T0 + 60 * 60


def make_absence(first: int, after: int, duration: str = "1 D") -> ProvenEmpty:
    window = window_of(first, after)
    evidence = Evidence(asked_at=NOW, duration=duration, end=window.end, code=162, text="HMDS query returned no data")
    return ProvenEmpty(start=window.start, end=window.end, opens=after - first, evidence=(evidence,))


def test_absent_ranges_keep_their_evidence_until_a_bar_appears(store: Store) -> None:
    """A range is recorded with its requests and answers; a bar inside it removes it."""
    ranges = [make_absence(5, 8), make_absence(20, 30)]
    store.write(AAPL_1M, make_bars([0]), answered=window_of(0, 30), source="simulator", now=NOW, proven_empty=ranges)
    assert store.read_sidecar(AAPL_1M).proven_empty == tuple(ranges)
    again = make_absence(5, 9, "2 D")
    store.write(AAPL_1M, empty_bars(), answered=None, source="simulator", now=NOW, proven_empty=[again])
    merged = store.read_sidecar(AAPL_1M).proven_empty[0]
    assert merged.window == window_of(5, 9)
    assert [e.duration for e in merged.evidence] == ["1 D", "2 D"]
    write(store, make_bars([6]))
    assert [r.window for r in store.read_sidecar(AAPL_1M).proven_empty] == [window_of(20, 30)]


def test_an_absence_of_a_forming_bar_is_not_recorded(store: Store) -> None:
    """A bar that has not closed yet may still appear."""
    now = datetime.fromtimestamp(T0 + 10 * 60, UTC)
    store.write(
        AAPL_1M,
        empty_bars(),
        answered=None,
        source="simulator",
        now=now,
        proven_empty=[make_absence(2, 3), make_absence(10, 11)],
    )
    assert [r.window for r in store.read_sidecar(AAPL_1M).proven_empty] == [window_of(2, 3)]


def test_history_start_and_sparse_are_recorded(store: Store) -> None:
    """Other fields stay as they are."""
    write(store, make_bars(range(3)), window_of(0, 3))
    start = HistoryStart(open=datetime(1980, 12, 12, tzinfo=UTC), known_by="head timestamp")
    nothing = make_bars(range(0))
    store.write(AAPL_1M, nothing, answered=None, source="simulator", now=NOW, history_start=start)
    store.write(AAPL_1M, nothing, answered=None, source="simulator", now=NOW, sparse=True)
    sidecar = store.read_sidecar(AAPL_1M)
    assert (sidecar.history_start, sidecar.sparse, sidecar.rows) == (start, True, 3)
    assert '"open": "1980-12-12T00:00:00Z"' in store.sidecar_path(AAPL_1M).read_text()


# ---------------------------------------------------------------------------------------------------- identity


def other(**changes: object) -> Series:
    return Series(replace(replace(stock("AAPL"), con_id=265598), **changes), AAPL_1M.timeframe)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("series", "named"),
    [
        (other(con_id=4), "conId 265598"),
        (other(hours=Hours.EXTENDED), "hours regular"),
        (other(what_to_show="MIDPOINT"), "what to show TRADES"),
        (other(currency="EUR"), "currency USD"),
        (other(sec_type="CFD"), "kind STK"),
    ],
)
def test_a_file_never_mixes_kinds_of_bars(store: Store, series: Series, named: str) -> None:
    """The message names what the file holds and what was offered; nothing is written."""
    write(store, make_bars(range(3)), series=other())
    before = store.csv_path(AAPL_1M).read_bytes()
    with pytest.raises(StoreError, match=named) as caught:
        write(store, make_bars([7]), series=series)
    assert "offered" in str(caught.value)
    assert "move" in caught.value.advice
    assert store.csv_path(AAPL_1M).read_bytes() == before


def test_simulated_and_real_bars_never_share_a_file(store: Store) -> None:
    """Either way round; paper and live are both real."""
    write(store, make_bars(range(3)))
    with pytest.raises(StoreError, match="simulated bars"):
        store.write(AAPL_1M, make_bars([7]), answered=None, source="live", now=NOW)
    store.write(AAPL_1H, empty_bars(), answered=window_of(0, 60), source="paper", now=NOW)
    store.write(AAPL_1H, empty_bars(), answered=window_of(0, 60), source="live", now=NOW)
    with pytest.raises(StoreError, match="real bars"):
        write(store, empty_bars(), window_of(0, 60), AAPL_1H)


def test_an_unknown_con_id_is_filled_in(store: Store) -> None:
    """The first write may not know the conId; a later one fills it in, and from then on it counts."""
    write(store, make_bars(range(3)))
    write(store, make_bars([4]), series=other())
    write(store, make_bars([5]))
    pinned = store.read_sidecar(AAPL_1M).instrument
    assert pinned is not None
    assert pinned.con_id == 265598
    with pytest.raises(StoreError):
        write(store, make_bars([6]), series=other(con_id=4))


def test_the_volume_unit_is_recorded(store: Store) -> None:
    """Forex has none; a stock's unit is unknown until a write gives it."""
    bars = make_bars([30]).assign(volume=0.0)
    write(store, bars, series=EURUSD_1H)
    pinned = store.read_sidecar(EURUSD_1H).instrument
    assert pinned is not None
    assert pinned.volume_unit == "none"
    for unit in ("lots", None):
        store.write(AAPL_1M, make_bars([0]), answered=None, source="simulator", now=NOW, volume_unit=unit)
        pinned = store.read_sidecar(AAPL_1M).instrument
        assert pinned is not None
        assert pinned.volume_unit == "lots"


def test_symbols_with_other_characters_have_files(store: Store) -> None:
    """``BRK B`` and ``EUR.USD`` become names that can be reversed."""
    for symbol, name in [("BRK B", "BRK_B_1m.csv"), ("EUR.USD", "EUR_2E_USD_1m.csv")]:
        series = Series(Instrument(symbol, "STK", "SMART", "USD"), AAPL_1M.timeframe)
        assert write(store, make_bars([0]), series=series).path.name == name


# ---------------------------------------------------------------------------------------------------- edits


def edit_lines(store: Store, change: object) -> None:
    """As an editor does: the file is written anew, at another time."""
    path = store.csv_path(AAPL_1M)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")  # type: ignore[operator]
    os.utime(path, ns=(1, 1))


@pytest.fixture
def filled(store: Store) -> Store:
    """Ten bars each on Tuesday and on Wednesday, all answered."""
    write(store, make_bars(range(10)), window_of(0, 10))
    write(store, make_bars(range(1440, 1450)), window_of(1440, 1450))
    return store


def test_deleted_lines_are_noticed_and_missing_again(filled: Store) -> None:
    """The edited day loses its claims, at once for readers and on disk with the next write; the other day keeps them."""
    edit_lines(filled, lambda lines: lines[:3] + lines[6:])
    assert filled.read_sidecar(AAPL_1M).answered_windows == (window_of(1440, 1450),)
    assert [str(problem) for problem in filled.verify(AAPL_1M)] == [
        "2024-01-02: its 7 rows are not the 10 rows last written"
    ]
    prepared = filled.prepare(AAPL_1M, now=NOW)
    assert prepared.changed_partitions == ("2024-01-02",)
    assert prepared.adopted is None
    assert filled.verify(AAPL_1M) == []
    assert json.loads(filled.sidecar_path(AAPL_1M).read_text())["answered"] == [
        {"start": "2024-01-03T14:30:00Z", "end": "2024-01-03T14:40:00Z"}
    ]


def test_a_whole_day_deleted_is_noticed(filled: Store) -> None:
    """A partition that is gone is not an empty one."""
    edit_lines(filled, lambda lines: lines[:11])
    assert "rows last written are gone" in str(filled.verify(AAPL_1M)[0])
    assert filled.prepare(AAPL_1M, now=NOW).changed_partitions == ("2024-01-03",)
    assert filled.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)


def test_a_lost_csv_withdraws_all_claims(filled: Store) -> None:
    """Deleting the CSV means starting again: no claim survives, the pinned instrument does."""
    filled.csv_path(AAPL_1M).unlink()
    assert filled.read_sidecar(AAPL_1M).answered == ()
    assert filled.prepare(AAPL_1M, now=NOW).csv_gone
    sidecar = filled.read_sidecar(AAPL_1M)
    assert (sidecar.answered, sidecar.partitions) == ((), {})
    assert sidecar.instrument is not None
    assert not filled.prepare(AAPL_1M, now=NOW).csv_gone


BAD_EDITS = {
    "swapped lines": lambda ls: [*ls[:3], ls[4], ls[3], *ls[5:]],
    "a duplicated line": lambda ls: [*ls[:4], ls[3], *ls[4:]],
    "a NaN": lambda ls: [*ls[:4], ls[4].split(",")[0] + ",nan,1,1,1,1", *ls[5:]],
    "a missing field": lambda ls: [*ls[:4], ls[4].rsplit(",", 1)[0], *ls[5:]],
    "high below low": lambda ls: [*ls[:4], ls[4].split(",")[0] + ",5,1,5,5,1", *ls[5:]],
    "rubbish": lambda ls: [*ls[:4], "<<<<<<< HEAD", *ls[4:]],
    "an empty line": lambda ls: [*ls[:4], "", *ls[4:]],
    "a line moved to the other day": lambda ls: [*ls[:4], *ls[5:15], ls[4], *ls[15:]],
}


@pytest.mark.parametrize("name", BAD_EDITS)
def test_readers_never_return_garbage(filled: Store, name: str) -> None:
    """An edit that breaks order or a row is an error naming the line, for a window around it; `verify` reports the line too."""
    edit_lines(filled, BAD_EDITS[name])
    with pytest.raises(DataError, match=r"line (4|5|6|15)"):
        filled.read_bars(AAPL_1M)
    assert any(problem.line in (4, 5, 6, 15) for problem in filled.verify(AAPL_1M))


@pytest.mark.parametrize("name", BAD_EDITS)
def test_the_next_load_repairs_an_edited_file_and_keeps_a_copy(filled: Store, name: str) -> None:
    """Good rows stay, bad ones are reported and missing again, the edited file is kept beside."""
    good = filled.read_bars(AAPL_1M)
    edit_lines(filled, BAD_EDITS[name])
    edited = filled.csv_path(AAPL_1M).read_bytes()
    prepared = filled.prepare(AAPL_1M, now=NOW)
    assert prepared.adopted is not None
    assert prepared.adopted.backup is not None
    assert prepared.adopted.backup.name == "AAPL_1m.csv.bak-20250101T000000Z"
    assert prepared.adopted.backup.read_bytes() == edited
    assert filled.verify(AAPL_1M) == []
    left = filled.read_bars(AAPL_1M)
    assert as_dict(left).items() <= as_dict(good).items()
    assert len(left) == 20 - len([f for f in prepared.adopted.dropped if f.text.startswith("2024")])
    if len(left) < 20:
        assert filled.read_sidecar(AAPL_1M).answered_windows == (window_of(1440, 1450),)
    else:
        assert filled.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10), window_of(1440, 1450))
    write(filled, good)
    pd.testing.assert_frame_equal(filled.read_bars(AAPL_1M), good)


def test_an_edit_elsewhere_never_misleads_a_windowed_read(store: Store) -> None:
    """One line moved far away could send the bisecting astray: the window would look empty and be filled twice."""
    write(store, make_bars(range(600)))
    edit_lines(store, lambda lines: [*lines[:300], lines[590], *lines[300:590], *lines[591:]])
    for first in (10, 150, 298, 299, 450, 588, 595):
        with pytest.raises(DataError, match=r"line 30[12]"):
            store.held_opens(AAPL_1M, window_of(first, first + 2))
    write(store, make_bars(range(295, 305)))
    assert store.held_opens(AAPL_1M).tolist() == [T0 + 60 * m for m in range(600)]


def test_an_edit_that_hides_its_time_is_met_by_the_write(filled: Store) -> None:
    """Same size, same time of change: the rows that a write touches are parsed anyway, and the file is repaired."""
    path = filled.csv_path(AAPL_1M)
    state = path.stat()
    path.write_bytes(path.read_bytes().replace(b"14:34:00Z", b"14:34:0xZ", 1))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DataError, match="line 6"):
        filled.read_bars(AAPL_1M, window_of(2, 8))
    written = write(filled, make_bars(range(10)), window_of(0, 10))
    assert written.prepared.adopted is not None
    assert filled.verify(AAPL_1M) == []
    assert len(filled.held_opens(AAPL_1M)) == 20


# ---------------------------------------------------------------------------------------------------- sidecars


def test_a_lost_sidecar_costs_requests_never_bars(filled: Store) -> None:
    """All bars stay; nothing is claimed; rows and checksums are built anew."""
    before = filled.read_bars(AAPL_1M)
    filled.sidecar_path(AAPL_1M).unlink()
    filled.prepare(AAPL_1M, now=NOW)
    pd.testing.assert_frame_equal(filled.read_bars(AAPL_1M), before)
    sidecar = filled.read_sidecar(AAPL_1M)
    assert (sidecar.answered, sidecar.rows) == ((), 20)
    assert filled.verify(AAPL_1M) == []


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b'{"version": "x"}', b'{"answered": 5}', b"[" * 100_000,
     b'{"answered": [{"start": "2024-01-01T00:00:00", "end": "2024-01-02T00:00:00"}]}'],
)  # fmt: skip
def test_a_garbage_sidecar_is_kept_and_built_anew(filled: Store, garbage: bytes) -> None:
    """Reading it is a clear error; the next write keeps a copy and goes on; no bar is lost, and nothing is claimed of it."""
    path = filled.sidecar_path(AAPL_1M)
    path.write_bytes(garbage)
    with pytest.raises(DataError, match=r"AAPL_1m\.meta\.json is unreadable") as caught:
        filled.read_sidecar(AAPL_1M)
    assert "no bar is lost" in caught.value.advice
    assert len(filled.read_bars(AAPL_1M)) == 20
    written = write(filled, make_bars([15]), window_of(15, 16))
    kept = written.prepared.corrupt_sidecar
    assert kept is not None
    assert kept.name == "AAPL_1m.meta.json.corrupt-20250101T000000Z"
    assert kept.read_bytes() == garbage
    sidecar = filled.read_sidecar(AAPL_1M)
    assert (sidecar.rows, sidecar.answered_windows) == (21, ())


def test_a_newer_programs_sidecar_is_left_alone(filled: Store) -> None:
    """Refused with what to do, neither overwritten nor ignored."""
    path = filled.sidecar_path(AAPL_1M)
    path.write_text('{"version": 2, "wonders": true}')
    for act in (
        lambda: filled.read_sidecar(AAPL_1M),
        lambda: filled.prepare(AAPL_1M, now=NOW),
        lambda: write(filled, make_bars([15])),
    ):
        with pytest.raises(StoreError, match="newer version"):
            act()
    assert path.read_text() == '{"version": 2, "wonders": true}'


def test_the_sidecar_can_be_read_by_eye(filled: Store) -> None:
    """Sorted keys, ISO times, one line for each window and partition."""
    text = filled.sidecar_path(AAPL_1M).read_text()
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert data["version"] == 1
    assert data["updated_at"] == "2025-01-01T00:00:00Z"
    assert data["instrument"]["symbol"] == "AAPL"
    assert '\n    {"end": "2024-01-02T14:40:00Z", "start": "2024-01-02T14:30:00Z"},\n' in text
    assert sum('"rows": 10' in line for line in text.splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- locks


def test_a_held_lock_is_a_clear_error_after_the_timeout(store: Store) -> None:
    """The error names the file and the time-out."""
    write(store, make_bars(range(3)))
    impatient = Store(store.data_dir, lock_timeout_s=0.02)
    with FileLock(store.data_dir / ".AAPL_1m.lock"), pytest.raises(StoreError, match=r"AAPL_1m\.csv for 0\.02 s"):
        write(impatient, make_bars([5]))
    assert len(store.read_bars(AAPL_1M)) == 3


def test_readers_need_no_lock(store: Store) -> None:
    """While another process writes, everything can be read."""
    write(store, make_bars(range(3)), window_of(0, 3))
    impatient = Store(store.data_dir, lock_timeout_s=0.0)
    with FileLock(store.data_dir / ".AAPL_1m.lock"):
        assert len(impatient.read_bars(AAPL_1M)) == 3
        assert impatient.extent(AAPL_1M) is not None
        assert impatient.read_sidecar(AAPL_1M).rows == 3
        assert impatient.prepare(AAPL_1M, now=NOW).adopted is None


@pytest.mark.slow
def test_threads_writing_one_series_lose_nothing(store: Store) -> None:
    """Eight writers and a reader at once: every bar arrives, and the reader only ever sees whole files."""
    seen: list[int] = []
    failures: list[BaseException] = []

    def run(part: int) -> None:
        try:
            for i in range(6):
                write(store, make_bars([part + 8 * i]), window_of(part + 8 * i, part + 8 * i + 1))
        except BaseException as failure:  # noqa: BLE001 (handed to the main thread)
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(len(store.read_bars(AAPL_1M)))
    assert failures == []
    assert seen == sorted(seen)
    assert store.held_opens(AAPL_1M).tolist() == [T0 + 60 * m for m in range(48)]
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 48),)
    assert store.verify(AAPL_1M) == []


def test_another_series_is_another_lock(store: Store) -> None:
    """Series do not wait for each other."""
    store.data_dir.mkdir()
    with FileLock(store.data_dir / ".AAPL_1h.lock"):
        assert write(Store(store.data_dir, lock_timeout_s=0.0), make_bars([0])).rows_added == 1
