"""Promises of the freshness policies: a series that is loaded at the times of its market is fresh, one that is not is overdue.

Weeks of loads are played through against Dagster's rule: at each deadline the newest materialization may be a day old, or as old
as the policy says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.freshness import freshness_of
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines_tests.fakes import utc

MakeSettings = Callable[..., Settings]

MARKETS = {
    "New York": stock("AAPL"),
    "New York, all hours": stock("AAPL", hours=Hours.EXTENDED),
    "forex": forex("EURUSD"),
    "Xetra": stock("SAP", exchange="IBIS", currency="EUR"),
    "Sydney": stock("BHP", exchange="ASX", currency="AUD"),
    "Tokyo": stock("7203", exchange="TSEJ", currency="JPY"),
    "Bombay": stock("TCS", exchange="NSE", currency="INR"),
    "Tel Aviv": stock("TEVA", exchange="TASE", currency="ILS"),
    "CME": Instrument("ES", "CONTFUT", "CME", "USD"),
    "crypto": Instrument("BTC", "CRYPTO", "PAXOS", "USD"),
}


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(4001)


def play(series: Series, settings: Settings, window: Window, *, outage: Window | None = None) -> list[datetime]:
    """The deadlines in ``window`` at which ``series`` is overdue, if bars are loaded when they are due, except in ``outage``."""
    policy = freshness_of(series, settings)
    assert policy is not None
    late_s = 300 if series.timeframe.is_intraday else settings.settlement_delay_min * 60 + 300
    closes = expected_bars(series, Window(window.start - timedelta(days=70), window.end)).closes
    loads = [datetime.fromtimestamp(int(close) + late_s, UTC) for close in closes]
    loads = [at for at in loads if outage is None or not outage.contains(at)]
    overdue = []
    for deadline in deadlines_of(policy.deadline_cron, window):  # type: ignore[attr-defined]
        newest = loads[bisect_right(loads, deadline) - 1]
        if newest < deadline - policy.lower_bound_delta:  # type: ignore[attr-defined]
            overdue.append(deadline)
    return overdue


def deadlines_of(cron: str, window: Window) -> Iterator[datetime]:
    """The times of ``cron``: one minute and hour, on some days of the week or one of the month."""
    minute, hour, day, _, weekdays = cron.split()
    at = window.start.replace(hour=int(hour), minute=int(minute), second=0)
    while at < window.end:
        is_day = day in ("*", str(at.day)) and (weekdays == "*" or str(at.isoweekday() % 7) in weekdays.split(","))
        if is_day and at > window.start:
            yield at
        at += timedelta(days=1)


@pytest.mark.parametrize("name", ["1m", "1h", "4h", "1d"])
@pytest.mark.parametrize("market", MARKETS)
def test_what_is_loaded_in_time_is_fresh(market: str, name: str, settings: Settings) -> None:
    """A year of loads, with both changes of clocks: overdue only after holidays, of which no market here has more than 25."""
    series = Series(MARKETS[market], TIMEFRAMES[name])
    overdue = play(series, settings, Window(utc("2026-01-02"), utc("2027-01-02")))
    assert len(overdue) <= (0 if market == "crypto" else 25)
    assert play(series, settings, Window(utc("2026-06-10"), utc("2026-06-18"))) == []


@pytest.mark.parametrize(("name", "least"), [("1m", 3), ("1d", 3)])
@pytest.mark.parametrize("market", MARKETS)
def test_three_days_without_loads_are_overdue(market: str, name: str, least: int, settings: Settings) -> None:
    """From Tuesday to Thursday nothing is loaded: at least two deadlines pass before the next load."""
    series = Series(MARKETS[market], TIMEFRAMES[name])
    outage = Window(utc("2026-06-16"), utc("2026-06-19T12:00:00"))
    window = Window(utc("2026-06-15T12:00:00"), utc("2026-06-23"))
    assert len(play(series, settings, window, outage=outage)) >= least - 1


@pytest.mark.parametrize("name", ["1w", "1mo"])
@pytest.mark.parametrize("market", MARKETS)
def test_weeks_and_months_are_fresh_all_year(market: str, name: str, settings: Settings) -> None:
    """Each has a session, whatever holidays it has."""
    series = Series(MARKETS[market], TIMEFRAMES[name])
    assert play(series, settings, Window(utc("2026-01-06T12:00:00"), utc("2027-01-02"))) == []


def test_series_that_nothing_loads_have_no_policy(make_settings: MakeSettings) -> None:
    """The sensor is off, a schedule decides, the future has expired, the calendar is not known."""
    aapl, daily = (Series(stock("AAPL"), TIMEFRAMES[name]) for name in ("1h", "1d"))
    assert freshness_of(aapl, make_settings(4001, tail_sensor=False)) is None
    settings = make_settings(4001, tail_schedules={"1d": "30 22 * * 1-5"})
    assert freshness_of(daily, settings) is None
    assert freshness_of(aapl, settings) is not None
    expired = Instrument("ESZ3", "FUT", "CME", "USD", ib_symbol="ES", expiry="20231215")
    assert freshness_of(Series(expired, TIMEFRAMES["1h"]), settings) is None
    odd = replace(stock("ODD"), exchange="NOWHERE", currency="XXX")
    assert freshness_of(Series(odd, TIMEFRAMES["1h"]), settings) is None


def test_the_daemon_sees_the_policies_and_a_command_does_without(settings: Settings) -> None:
    """Sessions take time to build, and a command that loads one series shows no freshness."""
    series = Series(stock("AAPL"), TIMEFRAMES["1h"])
    key = asset_key(series)

    def policy_in(defs: dg.Definitions) -> object:
        (spec,) = (spec for spec in defs.resolve_all_asset_specs() if spec.key == key)
        return spec.freshness_policy

    assert policy_in(build_defs(settings, [series])) == freshness_of(series, settings)
    assert policy_in(build_definitions(settings, [series])) is None
