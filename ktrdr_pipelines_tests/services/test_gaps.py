"""Promises of the questions: what is missing is shown with its reason, and asking changes nothing on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.calendars import count_expected, expected_bars
from ktrdr_pipelines.cli.tables import describe_holding
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.partitions import Recorded, partition_at, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import DataError, StoreError
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.coverage import find_missing_runs, mark_missing
from ktrdr_pipelines.services.gaps import (
    Forming,
    Holding,
    Missing,
    Why,
    explain_missing,
    find_forming,
    inspect_series,
    place,
)
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window
from ktrdr_pipelines_tests.planning.test_coverage import holdings

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
NOW = utc("2024-06-15")
JANUARY_AND_FEBRUARY = window("2024-01-01", "2024-03-01")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """January and February of AAPL 1h, loaded."""
    made = Store(tmp_path / "data")
    fill(made, FakeHistory.of(AAPL_1H, JANUARY_AND_FEBRUARY), JANUARY_AND_FEBRUARY)
    return made


def fill(store: Store, history: FakeHistory, span: Window) -> None:
    load = Load(
        AAPL_1H, span, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: NOW
    )  # fmt: skip
    for _ in run_load(load):
        pass


def inspect(
    store: Store,
    recorded: Mapping[str, Recorded],
    *,
    since: str = "2023-12-01",
    now: datetime = NOW,
) -> Holding:
    return inspect_series(
        AAPL_1H, store, file=store.csv_path(AAPL_1H), earliest=utc(since), now=now, recorded=recorded
    )  # fmt: skip


def delete_lines(store: Store, first: int, last: int) -> None:
    path = store.csv_path(AAPL_1H)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: first - 1] + lines[last:]))


def photograph(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def summary(held: Holding) -> list[tuple[int, str, str]]:
    return [(m.bars, m.where, str(m.why)) for m in held.missing]


def test_what_was_never_asked_lies_before_and_after_what_is_held(store: Store) -> None:
    """Two stretches, counted by the calendar, and what is held with its ends."""
    found = inspect(store, {"2024-01-01": Recorded.COMPLETE, "2024-02-01": Recorded.COMPLETE})
    assert (found.rows, found.first, found.last) == (287, utc("2024-01-02T14:30"), utc("2024-02-29T20:00"))
    later = len(expected_bars(AAPL_1H, window("2024-03-01", "2024-06-15")).opens)
    assert summary(found) == [
        (140, "before the first held bar", "never asked"),
        (later, "after the last held bar", "never asked"),
    ]
    assert found.count_missing() == {"never asked": 140 + later}
    assert not found.is_older_known


def test_the_reason_follows_the_partition(store: Store) -> None:
    """A partition that failed, one under way, and one that was never tried: three reasons, parted at their borders."""
    recorded = {"2024-03-01": Recorded.FAILED, "2024-04-01": Recorded.UNDER_WAY}
    found = inspect(store, recorded, since="2024-01-01")
    months = [len(expected_bars(AAPL_1H, window(f"2024-0{m}-01", f"2024-0{m + 1}-01")).opens) for m in (3, 4)]
    assert [(m.bars, m.why) for m in found.missing][:2] == [(months[0], Why.FAILED), (months[1], Why.UNDER_WAY)]
    assert found.missing[2].why is Why.NEVER_ASKED
    assert found.missing[2].window.start == utc("2024-05-01T13:30")


def test_forty_lines_deleted_by_hand_are_gone_and_not_never_asked(store: Store) -> None:
    """Bars that are missing in a partition recorded as complete, with newer ones held, were there once."""
    delete_lines(store, 50, 89)
    with peek(store, AAPL_1H, now=NOW) as (view, pending):
        found = inspect(view, {"2024-01-01": Recorded.COMPLETE, "2024-02-01": Recorded.COMPLETE}, since="2024-01-01")
    assert summary(found)[0] == (40, "between held bars", "gone since it was loaded")
    assert pending.changed_partitions == ("2024-01-01",)
    assert "2024-01-01" in str(store.verify(AAPL_1H)[0])


def test_a_complete_partition_that_goes_on_is_not_gone(store: Store) -> None:
    """What has traded since the last held bar was not asked for yet, though its partition is recorded as complete."""
    fill(store, FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-03-08")), window("2024-03-01", "2024-03-08"))
    found = inspect(store, {"2024-03-01": Recorded.COMPLETE}, since="2024-01-01", now=utc("2024-03-14"))
    assert summary(found) == [(28, "after the last held bar", "never asked")]


def test_a_deleted_file_is_gone_altogether(store: Store) -> None:
    """With nothing held, partitions recorded as complete lack everything."""
    store.csv_path(AAPL_1H).unlink()
    with peek(store, AAPL_1H, now=NOW) as (view, pending):
        found = inspect(view, {"2024-01-01": Recorded.COMPLETE}, since="2024-01-01", now=utc("2024-02-01"))
    assert summary(found) == [(147, "nothing held", "gone since it was loaded")]
    assert not found.never_loaded
    assert pending.csv_gone


def test_absent_bars_are_shown_with_its_evidence_newest_first(tmp_path: Path) -> None:
    """Proven-empty bars are not missing; their ranges are counted, and the newest come with what IB answered."""
    store = Store(tmp_path / "data")
    span = window("2024-01-01", "2024-02-01")
    everything = expected_bars(AAPL_1H, span).opens
    fill(store, FakeHistory(np.delete(everything, [30, 31, 50])), span)
    found = inspect(store, {}, since="2024-01-01", now=utc("2024-02-01"))
    assert (found.proven_ranges, found.proven_bars, summary(found)) == (2, 3, [])
    assert sorted(item.opens for item in found.newest_proven) == [1, 2]
    assert all(len(item.evidence) == 2 and item.evidence[0].text for item in found.newest_proven)
    assert not [line for line in describe_holding(found) if "more (the sidecar" in line]
    many = replace(found, proven_ranges=22)
    assert any("… 20 more" in line for line in describe_holding(many))


WHYS = {Recorded.COMPLETE: Why.GONE, Recorded.FAILED: Why.FAILED, Recorded.UNDER_WAY: Why.UNDER_WAY}


@settings(max_examples=120)
@given(case=holdings(), data=st.data())
def test_gaps_are_the_missing_bars_grouped(case: tuple[Series, Window, IntArray, Sidecar], data: st.DataObject) -> None:
    """Against the reason and place of each missing bar by itself: a gap is a run of consecutive ones that agree in both."""
    series, window, held, sidecar = case
    partitions = list(partitions_in(series.timeframe, window))
    statuses = st.lists(
        st.sampled_from([None, *Recorded]), min_size=len(partitions), max_size=len(partitions)
    )  # fmt: skip
    recorded = {p.key: status for p, status in zip(partitions, data.draw(statuses), strict=True) if status}
    bars = expected_bars(series, window)
    missing = mark_missing(bars, held, sidecar, int(held[0]) if len(held) else None, series.timeframe)
    groups: list[Missing] = []
    last, count = -2, 0
    for i in np.flatnonzero(missing).tolist():
        open_s, key = int(bars.opens[i]), partition_at(series.timeframe, datetime.fromtimestamp(bars.opens[i], UTC)).key
        why = WHYS[recorded[key]] if key in recorded else Why.NEVER_ASKED
        if why is Why.GONE and len(held) and open_s > held[-1]:
            why = Why.NEVER_ASKED
        where = place(open_s, int(held[0]) if len(held) else None, int(held[-1]) if len(held) else None)
        if i == last + 1 and (groups[-1].why, groups[-1].where) == (why, where):
            start_s, count = groups.pop().window.start_s, count + 1
        else:
            start_s, count = open_s, 1
        groups.append(Missing(Window.from_epoch(start_s, max(start_s, int(bars.closes[i]))), count, where, why))
        last = i
    expected = count_expected(series, window)
    runs = find_missing_runs(expected, held, sidecar, int(held[0]) if len(held) else None)
    assert explain_missing(series, expected.grid, runs, held, recorded) == groups


def test_bars_before_the_first_held_one_are_known_when_partitions_begin_there(store: Store) -> None:
    """`is_older_known` is about the time that partitions cover, not about all of history."""
    assert not inspect(store, {}).is_older_known
    assert inspect(store, {}, since="2024-01-01").is_older_known


@pytest.mark.parametrize(
    ("series", "now", "forming"),
    [
        (AAPL_1H, "2024-03-05T15:40", [("2024-03-05T15:00", "2024-03-05T16:00")]),
        (AAPL_1H, "2024-03-05T14:59:59", [("2024-03-05T14:30", "2024-03-05T15:00")]),
        (AAPL_1H, "2024-03-05T15:00", [("2024-03-05T15:00", "2024-03-05T16:00")]),
        (AAPL_1H, "2024-03-05T21:00", []),
        (AAPL_1H, "2024-03-09T15:40", []),
        (Series(stock("AAPL"), TIMEFRAMES["1d"]), "2024-03-05T15:40", [("2024-03-05T00:00", "2024-03-05T21:00")]),
        (Series(forex("EURUSD"), TIMEFRAMES["1h"]), "2024-03-05T22:05", []),
    ],
)
def test_the_forming_bar_is_shown_apart(series: Series, now: str, forming: list[tuple[str, str]]) -> None:
    """A bar forms from its begin to its close, both ends half-open; none while the market is closed."""
    assert find_forming(series, utc(now)) == [Forming(utc(a), utc(b)) for a, b in forming]


def test_a_look_at_a_foreign_file_changes_nothing(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the load would put right is reported, with the bars that would be held; not a byte, not a time on disk moves."""
    path = store.csv_path(AAPL_1H)
    store.sidecar_path(AAPL_1H).write_text("{ garbage")
    path.write_bytes(path.read_bytes().replace(b"timestamp", b"date").replace(b"\n", b"\r\n"))
    before = photograph(tmp_path)
    with peek(store, AAPL_1H, now=NOW) as (view, pending):
        assert inspect(view, {}).rows == 287
    assert pending.adopted is not None
    assert (pending.adopted.rows, pending.adopted.backup) == (287, None)
    assert pending.corrupt_sidecar == store.sidecar_path(AAPL_1H)
    assert photograph(tmp_path) == before
    assert caplog.text == ""


