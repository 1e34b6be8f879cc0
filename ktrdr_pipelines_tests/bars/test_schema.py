"""The bars table, its rules, and the conversion of IB's answers. Tables of cases, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.bars.answer import NormalisedAnswer, normalise_answer
from ktrdr_pipelines.bars.schema import (
    COLUMNS,
    STAMP_DTYPE,
    bar_schema,
    bars_from_columns,
    empty_bars,
    latest_closes,
    opens_of,
    validate_bars,
)
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.ib.wire.decoding import RawBars

T0 = 1_704_205_800  # 2024-01-02T14:30:00Z
AAPL_1M = Series(stock("AAPL"), parse_timeframe("1m"))
AAPL_1H = Series(stock("AAPL"), parse_timeframe("1h"))
AAPL_1D = Series(stock("AAPL"), parse_timeframe("1d"))
EURUSD_1H = Series(forex("EURUSD"), parse_timeframe("1h"))
OIL_1D = Series(Instrument("CLK0", "FUT", "NYMEX", "USD"), parse_timeframe("1d"))


def minute_bars(count: int = 3, start_s: int = T0, step_s: int = 60) -> pd.DataFrame:
    opens_s = start_s + step_s * np.arange(count)
    close = 100.0 + np.arange(count)
    return bars_from_columns(opens_s, close, close + 0.5, close - 0.5, close, 10.0 * (1 + np.arange(count)))


def flat_answer(opens_s: Sequence[int], values: Sequence[float]) -> RawBars:
    return RawBars(np.array(opens_s, np.int64), *(np.array(values, np.float64) for _ in COLUMNS[1:]))


def answer_of(bars: pd.DataFrame) -> RawBars:
    return RawBars(opens_of(bars), *(bars[name].to_numpy(np.float64, copy=True) for name in COLUMNS[1:]))


def normalise(raw: RawBars, series: Series, window: Window, now_s: float) -> NormalisedAnswer:
    """Without a calendar."""
    return normalise_answer(raw, series, window, now_s=now_s, closes_s=latest_closes(series.timeframe, raw.opens_s))


def test_a_bars_table_has_exact_columns_and_types() -> None:
    """Columns, order, types and index are the documented ones, for empty tables too."""
    for bars in (minute_bars(), empty_bars()):
        assert tuple(bars.columns) == COLUMNS
        assert bars.dtypes.tolist() == [STAMP_DTYPE] + [np.dtype("float64")] * 5
        assert isinstance(bars.index, pd.RangeIndex)
        validate_bars(bars, AAPL_1M)


def test_opens_survive_the_round_trip() -> None:
    """Epoch seconds in, the same epoch seconds out, before 1970 too."""
    opens_s = np.array([-86400 * 365, 0, T0])
    ones = np.ones(3)
    assert opens_of(bars_from_columns(opens_s, ones, ones, ones, ones, ones)).tolist() == opens_s.tolist()


def test_a_stamp_between_seconds_is_refused() -> None:
    """Half seconds are never rounded."""
    bars = minute_bars()
    bars["timestamp"] += pd.Timedelta(milliseconds=500)
    with pytest.raises(DataError, match="whole second"):
        opens_of(bars)


def corrupt(column: str, row: int, value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(bars: pd.DataFrame) -> pd.DataFrame:
        bars.loc[row, column] = value
        return bars

    return change


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (corrupt("close", 1, float("nan")), "a price is not a finite number"),
        (corrupt("open", 1, float("inf")), "a price is not a finite number"),
        (corrupt("low", 1, float("-inf")), "a price is not a finite number"),
        (corrupt("high", 1, 100.9), "high is below"),
        (corrupt("low", 1, 101.1), "low is above"),
        (corrupt("low", 1, 0.0), "a price is not positive"),
        (corrupt("volume", 1, -1.0), "volume is negative"),
        (corrupt("volume", 1, float("nan")), "volume is not a finite number"),
        (corrupt("volume", 1, 2.0**63 - 1), "volume is IB's mark"),
        (corrupt("volume", 1, 2.0**31 - 1), "volume is IB's mark"),
        (corrupt("volume", 1, 2.0**127 - 1), "volume is IB's mark"),
        (corrupt("volume", 1, 1.7976931348623157e308), "volume is IB's mark"),
        (corrupt("high", 1, 1.7976931348623157e308), "a price is IB's mark"),
        (lambda b: b.iloc[[0, 2, 1]].reset_index(drop=True), "strictly increase"),
        (lambda b: b.iloc[[0, 1, 1]].reset_index(drop=True), "strictly increase"),
        (lambda b: b.assign(timestamp=b["timestamp"] + pd.Timedelta(seconds=1)), "off the 1m grid"),
        (lambda b: b.assign(timestamp=b["timestamp"] + pd.Timedelta(microseconds=1)), "off the 1m grid"),
        (lambda b: b.assign(timestamp=b["timestamp"].where(b.index != 1)), "timestamp"),
        (lambda b: b.assign(timestamp=b["timestamp"].dt.tz_localize(None)), "timestamp"),
        (lambda b: b.assign(timestamp=b["timestamp"].dt.as_unit("ns")), "timestamp"),
        (lambda b: b.assign(timestamp=b["timestamp"].dt.tz_convert("America/New_York")), "timestamp"),
        (lambda b: b.assign(volume=b["volume"].astype("int64")), "volume"),
        (lambda b: b.assign(extra=1.0), "extra"),
        (lambda b: b.drop(columns="low"), "low"),
        (lambda b: b[["timestamp", "high", "open", "low", "close", "volume"]], "in this order"),
    ],
)
def test_each_broken_rule_is_refused_by_name(change: Callable[[pd.DataFrame], pd.DataFrame], rule: str) -> None:
    """Every rule fails alone, and the message names it with the series and the window."""
    with pytest.raises(DataError, match=rule) as caught:
        validate_bars(change(minute_bars()), AAPL_1M, Window.from_epoch(T0, T0 + 180))
    assert caught.value.doing.startswith("checking bars of AAPL 1m 2024-01-02T14:30:00Z")


def test_all_broken_rules_are_listed_at_once_with_their_rows() -> None:
    """The error has each failing rule and each invalid row as text."""
    bars = minute_bars(5)
    bars.loc[1, "volume"] = -7.0
    bars.loc[3, "high"] = 1.0
    with pytest.raises(DataError) as caught:
        validate_bars(bars, AAPL_1M)
    assert "volume is negative" in str(caught.value)
    assert "high is below" in str(caught.value)
    assert "-7.0" in caught.value.rows
    assert "14:33" in caught.value.rows
    assert "14:32" not in caught.value.rows


@pytest.mark.parametrize(
    ("timeframe", "good", "bad"),
    [
        ("1s", ["09:30:01"], []),
        ("5s", ["09:30:05"], ["09:30:01"]),
        ("30s", ["09:30:30"], ["09:30:10"]),
        ("1m", ["09:31:00"], ["09:30:30"]),
        ("2m", ["09:32:00", "17:15:00"], ["09:30:30"]),
        ("3m", ["09:33:00", "09:31:00"], ["09:30:30"]),
        ("5m", ["09:35:00"], ["09:31:00"]),
        ("10m", ["09:30:00", "17:15:00"], ["09:31:00"]),
        ("20m", ["09:40:00", "17:15:00"], ["09:31:00"]),
        ("15m", ["09:45:00"], ["09:35:00"]),
        ("1h", ["09:30:00", "10:00:00", "17:15:00"], ["09:35:00", "10:00:01"]),
        ("8h", ["17:15:00", "16:00:00"], ["17:16:00"]),
        ("1d", ["00:00:00"], ["09:30:00", "00:00:01"]),
        ("1w", ["00:00:00"], ["12:00:00"]),
        ("1mo", ["00:00:00"], ["12:00:00"]),
    ],
)
def test_the_grid_of_each_timeframe(timeframe: str, good: list[str], bad: list[str]) -> None:
    """Session opens off the hour are valid where IB sends them; a shifted stamp is not."""
    series = Series(stock("AAPL"), parse_timeframe(timeframe))
    one = [1.0]
    for clock in good + bad:
        open_s = int(pd.Timestamp(f"2024-01-02T{clock}Z").timestamp())
        bars = bars_from_columns([open_s], one, one, one, one, one)
        if clock in good:
            validate_bars(bars, series)
        else:
            with pytest.raises(DataError, match="grid"):
                validate_bars(bars, series)


def test_only_futures_and_indices_may_trade_below_zero() -> None:
    """Crude oil settled at -37.63 on 2020-04-20; a stock at zero is an error."""
    day = bars_from_columns([1_587_340_800], [17.73], [17.85], [-40.32], [-37.63], [1.0])
    validate_bars(day, OIL_1D)
    with pytest.raises(DataError, match="not positive"):
        validate_bars(day, AAPL_1D)
    assert bar_schema(OIL_1D.timeframe, allow_nonpositive=True) is bar_schema(OIL_1D.timeframe, allow_nonpositive=True)


def test_a_futures_session_may_open_at_ten_past() -> None:
    """Eurex opens at 01:10 Frankfurt: a valid hourly stamp for a future, an invalid one for a stock."""
    opens_s = [int(pd.Timestamp("2024-01-02T00:10:00Z").timestamp())]
    bars = bars_from_columns(opens_s, [1.0], [1.0], [1.0], [1.0], [1.0])
    validate_bars(bars, Series(Instrument("FDAX", "FUT", "EUREX", "EUR"), parse_timeframe("1h")))
    with pytest.raises(DataError, match="grid"):
        validate_bars(bars, AAPL_1H)


# ---------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_cut_to_the_half_open_window() -> None:
    """The bar at the window's start stays, the one at its end is dropped."""
    answer = normalise(answer_of(minute_bars(5)), AAPL_1M, Window.from_epoch(T0 + 60, T0 + 180), T0 + 10_000)
    assert opens_of(answer.bars).tolist() == [T0 + 60, T0 + 120]
    assert not answer.volume_missing


