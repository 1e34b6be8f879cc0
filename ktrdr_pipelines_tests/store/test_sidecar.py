"""The sidecar: its JSON, and how claims are added and withdrawn. Pure."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.sidecar import (
    PartitionMark,
    ProvenEmpty,
    Sidecar,
    Span,
    UnreadableSidecar,
    parse_sidecar,
    render_sidecar,
)
from ktrdr_pipelines.store.sidecar_claims import (
    add_answered,
    add_proven_empty,
    drop_disproved,
    subtract_windows,
    withdraw_partitions,
)

END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)

WINDOWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda w: (w[0], w[0] + w[1])), max_size=12)


def seconds_of(spans: tuple[Span, ...]) -> set[int]:
    return {s for span in spans for s in range(span.window.start_s, span.window.end_s)}


def merge_all(windows: list[tuple[int, int]]) -> tuple[Span, ...]:
    spans: tuple[Span, ...] = ()
    for start, end in windows:
        spans = add_answered(spans, Window.from_epoch(start, end), END_OF_TIME)
    return spans


@settings(max_examples=150, deadline=None)
@given(windows=WINDOWS, cuts=WINDOWS)
def test_answered_windows_behave_like_sets_of_seconds(
    windows: list[tuple[int, int]], cuts: list[tuple[int, int]]
) -> None:
    """Adding is union, withdrawing is difference; the result is sorted, and no two windows touch after adding."""
    spans = merge_all(windows)
    expected = {s for start, end in windows for s in range(start, end)}
    assert seconds_of(spans) == expected
    assert all(a.end < b.start for a, b in itertools.pairwise(spans))
    left = subtract_windows(spans, [Window.from_epoch(*cut) for cut in cuts])
    assert seconds_of(left) == expected - {s for start, end in cuts for s in range(start, end)}
    assert all(a.end <= b.start and a.start < a.end for a, b in itertools.pairwise(left))


def test_fractions_of_seconds_shrink_a_claim() -> None:
    """Claims are written in whole seconds: never more than was answered."""
    window = Window(datetime.fromtimestamp(0.5, UTC), datetime.fromtimestamp(9.5, UTC))
    (span,) = add_answered((), window, END_OF_TIME)
    assert (span.window.start_s, span.window.end_s) == (1, 9)
    assert add_answered((), window, datetime.fromtimestamp(0, UTC)) == ()


def make_range(start: int, end: int) -> ProvenEmpty:
    window = Window.from_epoch(start, end)
    return ProvenEmpty(start=window.start, end=window.end, opens=1)


@settings(max_examples=100, deadline=None)
@given(windows=WINDOWS, opens=st.lists(st.integers(0, 80), max_size=8))
def test_a_range_is_dropped_exactly_when_a_bar_lies_in_it(windows: list[tuple[int, int]], opens: list[int]) -> None:
    """Half-open: a bar at the start disproves a range, one at its end does not."""
    ranges = [make_range(start, end) for start, end in windows if start < end]
    kept = drop_disproved(ranges, sorted(opens))
    expected = [r for r in ranges if not any(r.window.start_s <= o < r.window.end_s for o in opens)]
    assert sorted(kept, key=str) == sorted(expected, key=str)


def test_a_smaller_range_inside_a_larger_one_adds_nothing() -> None:
    """The larger range already includes it."""
    assert add_proven_empty([make_range(0, 10)], [make_range(2, 5)]) == (make_range(0, 10),)
    assert add_proven_empty([make_range(2, 5)], [make_range(0, 10)]) == (make_range(0, 10),)


def test_a_sidecar_survives_json() -> None:
    """Every field is read as it was written."""
    sidecar = Sidecar(
        series="AAPL 1m",
        source="paper",
        sparse=True,
        answered=merge_all([(0, 60), (120, 180)]),
        proven_empty=(make_range(60, 120),),
        partitions={"2024-01-02": PartitionMark(rows=3, crc32="0000abcd")},
    )
    assert parse_sidecar(render_sidecar(sidecar).decode(), "x") == sidecar
    assert parse_sidecar(render_sidecar(Sidecar()).decode(), "x") == Sidecar()


@pytest.mark.parametrize(
    "text", ['{"version": 0}', '{"source": "hearsay"}', '{"partitions": {"2024-01-02": {"rows": "many"}}}']
)
def test_an_invalid_sidecar_is_unreadable(text: str) -> None:
    """Values that this program never writes are not accepted."""
    with pytest.raises(UnreadableSidecar):
        parse_sidecar(text, "x")


def test_an_invalid_partition_key_withdraws_no_claim() -> None:
    """A key typed by hand is removed, the claims stay."""
    mark = PartitionMark(rows=1, crc32="00000000")
    sidecar = Sidecar(answered=merge_all([(0, 60)]), partitions={"yesterday": mark, "1970-01-01": mark})
    corrected, changed = withdraw_partitions(sidecar, TIMEFRAMES["1m"], {"1970-01-01": mark})
    assert changed == ("yesterday",)
    assert corrected.answered == sidecar.answered
    assert corrected.partitions == {"1970-01-01": mark}


def test_many_absent_ranges_stay_cheap() -> None:
    """Fifty thousand ranges (an illiquid series) and forty new ones: the work grows with the new ones, not with all squared."""
    start = datetime(2000, 1, 1, tzinfo=UTC)
    ranges = tuple(
        ProvenEmpty(start=start + timedelta(hours=i), end=start + timedelta(hours=i, minutes=1), opens=1)
        for i in range(50_000)
    )
    new = [
        ProvenEmpty(start=start + timedelta(hours=i, minutes=30), end=start + timedelta(hours=i, minutes=31), opens=1)
        for i in range(40)
    ]
    before = time.process_time()
    found = add_proven_empty(ranges, new)
    assert time.process_time() - before < 2.0  # it took 11 seconds when every range was compared with every other
    assert len(found) == 50_040
    assert list(found) == sorted(found, key=lambda r: r.start)


def test_a_wider_range_replaces_those_it_covers() -> None:
    """Their evidence is kept with it; a narrower one adds nothing."""

    def make(first: int, last: int) -> ProvenEmpty:
        day = datetime(2024, 1, 1, tzinfo=UTC)
        return ProvenEmpty(start=day + timedelta(hours=first), end=day + timedelta(hours=last), opens=last - first)

    ranges = add_proven_empty((), [make(1, 2), make(3, 4), make(8, 9)])
    assert [(r.start.hour, r.end.hour) for r in add_proven_empty(ranges, [make(1, 5)])] == [(1, 5), (8, 9)]
    assert add_proven_empty(ranges, [make(3, 4)]) == ranges
    wide = add_proven_empty(ranges, [make(0, 10)])
    assert add_proven_empty(wide, [make(3, 4), make(0, 5), make(5, 10)]) == wide
