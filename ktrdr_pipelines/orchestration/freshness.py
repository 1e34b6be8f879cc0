"""Freshness policies: by when a series must have been loaded again, from the sessions of its market.

Dagster judges the newest materialization of **any** partition (docs/dagster_facts.md, 4): a load of 2010 makes a series fresh. So
a policy shows that the loads of a series work, not that its newest bars are held; the latter is the status of its newest
partition. A policy has no holidays: after one a series is overdue from its deadline until its next bars arrive.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import dagster as dg
import numpy as np

from ktrdr_pipelines.calendars import CalendarKey, table_of
from ktrdr_pipelines.calendars.session_tables import SessionTable
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.settings import Settings

_BEFORE_OPEN_S = 1800
_AFTER_SETTLEMENT_S = 3600
_DAY_S = 86400
_USUAL = 0.05
"""Times and weekdays with a smaller share of the sessions are exceptions: half days, a session on a Sunday."""

_WEEKLY = dg.FreshnessPolicy.cron("0 6 * * 2", timedelta(days=7))
_MONTHLY = dg.FreshnessPolicy.cron("0 6 3 * *", timedelta(days=28))
"""When the last session of a week or month has settled in every time zone."""


def freshness_of(series: Series, settings: Settings) -> dg.FreshnessPolicy | None:
    """The policy of ``series``. Daily and shorter bars: a materialization within the 24 hours before each deadline. The deadline
    is half an hour before the market opens again, for daily bars an hour after they have settled if that is later.

    None where nothing loads new bars by itself at the times of the market: the tail sensor is off by default, the timeframe has
    a schedule, a future has expired, or no calendar is known.
    """
    name, until = series.timeframe.name, series.instrument.trades_until
    if not settings.tail_sensor or name in settings.tail_schedules:
        return None
    if until is not None and until < datetime.now(UTC).date():
        return None
    if name in ("1w", "1mo"):
        return _WEEKLY if name == "1w" else _MONTHLY
    settles_s = None if series.timeframe.is_intraday else int(settings.settlement_delay_min * 60)
    try:
        return _daily(series.instrument, settles_s)
    except InputError:
        return None


_known: dict[tuple[CalendarKey, int | None], dg.FreshnessPolicy] = {}


def _daily(instrument: Instrument, settles_s: int | None) -> dg.FreshnessPolicy:
    """The policy for the calendar of ``instrument``. The times are UTC and allow for both clock changes.

    Raises:
        InputError: no calendar is known.
    """
    key = (CalendarKey.of(instrument), settles_s)
    if key not in _known:
        _known[key] = _make_daily(table_of(instrument), settles_s)
    return _known[key]


def _make_daily(table: SessionTable, settles_s: int | None) -> dg.FreshnessPolicy:
    recent = slice(-2 * 52 * table.sessions_per_week, None)
    dates = table.dates[recent]
    deadline_s = min(_usual(table.opens[recent] - dates)) - _BEFORE_OPEN_S + _DAY_S
    if settles_s is not None:
        deadline_s = max(deadline_s, max(_usual(table.closes[recent] - dates)) + settles_s + _AFTER_SETTLEMENT_S)
    days_later, at_s = divmod(deadline_s, _DAY_S)
    # 1970-01-01 was a Thursday, day 4 of a cron expression.
    days = sorted((day + days_later) % 7 for day in _usual((dates // _DAY_S + 4) % 7))
    weekdays = "*" if len(days) == 7 else ",".join(str(day) for day in days)
    cron = f"{at_s % 3600 // 60} {at_s // 3600} * * {weekdays}"
    return dg.FreshnessPolicy.cron(cron, timedelta(days=1))


def _usual(values: IntArray) -> list[int]:
    found, counts = np.unique(values, return_counts=True)
    return [int(value) for value in found[counts >= _USUAL * len(values)]]


def add_freshness(assets: dg.AssetsDefinition, universe: Iterable[Series], settings: Settings) -> dg.AssetsDefinition:
    """``assets`` with the policies of their series. For what the daemon loads; a command that runs one asset needs none, and is
    quicker without the sessions."""
    policies = {dg.AssetKey(list(s.asset_path)): freshness_of(s, settings) for s in universe}
    return assets.map_asset_specs(lambda spec: spec.replace_attributes(freshness_policy=policies.get(spec.key)))
