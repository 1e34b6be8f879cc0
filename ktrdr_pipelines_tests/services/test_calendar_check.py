"""Promises of IB's schedule as a correction of a calendar: what it adds counts at once, what it takes away on two answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.calendars import (
    CalendarKey,
    Session,
    correct,
    expected_bars,
    installed_table,
    session_windows,
    table_of,
    use_corrections,
)
from ktrdr_pipelines.cli.tables import describe_calendar_check
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import DataError, InputError, StoreError, TransientError
from ktrdr_pipelines.ib.trading_schedule import read_schedule
from ktrdr_pipelines.services.calendar_check import check_calendar, compare_with_ib
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import CorrectedSession, open_store, refresh_calendars, save_corrections
from ktrdr_pipelines_tests.conftest import Ktrdr, StartGateway
from ktrdr_pipelines_tests.fakes import utc, window

AAPL = stock("AAPL")
NOW = utc("2024-12-31T12:00")
DAY_S = 86400


@pytest.fixture(autouse=True)
def calendars_as_installed() -> Iterator[None]:
    """Corrections are the process's: none is left for other tests."""
    yield
    use_corrections({})


def sessions_of(instrument: Instrument, span: Window) -> dict[int, Session]:
    """What IB would say if it agreed with the installed calendar."""
    table = installed_table(instrument)
    found: dict[int, Session] = {}
    for i in np.flatnonzero((table.dates >= span.start_s) & (table.dates < span.end_s)):
        mine = table.session_ids == i
        segments = tuple(zip(table.starts[mine].tolist(), table.ends[mine].tolist(), strict=True))
        found[int(table.dates[i])] = Session(int(table.dates[i]), segments, "US/Eastern")
    return found


@dataclass
class FakeSchedules:
    """Answers from ``truth`` as IB does; ``spoil``: what to do with the n-th answer (from 1)."""

    truth: dict[int, Session]
    spoil: dict[int, Callable[[list[Session]], list[Session]]] = field(default_factory=dict)
    asked: list[tuple[datetime, int]] = field(default_factory=list)

    def fetch_schedule(self, instrument: Instrument, *, end: datetime, days: int) -> list[Session]:
        self.asked.append((end, days))
        known = [s for _, s in sorted(self.truth.items()) if s.segments and s.segments[0][0] < end.timestamp()]
        return self.spoil.get(len(self.asked), list)(known[-days:])


def date_s(day: str) -> int:
    return int(utc(day).timestamp())


YEAR = window("2024-01-01", "2024-12-31")


def test_a_schedule_that_agrees_is_one_request_a_year_and_changes_nothing() -> None:
    fake = FakeSchedules(sessions_of(AAPL, window("2020-01-01", "2025-01-01")))
    check = compare_with_ib(fake, AAPL, YEAR, now=NOW)
    assert (check.differences, check.unconfirmed, len(fake.asked)) == ([], [], 1)
    assert check.sessions == 251  # 252 sessions of 2024 without its last day
    assert compare_with_ib(fake, AAPL, window("2021-01-01", "2024-12-31"), now=NOW).sessions == 252 + 251 + 250 + 251


def test_what_ib_adds_counts_on_one_answer() -> None:
    """A session on a holiday, and a longer one on a half day: more bars are expected, none can be lost."""
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    labor_day, half_day = date_s("2024-09-02"), date_s("2024-07-03")
    truth[labor_day] = Session(labor_day, ((labor_day + 48600, labor_day + 72000),), "US/Eastern")
    longer = truth[half_day].segments[0][0]
    truth[half_day] = Session(half_day, ((longer, longer + 23400),), "US/Eastern")
    fake = FakeSchedules(truth)
    check = compare_with_ib(fake, AAPL, YEAR, now=NOW)
    assert [(d.kind, d.session.date_s) for d in check.differences] == [("changed", half_day), ("added", labor_day)]
    assert len(fake.asked) == 1


def test_a_session_is_given_up_only_when_a_second_shape_of_the_question_agrees() -> None:
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    closed = date_s("2024-06-12")
    del truth[closed]
    fake = FakeSchedules(truth)
    check = compare_with_ib(fake, AAPL, YEAR, now=NOW)
    assert [(d.kind, d.session.date_s) for d in check.differences] == [("removed", closed)]
    assert len(fake.asked) == len(set(fake.asked)) == 2