def test_a_look_at_files_that_were_not_touched_reads_them_where_they_are(store: Store, tmp_path: Path) -> None:
    """No copies, no lock, nothing to put right; the same for a series without files."""
    before = photograph(tmp_path)
    with peek(store, AAPL_1H, now=NOW) as (view, pending):
        assert view is store
    with peek(store, Series(stock("MSFT"), TIMEFRAMES["1h"]), now=NOW) as (other, nothing):
        assert other is store
    assert not pending.changed_partitions
    assert pending == nothing
    assert photograph(tmp_path) == before


def test_a_look_says_what_cannot_be_read(store: Store) -> None:
    """No bar file, and a sidecar of a newer program, are errors that name the file as it is called."""
    store.sidecar_path(AAPL_1H).write_text('{"version": 99}')
    with (
        pytest.raises(StoreError, match=r"AAPL_1h\.meta\.json was written by a newer version"),
        peek(store, AAPL_1H, now=NOW),
    ):
        pass
    store.sidecar_path(AAPL_1H).unlink()
    store.csv_path(AAPL_1H).write_text("<html>")
    with pytest.raises(DataError, match=r"AAPL_1h\.csv line 1 looks like an HTML"), peek(store, AAPL_1H, now=NOW):
        pass


def test_a_bar_of_the_future_is_taken_out_of_an_edited_file(store: Store) -> None:
    """It would make the tail believe that nothing is missing: dropped, shown, and the original kept."""
    path = store.csv_path(AAPL_1H)
    good = path.read_bytes()
    path.write_bytes(good + b"2030-01-02T14:30:00Z,10.0,12.0,9.0,11.0,5\n")
    prepared = store.prepare(AAPL_1H, now=NOW)
    assert path.read_bytes() == good
    assert prepared.adopted is not None
    assert [(f.line, f.why) for f in prepared.adopted.dropped] == [(289, "the bar is not complete yet")]
    assert prepared.adopted.backup is not None
    assert prepared.adopted.backup.exists()


