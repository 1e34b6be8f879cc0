"""The table of timeframes: names, limits of requests and retention."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits, parse_timeframe
from ktrdr_pipelines.errors import InputError

NOW = datetime(2024, 7, 1, 15, 30, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "7m", "1H", "1h ", "x" * 500])
def test_unknown_timeframes_are_input_errors_that_list_the_valid_ones(text: str) -> None:
    """The advice names every timeframe; a long text is cut."""
    with pytest.raises(InputError) as caught:
        parse_timeframe(text)
    assert all(name in caught.value.advice for name in TIMEFRAMES)
    assert len(caught.value.observed) < 100


def test_rows_are_sorted_and_only_short_bars_have_retention() -> None:
    """Bars of 30 seconds and less start at a midnight within the last 183 days; all others have no limit."""
    seconds = [timeframe.seconds for timeframe in TIMEFRAMES.values()]
    assert seconds == sorted(seconds)
    for timeframe in TIMEFRAMES.values():
        start = timeframe.retained_from(NOW)
        if timeframe.seconds > 30:
            assert start is None
        else:
            assert start == datetime(2024, 1, 1, tzinfo=UTC)
            assert timedelta(days=182) <= NOW - start <= timedelta(days=183)


def test_the_limits_are_the_specifications_or_ibs_present_ones() -> None:
    """Hourly bars: a month a request, or a year."""
    hourly = TIMEFRAMES["1h"]
    assert str(hourly.longest_request(HistoryLimits.CLASSIC)) == "1 M"
    assert str(hourly.longest_request(HistoryLimits.CURRENT)) == "12 M"