def test_a_hole_in_a_schedule_closes_no_market() -> None:
    """A fortnight is missing in the middle of the first answer, the second has it: the calendar stays."""
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    cut = {1: lambda answer: [*answer[:-110], *answer[-100:]]}
    check = compare_with_ib(FakeSchedules(truth, cut), AAPL, YEAR, now=NOW)
    assert check.differences == []
    assert len(check.unconfirmed) == 10


def test_a_shorter_session_needs_two_answers_too() -> None:
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    day = date_s("2024-06-12")
    right = truth[day]
    early = replace(right, segments=((right.segments[0][0], right.segments[0][1] - 7200),))
    shorten = {1: lambda answer: [early if s.date_s == day else s for s in answer]}
    assert compare_with_ib(FakeSchedules(truth, shorten), AAPL, YEAR, now=NOW).differences == []
    both = shorten | {2: shorten[1]}
    assert len(compare_with_ib(FakeSchedules(truth, both), AAPL, YEAR, now=NOW).differences) == 1


def test_a_gateway_that_sends_few_sessions_at_a_time_is_asked_on_by_what_arrived() -> None:
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    few = dict.fromkeys(range(1, 99), lambda answer: answer[-60:])
    fake = FakeSchedules(truth, few)
    check = compare_with_ib(fake, AAPL, YEAR, now=NOW)
    assert (check.sessions, check.differences, check.unconfirmed) == (251, [], [])
    assert len(fake.asked) == 5


def test_a_schedule_that_begins_late_says_so_and_takes_nothing_from_the_time_before() -> None:
    truth = sessions_of(AAPL, window("2024-06-03", "2025-01-01"))
    check = compare_with_ib(FakeSchedules(truth), AAPL, YEAR, now=NOW)
    assert (check.span.start, check.differences) == (utc("2024-06-03"), [])
    assert check.notices == ["IB's schedule reaches back to 2024-06-03 only"]


def test_another_calendar_is_refused_instead_of_applied() -> None:
    truth = {
        at: replace(s, segments=tuple((a + 3600, b + 3600) for a, b in s.segments))
        for at, s in sessions_of(AAPL, YEAR).items()
    }
    with pytest.raises(DataError, match="differ in 251 of 251 sessions"):
        compare_with_ib(FakeSchedules(truth), AAPL, YEAR, now=NOW)


def test_an_empty_schedule_proves_nothing() -> None:
    with pytest.raises(TransientError, match="without a session"):
        compare_with_ib(FakeSchedules({}), AAPL, YEAR, now=NOW)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_times_of_a_schedule_are_the_exchanges_own_in_summer_and_in_winter() -> None:
    rows = [
        ("20240709-09:30:00", "20240709-16:00:00", "20240709"),
        ("20240108-09:30:00", "20240108-16:00:00", "20240108"),
    ]
    winter, summer = read_schedule("US/Eastern", rows)
    assert winter.segments == ((int(utc("2024-01-08T14:30").timestamp()), int(utc("2024-01-08T21:00").timestamp())),)
    assert summer.segments == ((int(utc("2024-07-09T13:30").timestamp()), int(utc("2024-07-09T20:00").timestamp())),)