@pytest.mark.parametrize(("now_s", "kept"), [(T0 + 180, 3), (T0 + 179.999, 2), (T0 + 120, 2), (T0, 0)])
def test_the_forming_bar_is_dropped_until_it_has_closed(now_s: float, kept: int) -> None:
    """A bar counts from the second of its close, not before; an answer of forming bars alone is empty."""
    answer = normalise(answer_of(minute_bars(3)), AAPL_1M, Window.from_epoch(T0, T0 + 600), now_s)
    assert len(answer.bars) == kept


def test_a_short_bar_is_complete_at_its_own_close() -> None:
    """A half-hour bar at 09:30 is complete at 10:00; without a calendar every bar has the full length."""
    half, full = T0, T0 + 1800
    raw, window = flat_answer([half, full], [1.0, 1.0]), Window.from_epoch(T0, T0 + 7200)
    assert normalise(raw, AAPL_1H, window, full).bars.empty
    answer = normalise_answer(raw, AAPL_1H, window, now_s=full, closes_s=np.array([full, full + 3600]))
    assert opens_of(answer.bars).tolist() == [half]


def test_a_daily_bar_without_a_calendar_waits_for_the_latest_session_end() -> None:
    """US extended hours end at 01:00 UTC of the next day: midnight is too early."""
    day_s = 1_704_153_600  # 2024-01-02
    raw, window = flat_answer([day_s], [1.0]), Window.from_epoch(day_s, day_s + 86400)
    assert normalise(raw, AAPL_1D, window, day_s + 86400).bars.empty
    assert len(normalise(raw, AAPL_1D, window, day_s + 86400 + 6 * 3600).bars) == 1


