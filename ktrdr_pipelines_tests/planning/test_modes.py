"""What the modes mean, and how users write times."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_pipelines.domain.instruments import Series, file_symbol, forex, stock, symbol_from_file
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import partition_at, partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window, parse_instant, parse_range
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits, parse_timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.planning.modes import Held, begins_with_history, reach_back, resolve_window
from ktrdr_pipelines_tests.fakes import utc, window

AAPL_1D = Series(stock("AAPL"), TIMEFRAMES["1d"])
HELD = Held(utc("2023-01-03"), utc("2024-05-31"))
NOW = utc("2024-06-15T12:00:00")


def resolve(mode: Mode, held: Held | None, *, start: str = "", end: str = "", oldest: datetime | None = None) -> Window:
    """The window of a request for AAPL 1d at `NOW`."""
    request = LoadRequest.parse("AAPL", "1d", mode, start=start or None, end=end or None)
    return resolve_window(request, held, until=NOW, oldest=oldest)


def test_tail_goes_from_the_last_held_bar_to_now() -> None:
    """The last held bar is part of the window, so that it is checked again."""
    assert resolve(Mode.TAIL, HELD) == Window(HELD.last, NOW)


def test_backfill_is_one_longest_request_before_the_first_held_bar() -> None:
    """A year of daily bars; with a start it reaches back to that."""
    oldest = reach_back(AAPL_1D, HELD, now=NOW, limits=HistoryLimits.CLASSIC)
    found = resolve(Mode.BACKFILL, HELD, oldest=oldest)
    assert found.end == HELD.first
    assert 360 <= (found.end - found.start).days <= 370
    assert resolve(Mode.BACKFILL, HELD, start="2010-01-01") == Window(utc("2010-01-01"), HELD.first)


def test_full_covers_all_from_the_start_of_history() -> None:
    """Inner gaps included; a given start or end wins."""
    start = utc("2000-01-01")
    assert resolve(Mode.FULL, HELD, oldest=start) == Window(start, NOW)
    assert resolve(Mode.FULL, HELD, start="2022-01-01", end="2023-01-01") == window("2022-01-01", "2023-01-01")


@pytest.mark.parametrize("mode", list(Mode))
def test_without_a_csv_every_mode_is_a_full_initialisation(mode: Mode) -> None:
    """There is no tail of nothing."""
    start = utc("2000-01-01")
    assert begins_with_history(LoadRequest("AAPL", TIMEFRAMES["1d"], mode), None)
    assert resolve(mode, None, oldest=start) == Window(start, NOW)


def test_an_end_in_the_future_is_now() -> None:
    """Nothing is asked that cannot exist."""
    assert resolve(Mode.TAIL, HELD, end="2030-01-01").end == NOW


def test_nothing_to_load_is_an_empty_window() -> None:
    """A backfill that ends before it begins asks for nothing."""
    assert resolve(Mode.BACKFILL, HELD, start="2024-01-01").is_empty


def test_a_mode_narrows_chosen_partitions() -> None:
    """Tail: from the last held bar on. Backfill: up to the first. Full, or nothing held: all of them."""

    def narrow(mode: Mode, chosen: Window, held: Held | None) -> Window:
        request = LoadRequest("AAPL", TIMEFRAMES["1d"], mode)
        return resolve_window(request, held, until=chosen.end, oldest=chosen.start)

    chosen = window("2022-01-01", "2025-01-01")
    assert narrow(Mode.TAIL, chosen, HELD) == Window(HELD.last, chosen.end)
    assert narrow(Mode.BACKFILL, chosen, HELD) == Window(chosen.start, HELD.first)
    assert narrow(Mode.FULL, chosen, HELD) == chosen
    assert narrow(Mode.TAIL, chosen, None) == chosen
    assert narrow(Mode.TAIL, window("2022-01-01", "2023-01-01"), HELD).is_empty
    assert narrow(Mode.BACKFILL, window("2024-01-01", "2025-01-01"), HELD).is_empty


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2024-03-05", datetime(2024, 3, 5, tzinfo=UTC)),
        ("2024-03-05T14:30:00Z", datetime(2024, 3, 5, 14, 30, tzinfo=UTC)),
        ("2024-03-05 14:30", datetime(2024, 3, 5, 14, 30, tzinfo=UTC)),
        ("2024-03-05T14:30:00+02:00", datetime(2024, 3, 5, 12, 30, tzinfo=UTC)),
    ],
)
def test_times_are_iso_8601_and_utc_unless_they_say_otherwise(text: str, instant: datetime) -> None:
    """A bare date is its midnight UTC."""
    assert parse_instant(text, "start") == instant


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2024-13-01", "2024-02-30", "05/03/2024", "1969-12-31", "9999-01-01", "2024"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    """One clear error, never a guess."""
    with pytest.raises(InputError):
        parse_instant(text, "start")


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    """Equal ends hold nothing and are refused too."""
    for start, end in (("2024-02-01", "2024-01-01"), ("2024-02-01", "2024-02-01")):
        with pytest.raises(InputError, match="not before"):
            parse_range(start, end)


@given(st.text(st.sampled_from("ABZ09 .&/+'-_x2E"), max_size=12))
def test_a_symbol_comes_back_from_its_file_name(symbol: str) -> None:
    """Every symbol that is accepted is read back from its file name, which is a safe one."""
    try:
        name = file_symbol(symbol)
    except InputError:
        return
    assert symbol_from_file(name) == symbol
    assert name.replace("_", "").isalnum()


def test_file_names_look_as_documented() -> None:
    """The examples of the README."""
    assert file_symbol("BRK B") == "BRK_B"
    assert file_symbol("EUR.USD") == "EUR_2E_USD"
    assert forex("eur.usd").symbol == "EURUSD"


def test_a_month_and_a_minute_are_never_one_file() -> None:
    """1M is accepted and becomes 1mo."""
    assert parse_timeframe("1M").name == "1mo"
    assert parse_timeframe("1m").name == "1m"


@given(st.sampled_from(list(TIMEFRAMES.values())), st.datetimes(datetime(1980, 1, 1), datetime(2060, 1, 1)))  # noqa: DTZ001
def test_partitions_tile_time(timeframe: object, moment: datetime) -> None:
    """Every instant lies in exactly one partition, whose key leads back to it, and neighbours touch."""
    instant = moment.replace(tzinfo=UTC)
    found = partition_at(timeframe, instant)  # type: ignore[arg-type]
    assert found.window.contains(instant)
    assert partition_from_key(timeframe, found.key) == found  # type: ignore[arg-type]
    after = partition_at(timeframe, found.window.end)  # type: ignore[arg-type]
    assert after.window.start == found.window.end
    both = list(partitions_in(timeframe, Window(found.window.start, after.window.end)))  # type: ignore[arg-type]
    assert both == [found, after]


@pytest.mark.parametrize("key", ["2024-03-02", "2024-03-03", "2024", "March", "2024-02-31"])
def test_a_key_that_is_not_on_the_grid_is_refused(key: str) -> None:
    """Saturdays and Sundays are no partitions of minutes."""
    with pytest.raises(InputError):
        partition_from_key(TIMEFRAMES["1m"], key)
