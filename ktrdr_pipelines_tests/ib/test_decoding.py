"""Bars of a message as columns: the same values as the library reads, and nothing where a stamp would have to be guessed."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.ib.wire.decoding import SentBars, columns_from_bars, read_bars_message
from ktrdr_pipelines.ib.wire.library import load_library
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY
from ktrdr_pipelines_tests.ib.scripted_gateway import BAR, bars


def test_a_trailing_empty_field_is_no_bar() -> None:
    """Nothing behind the bars is nothing, even if it is spelled out."""
    assert len(read_bars_message([str(field) for field in (*bars(1, BAR), "")])) == 1


asyncio.set_event_loop(asyncio.new_event_loop())  # the library asks for one when it is imported
PARTS = load_library(LIBRARY)
PARSE_TIME = PARTS.parse_time


def stamped(*texts: str) -> SentBars:
    return read_bars_message([str(field) for field in bars(1, *((text, *BAR[1:]) for text in texts))])


@pytest.mark.parametrize(
    ("stamp", "intraday"),
    [
        ("20240301  14:30:00", True),  # no zone
        ("20240301 00:00:00", False),
        ("20240301", True),
        ("1709303400", False),
        ("20240301 00:00:00 America/New_York", False),
        ("20240301 14:30:00 No/Where", True),
        ("20241301", False),
        ("999999999999", True),
    ],
)
def test_stamps_that_would_have_to_be_guessed_are_refused(stamp: str, intraday: bool) -> None:
    """Naive stamps, dates for intraday bars, times of day for daily ones, dates and zones that do not exist."""
    with pytest.raises(DataError):
        columns_from_bars(stamped(stamp), PARSE_TIME, intraday=intraday)


@pytest.mark.parametrize("stamp", ["", "2024-03-01", "1709303400.5", "20240301 9:30:00", "20240301T09:30:00", "٣"])
def test_a_stamp_of_no_known_form_fails_the_message(stamp: str) -> None:
    """Fractions of a second, ISO dates, other scripts' digits."""
    with pytest.raises(ValueError, match="no date"):
        stamped(stamp)


def test_columns_keep_order_and_repeats() -> None:
    """Nothing is sorted, cut or dropped here, and any zone is turned into UTC."""
    columns = columns_from_bars(
        stamped("1709305200", "20240301 09:00:00 America/New_York", "1709305200"), PARSE_TIME, intraday=True
    )
    assert columns.opens_s.tolist() == [1709305200, 1709301600, 1709305200]
    assert columns.opens_s.dtype == np.int64
    assert columns_from_bars(stamped("20240301"), PARSE_TIME, intraday=False).opens_s.tolist() == [1709251200]
    assert len(columns_from_bars(stamped(), PARSE_TIME, intraday=True)) == 0


NUMBERS = st.one_of(
    st.floats().map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["", "1_0", " 1", "1e", "nan", "Infinity", "0x1", "1.7976931348623157E308", "٣", "-1", "1.5"]),
)


@settings(max_examples=300)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 10**12).map(str), st.sampled_from(["20240301", "20240301 09:30:00 Asia/Tokyo"])),
            *[NUMBERS] * 7,
        ),
        max_size=4,
    ),
    intraday=st.booleans(),
)
def test_bars_are_read_as_the_library_reads_them(rows: list[tuple[str, ...]], intraday: bool) -> None:
    """Against the library's decoder and stamps, bar by bar: the same values, and no error that it does not have, but for texts
    that only Python takes for numbers."""
    fields = [str(field) for field in bars(1, *rows)]
    theirs: list[Any] = []
    ends: list[int] = []
    wrapper = SimpleNamespace(
        historicalData=lambda _, bar: theirs.append(bar), historicalDataEnd=lambda *end: ends.append(end[0])
    )
    PARTS.decoder(wrapper, 176).interpret(fields)
    try:
        sent = read_bars_message(fields)
    except ValueError:
        assert not ends or any(re.search("[^0-9A-Za-z+.-]", number) for row in rows for number in row[1:])
        return
    assert ends == [1]
    for name in ("open", "high", "low", "close", "volume"):
        assert np.array_equal(getattr(sent, name), [getattr(bar, name) for bar in theirs], equal_nan=True)
    try:
        opens_s = columns_from_bars(sent, PARSE_TIME, intraday=intraday).opens_s
    except DataError:
        assert any(is_refused(bar.date, intraday) for bar in theirs)
        return
    assert opens_s.tolist() == [instant_of(bar.date) for bar in theirs]


def instant_of(text: str) -> float:
    stamp = PARSE_TIME(text)
    if not isinstance(stamp, datetime):
        stamp = datetime(stamp.year, stamp.month, stamp.day, tzinfo=UTC)
    return stamp.timestamp()


def is_refused(text: str, intraday: bool) -> bool:
    """By the rules of the docstring, from the library's reading."""
    try:
        stamp = PARSE_TIME(text)
    except (ValueError, LookupError, OverflowError, OSError):
        return True
    if not isinstance(stamp, datetime):
        return intraday
    return stamp.tzinfo is None or (not intraday and stamp.timestamp() % 86400 != 0)
