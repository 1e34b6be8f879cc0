"""Missing bars counted on the grid: the same as those listed one by one, for gaps, partitions and counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.calendars import count_expected, expected_bars
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.planning.coverage import (
    PartitionState,
    count_in_runs,
    find_missing_runs,
    judge_partitions,
    known_span,
    mark_missing,
)
from ktrdr_pipelines.store.sidecar import HistoryStart, ProvenEmpty, Sidecar

T0 = datetime(2024, 1, 29, tzinfo=UTC)
INSTRUMENTS = [
    stock("AAPL"),
    stock("AAPL", hours=Hours.EXTENDED),
    stock("700", exchange="SEHK", currency="HKD"),
    forex("EURUSD"),
    Instrument("BTC", "CRYPTO", "PAXOS", "USD"),
    Instrument("ESH4", "FUT", "CME", "USD", ib_symbol="ES", expiry="202402"),
]
DAYS = {"5m": 4, "1h": 40, "4h": 90, "1d": 500, "1w": 2000, "1mo": 4000}


@st.composite
def holdings(draw: st.DrawFn) -> tuple[Series, Window, IntArray, Sidecar]:
    """A series, a window, what is held (runs of bars, labels that match otherwise, unexpected bars) and what is known."""
    timeframe = TIMEFRAMES[draw(st.sampled_from(list(DAYS)))]
    series = Series(draw(st.sampled_from(INSTRUMENTS)), timeframe)
    days = DAYS[timeframe.name]
    start = T0 - timedelta(days=draw(st.integers(0, days)), hours=draw(st.integers(0, 23)))
    window = Window(start, start + timedelta(days=draw(st.integers(0, days))))
    bars = expected_bars(series, Window(T0 - timedelta(days=days), T0 + timedelta(days=days)))

    def places(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, max(0, len(bars) - 1)), max_size=most)) if len(bars) else []

    parts = [bars.opens[i : i + draw(st.integers(1, 60))] for i in places(5)]
    parts += [bars.aliases[places(5)], bars.opens[places(5)] + draw(st.sampled_from([60, -86400, 7200]))]
    held = np.unique(np.concatenate(parts)).astype(np.int64)
    absent = [
        (int(bars.opens[i]), int(bars.opens[i]) + draw(st.integers(1, 20 * timeframe.seconds))) for i in places(4)
    ]
    empty = tuple(
        ProvenEmpty(
            start=datetime.fromtimestamp(a, UTC), end=datetime.fromtimestamp(b, UTC), opens=1
        )
        for a, b in sorted(absent)
    )  # fmt: skip
    history_start = None
    if (chosen := places(1)) and draw(st.booleans()):
        history_start = HistoryStart(
            open=datetime.fromtimestamp(int(bars.opens[chosen[0]]), UTC), known_by="head timestamp"
        )
    return series, window, held, Sidecar(proven_empty=empty, history_start=history_start)


@settings(max_examples=150)
@given(case=holdings(), lag=st.integers(0, 30 * 86400))
def test_runs_are_the_missing_bars(case: tuple[Series, Window, IntArray, Sidecar], lag: int) -> None:
    """Against the bars listed and marked one by one; runs are maximal."""
    series, window, held, sidecar = case
    now_s = window.end_s - lag
    first_s = int(held[0]) if len(held) else None
    bars = expected_bars(series, window, complete_at_s=now_s)
    missing = mark_missing(bars, held, sidecar, first_s, series.timeframe)
    expected = count_expected(series, window, complete_at_s=now_s)
    runs = find_missing_runs(expected, held, sidecar, first_s)
    numbers = [number for first, end in runs.tolist() for number in range(first, end)]
    assert numbers == (np.flatnonzero(missing) + expected.first).tolist()
    assert count_in_runs(runs) == missing.sum()
    assert (runs[1:, 0] > runs[:-1, 1]).all()


@settings(max_examples=80)
@given(case=holdings(), lag=st.integers(0, 30 * 86400))
def test_partitions_are_judged_by_their_missing_bars(case: tuple[Series, Window, IntArray, Sidecar], lag: int) -> None:
    """Against a count partition by partition of the bars listed."""
    series, window, held, sidecar = case
    now = window.end - timedelta(seconds=lag)
    partitions = list(partitions_in(series.timeframe, window))
    states = judge_partitions(series, partitions, held, sidecar, grid_start=window.start, now=now)
    assert states == [judge_one(series, p, held, sidecar, window.start, now) for p in partitions]


def judge_one(
    series: Series, partition: Partition, held: IntArray, sidecar: Sidecar, grid_start: datetime, now: datetime
) -> PartitionState:
    window = partition.window
    bars = expected_bars(series, window, complete_at_s=int(now.timestamp()))
    missing = bars.opens[mark_missing(bars, held, sidecar, int(held[0]) if len(held) else None, series.timeframe)]
    inside = held[(held >= window.start_s) & (held < window.end_s)]
    known = known_span(held, sidecar, grid_start)
    return PartitionState(
        partition,
        rows=len(inside),
        first_open=datetime.fromtimestamp(int(inside[0]), UTC) if len(inside) else None,
        last_open=datetime.fromtimestamp(int(inside[-1]), UTC) if len(inside) else None,
        missing=len(missing),
        missing_before_last=int((missing < held[-1]).sum()) if len(held) else len(missing),
        is_within_known=known is not None and known.intersect(window) is not None,
    )