def test_two_rows_of_one_date_are_the_parts_of_one_session() -> None:
    rows = [
        ("20240108-12:30:00", "20240108-15:00:00", "20240108"),
        ("20240108-09:00:00", "20240108-11:30:00", "20240108"),
    ]
    (session,) = read_schedule("Japan", rows)
    assert [(b - a) // 60 for a, b in session.segments] == [150, 150]


@pytest.mark.parametrize(
    ("zone", "row", "words"),
    [
        ("Nowhere/Land", ("20240108-09:00:00", "20240108-11:30:00", "20240108"), "time zone"),
        ("../etc/passwd", ("20240108-09:00:00", "20240108-11:30:00", "20240108"), "time zone"),
        ("Japan", ("20240230-09:00:00", "20240108-11:30:00", "20240108"), "cannot be read"),
        ("Japan", ("20240108-09:00:00", "20240108-09:00:00", "20240108"), "ends before"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_a_clear_error(zone: str, row: tuple[str, str, str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_schedule(zone, [row])


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_a_correction_counts_for_every_instrument_of_the_calendar_until_its_file_is_deleted(tmp_path: Path) -> None:
    day = date_s("2024-06-12")
    key = CalendarKey.of(AAPL)
    closed = CorrectedSession.of(Session(day, (), "US/Eastern"), symbol="AAPL", asked_at=NOW, source="paper")
    june = window("2024-06-12", "2024-06-13")
    path = save_corrections(tmp_path, key, [closed.date], [closed])
    for instrument in (AAPL, stock("MSFT")):
        assert len(expected_bars(Series(instrument, TIMEFRAMES["1h"]), june)) == 0
        assert len(expected_bars(Series(instrument, TIMEFRAMES["1d"]), june)) == 0
    assert session_windows(forex("EURUSD"), june) != []
    use_corrections({})  # another process begins without them
    assert len(expected_bars(Series(AAPL, TIMEFRAMES["1h"]), june)) == 7
    open_store(tmp_path / "elsewhere")
    open_store(tmp_path)
    assert len(expected_bars(Series(AAPL, TIMEFRAMES["1h"]), june)) == 0
    path.unlink()
    refresh_calendars(tmp_path)
    assert len(expected_bars(Series(AAPL, TIMEFRAMES["1h"]), june)) == 7


def test_a_later_comparison_replaces_what_it_compared_and_keeps_the_rest(tmp_path: Path) -> None:
    key = CalendarKey.of(AAPL)
    first, second = (
        CorrectedSession.of(Session(date_s(day), (), "US/Eastern"), symbol="AAPL", asked_at=NOW, source="paper")
        for day in ("2024-06-12", "2024-07-10")
    )
    save_corrections(tmp_path, key, [first.date, second.date], [first, second])
    path = save_corrections(tmp_path, key, [first.date], [])
    assert [row["date"] for row in json.loads(path.read_text())["sessions"]] == ["2024-07-10"]


@pytest.mark.parametrize("content", ["", "[]", '{"version": 2}', '{"version": 1, "calendar": "NYSE", "hours": "half"}'])
def test_a_file_of_corrections_that_cannot_be_read_stops_with_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "calendars").mkdir()
    (tmp_path / "calendars" / "NYSE_regular.json").write_text(content)
    with pytest.raises(StoreError, match=r"NYSE_regular\.json holds no corrections"):
        open_store(tmp_path)


def test_a_corrected_table_equals_one_that_was_built_so() -> None:
    """Taking a session out and putting it back changes nothing, in a calendar with a lunch break too."""
    for instrument in (AAPL, stock("7203", exchange="TSEJ", currency="JPY"), forex("EURUSD")):
        table = installed_table(instrument)
        at = int(np.searchsorted(table.dates, date_s("2024-06-12")))
        mine = table.session_ids == at
        zone = "Japan" if instrument.symbol == "7203" else "US/Eastern"
        segments = tuple(zip(table.starts[mine].tolist(), table.ends[mine].tolist(), strict=True))
        day = int(table.dates[at])
        without = correct(table, [Session(day, (), zone)])
        assert len(without.dates) == len(table.dates) - 1
        again = correct(without, [Session(day, segments, zone)])
        for name in ("dates", "opens", "closes", "starts", "ends", "session_ids", "offsets"):
            assert np.array_equal(getattr(again, name), getattr(table, name)), (instrument.symbol, name)


def test_sessions_that_would_overlap_are_refused() -> None:
    day = date_s("2024-06-12")
    with pytest.raises(DataError, match="overlap"):
        correct(table_of(AAPL), [Session(day, ((day, day + 3 * DAY_S),), "US/Eastern")])


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_the_simulators_nyse_is_ours_and_the_request_is_counted(
    start_gateway: StartGateway, make_settings: Callable[..., Settings]
) -> None:
    """The simulator makes its sessions without our calendars; two years are three requests that pacing sees."""
    gateway = start_gateway()
    settings = make_settings(gateway.port)
    check = check_calendar("AAPL", start="2022-01-01", end="2024-01-01", settings=settings)
    assert (check.differences, check.unconfirmed) == ([], [])
    assert check.sessions == 501
    logged = [entry.kind for entry in gateway.requests]
    assert logged == ["schedule"] * check.requests
    assert check.requests in (2, 3)


@pytest.mark.slow
def test_the_command_compares_and_applies(
    ktrdr: Ktrdr, start_gateway: StartGateway, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """The simulated future trades on holidays, which its calendar does not: IB's word counts once it is applied."""
    gateway = start_gateway()
    universe = tmp_path / "universe.yaml"
    universe.write_text(
        "series:\n  - {symbol: ESZ4, ib_symbol: ES, sec_type: FUT, exchange: CME, currency: USD, expiry: '202412', "
        "timeframes: [1d]}\n"
    )
    span = window("2024-03-20", "2024-04-10")
    asked = ("calendar", "ESZ4", "--start", "2024-03-20", "--end", "2024-04-10")
    settings = make_settings(gateway.port, universe_file=universe)
    shown = check_calendar("ESZ4", start="2024-03-20", end="2024-04-09", settings=settings)  # no identical request
    good_friday = date_s("2024-03-29")
    assert [(d.kind, d.session.date_s) for d in shown.differences] == [("changed", good_friday)]
    assert not (tmp_path / "data" / "calendars").exists()
    hourly = Series(shown.instrument, TIMEFRAMES["1h"])
    before = expected_bars(hourly, span).opens
    applied = ktrdr(*asked, "--apply", port=gateway.port, KTRDR_UNIVERSE=str(universe))
    assert applied.returncode == 0, applied.stderr
    assert "2024-03-29: 28 22:00..13:15 by the calendar, 28 22:00..21:00 by IB" in applied.stdout
    assert f"1 session corrected, in {settings.data_dir / 'calendars'}" in applied.stdout
    open_store(settings.data_dir)
    after = expected_bars(hourly, span).opens
    assert set(before.tolist()) < set(after.tolist())
    assert (
        len(after) == len(before) + 7
    )  # 14:00 to 20:00 UTC; the quarter hour before 13:15 is the first of 13:00's bar


def test_an_empty_window_and_an_unknown_symbol_are_refused_before_ib_is_asked(
    unused_port: int, make_settings: Callable[..., Settings]
) -> None:
    with pytest.raises(InputError):
        check_calendar("AAPL", start="2024-01-01", end="2024-01-01", settings=make_settings(unused_port))
    with pytest.raises(InputError, match="not in the universe"):
        check_calendar("NOSUCH", settings=make_settings(unused_port))
    with pytest.raises(InputError):
        check_calendar("AAPL", start=str(datetime.now(UTC) + timedelta(days=2)), settings=make_settings(unused_port))


def test_what_was_applied_is_shown_as_such(tmp_path: Path) -> None:
    """Comparing again says which differences count already, and which correction IB has taken back since."""
    truth = sessions_of(AAPL, window("2023-01-01", "2025-01-01"))
    labor_day, christmas = date_s("2024-09-02"), date_s("2024-12-25")
    added = {day: Session(day, ((day + 48600, day + 72000),), "US/Eastern") for day in (labor_day, christmas)}
    first = compare_with_ib(FakeSchedules(truth | {labor_day: added[labor_day]}), AAPL, YEAR, now=NOW)
    *_, difference, advice = describe_calendar_check(first)
    assert "2024-09-02: closed by the calendar, 02 13:30..20:00 by IB" in difference
    assert "--apply" in advice
    rows = [CorrectedSession.of(d.session, symbol="AAPL", asked_at=NOW, source="simulator") for d in first.differences]
    save_corrections(tmp_path, CalendarKey.of(AAPL), [datetime.fromtimestamp(labor_day, UTC).date()], rows)

    again = compare_with_ib(FakeSchedules(truth | {labor_day: added[labor_day]}), AAPL, YEAR, now=NOW)
    assert "1 session corrected before" in describe_calendar_check(again)[1]
    assert not any("--apply" in line for line in describe_calendar_check(again))
    assert [d["applied"] for d in again.as_dict()["differences"]] == [True]  # type: ignore[attr-defined]

    another = compare_with_ib(FakeSchedules(truth | {christmas: added[christmas]}), AAPL, YEAR, now=NOW)
    _, difference, outdated, advice = describe_calendar_check(another)
    assert "2024-12-25: closed by the calendar, 25 13:30..20:00 by IB" in difference
    assert "2024-09-02: 02 13:30..20:00 by the calendar, closed by IB; an earlier correction" in outdated
    assert "--apply" in advice


def test_a_continuous_future_is_refused_before_ib_refuses_it(
    unused_port: int, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """IB takes no end date for one (10339); a contract of it has the same calendar."""
    universe = tmp_path / "universe.yaml"
    universe.write_text("series:\n  - {symbol: ES, sec_type: CONTFUT, exchange: CME, timeframes: [1d]}\n")
    with pytest.raises(InputError, match="continuous future") as caught:
        check_calendar("ES", settings=make_settings(unused_port, universe_file=universe))
    assert re.search(r"such as ES[HMUZ]\d:", caught.value.advice)