def test_disorder_and_equal_duplicates_are_repaired() -> None:
    """Rows in any order, equal ones repeated: the same bars come out."""
    bars = minute_bars(3)
    answer = normalise(answer_of(bars.iloc[[2, 0, 1, 0]]), AAPL_1M, Window.from_epoch(T0, T0 + 600), T0 + 10_000)
    pd.testing.assert_frame_equal(answer.bars, bars)


def test_two_different_bars_with_one_stamp_are_refused_with_both_rows() -> None:
    """Which one is right is unknown, so the whole window is refused, and the error shows both."""
    bars = pd.concat([minute_bars(3), minute_bars(1).assign(close=100.25)], ignore_index=True)
    with pytest.raises(DataError, match="two different bars") as caught:
        normalise(answer_of(bars), AAPL_1M, Window.from_epoch(T0, T0 + 600), T0 + 10_000)
    assert "100.25" in caught.value.rows
    assert caught.value.rows.count("14:30") == 2


def test_a_missing_volume_becomes_zero_and_is_flagged() -> None:
    """IB's -1 means "none": 0 in the file, and ``volume_missing`` is set."""
    raw = replace(answer_of(minute_bars(2)), volume=np.array([-1.0, -1.0]))
    answer = normalise(raw, AAPL_1M, Window.from_epoch(T0, T0 + 600), T0 + 10_000)
    assert answer.bars["volume"].tolist() == [0.0, 0.0]
    assert answer.volume_missing