def test_a_bar_that_may_still_be_forming_is_not_adopted(store: Store, tmp_path: Path) -> None:
    """Half a bar in a foreign file is left out; the complete ones are taken."""
    foreign = tmp_path / "old.csv"
    foreign.write_text(
        "date,open,high,low,close,volume\n"
        "2024-06-14T18:00:00Z,10,12,9,11,5\n"
        "2024-06-14T19:00:00Z,10,12,9,11,5\n"
    )  # fmt: skip
    adopted = store.adopt(AAPL_1H, foreign, now=utc("2024-06-14T19:40"))
    assert adopted.rows == 1
    assert [(f.line, f.why) for f in adopted.dropped] == [(3, "the bar is not complete yet")]


def test_what_a_read_put_right_is_reported_by_the_next_prepare(store: Store) -> None:
    """A foreign file that a read met first is adopted once, and its dropped rows are not kept from the load."""
    path = store.csv_path(AAPL_1H)
    store.sidecar_path(AAPL_1H).unlink()
    path.write_bytes(path.read_bytes().replace(b"timestamp", b"date") + b"2024-03-01T14:30:00Z,nan,2,1,2,3\n")
    fresh = Store(store.data_dir)
    assert fresh.extent(AAPL_1H) is not None
    reported = fresh.prepare(AAPL_1H, now=NOW)
    assert reported.adopted is not None
    assert [f.line for f in reported.adopted.dropped] == [289]
    assert fresh.prepare(AAPL_1H, now=NOW).adopted is None