@pytest.mark.parametrize("mark", [2.0**31 - 1, 2.0**63 - 1, 2.0**127 - 1, 1.7976931348623157e308])
def test_marks_for_a_volume_that_is_not_set_are_none_where_none_is_expected(mark: float) -> None:
    """Forex has no volume: every such mark is 0 in the file. A share with such a mark is refused."""
    raw = replace(answer_of(minute_bars(2)), volume=np.array([mark, 0.0]))
    span = Window.from_epoch(T0, T0 + 600)
    answer = normalise(raw, Series(forex("EURUSD"), parse_timeframe("1m")), span, T0 + 10_000)
    assert answer.bars["volume"].tolist() == [0.0, 0.0]
    assert answer.volume_missing
    with pytest.raises(DataError, match="mark"):
        validate_bars(normalise(raw, AAPL_1M, span, T0 + 10_000).bars, AAPL_1M)


@pytest.mark.parametrize("name", COLUMNS[1:])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -2.0])
def test_values_that_are_no_numbers_fail_the_whole_window(name: str, value: float) -> None:
    """NaN passes naive comparisons; here it never passes."""
    raw = answer_of(minute_bars(3))
    getattr(raw, name)[1] = value
    answer = normalise(raw, AAPL_1M, Window.from_epoch(T0, T0 + 600), T0 + 10_000)
    with pytest.raises(DataError):
        validate_bars(answer.bars, AAPL_1M)


def test_a_stamp_after_the_year_9999_is_refused() -> None:
    """Also outside of the window: such an answer is not one of bars."""
    with pytest.raises(DataError, match="9999"):
        normalise(flat_answer([T0, 253_402_300_800], [1.0, 1.0]), AAPL_1M, Window.from_epoch(T0, T0 + 600), T0 + 10_000)


def test_an_empty_answer_is_an_empty_table() -> None:
    """No rows are no bars, in the usual shape."""
    answer = normalise(RawBars.nothing(""), EURUSD_1H, Window.from_epoch(T0, T0 + 600), T0)
    pd.testing.assert_frame_equal(answer.bars, empty_bars())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    minutes=st.lists(st.integers(-20, 60), max_size=40),
    start=st.integers(-10, 40),
    length=st.integers(0, 40),
    now=st.integers(-10 * 60, 70 * 60),
)
def test_exactly_the_complete_bars_of_the_window_are_kept(
    minutes: list[int], start: int, length: int, now: int
) -> None:
    """For any answer: each bar inside and complete once, nothing else."""
    opens_s = [T0 + 60 * m for m in minutes]
    window = Window.from_epoch(T0 + 60 * start, T0 + 60 * (start + length))
    answer = normalise(flat_answer(opens_s, [float(100 + m) for m in minutes]), AAPL_1M, window, T0 + now)
    expected = sorted({o for o in opens_s if window.start_s <= o < window.end_s and o + 60 <= T0 + now})
    assert opens_of(answer.bars).tolist() == expected


def test_a_session_may_open_off_the_grid_where_the_calendar_has_it() -> None:
    """New York opened at 09:32 on 27 December 2006; on any other day that hourly stamp is invalid."""
    hourly = Series(stock("AAPL"), parse_timeframe("1h"))
    for day, fits in (("2006-12-27", True), ("2006-12-28", False)):
        bars = bars_from_columns(
            np.array([np.datetime64(f"{day}T14:32:00", "s").astype(np.int64)]), *(np.ones(1) for _ in range(5))
        )
        if fits:
            validate_bars(bars, hourly)
        else:
            with pytest.raises(DataError, match="grid"):
                validate_bars(bars, hourly)
