"""How far back a request reaches: end times and durations, in IB's notation, to epoch seconds.

Which bars lie in the window is `market.py`'s matter. Rules: `docs/ib_facts.md`, 1 to 3. D, W and M count trading
sessions; how exactly is not documented, so `DurationRule` offers the readings that other gateways may have.
"""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from ktrdr_pipelines.simulator.market import BarSize
from ktrdr_pipelines.simulator.refusals import (
    BAD_END,
    MORE_THAN_A_YEAR,
    RequestRefusedError,
    refuse_duration,
    refuse_step,
)
from ktrdr_pipelines.simulator.trading_hours import Sessions


class DurationRule(StrEnum):
    """SESSIONS: D counts sessions, W, M and Y reach back 5, 22 and 252 sessions or to the same date, whichever is further.
    STRICT: the session counts alone (a month of 23 sessions is not covered by 1 M). CALENDAR: plain clock time."""

    SESSIONS = "sessions"
    STRICT = "strict"
    CALENDAR = "calendar"


class RequestLimits(StrEnum):
    """CURRENT: IBKR's maxima and its matrix of units and bar sizes. OFF: any duration in a known unit, as some loaders'
    tests want. (Classic limits are the loader's own; the gateway never enforced them.)"""

    CURRENT = "current"
    OFF = "off"


_DURATION = re.compile(r"([1-9][0-9]{0,8}) ([SDWMY])")
_MAXIMUM = {"S": 86400, "D": 365, "W": 52, "M": 12, "Y": 68}
_SIZES = {"S": (1, 60), "D": (5, 3600), "W": (10, 14400), "M": (30, 28800), "Y": (60, 86400)}
_LONGEST_1_SEC = 2000
_LONGEST = {"D": 36500, "W": 5200, "M": 1200, "Y": 100}
"""A century back is before every history, and within what dates can hold."""
_PER_UNIT = {"D": 1, "W": 5, "M": 22, "Y": 252}

Duration = tuple[int, str]


def parse_duration(text: str) -> Duration:
    """``"20 D"`` as ``(20, "D")``.

    Raises:
        RequestRefusedError: 321, not a duration (hours are none).
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise RequestRefusedError(refuse_duration(text))
    return int(match.group(1)), match.group(2)


def check_duration(duration: Duration, size: BarSize, limits: RequestLimits) -> None:
    """Refuse what is longer than IB serves, or a unit that does not go with the bar size.

    Daily and longer bars are taken with any unit but S (loaders ask ``30 D`` of daily bars all the time), although IBKR's
    matrix stops at one hour for D.

    Raises:
        RequestRefusedError: 321 above a year in other units than years, 162 "invalid step" otherwise.
    """
    if limits is RequestLimits.OFF:
        return
    count, unit = duration
    if count > _MAXIMUM[unit]:
        raise RequestRefusedError(MORE_THAN_A_YEAR if unit in "DWM" else refuse_step(size.seconds))
    smallest, largest = _SIZES[unit]
    fits = unit != "S" if size.is_dated else smallest <= size.seconds <= largest
    if not fits or (size.seconds == 1 and count > _LONGEST_1_SEC):
        raise RequestRefusedError(refuse_step(size.seconds))


_UTC_END = re.compile(r"(\d{8})-(\d{2}:\d{2}:\d{2})")
_ZONED_END = re.compile(r"(?:(\d{8})\s+)?(\d{2}:\d{2}:\d{2})(?:\s+([A-Za-z0-9_+\-/]+))?")


def parse_end(text: str, now_s: int, zone: str) -> tuple[int, bool]:
    """The end of a request as epoch seconds, and whether its zone had to be guessed (warning 2174).

    Empty means now; an end in the future is now. ``zone`` is the gateway's own, used where none is named.

    Raises:
        RequestRefusedError: 10314, no such date, time or zone.
    """
    if not text.strip():
        return now_s, False
    if match := _UTC_END.fullmatch(text.strip()):
        return min(now_s, _to_epoch(match.group(1), match.group(2), "UTC")), False
    match = _ZONED_END.fullmatch(text.strip())
    if not match:
        raise RequestRefusedError(BAD_END)
    date, time, named = match.groups()
    day = date or datetime.fromtimestamp(now_s, _find_zone(named or zone)).strftime("%Y%m%d")
    return min(now_s, _to_epoch(day, time, named or zone)), named is None


def _find_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, ZoneInfoNotFoundError, OSError):  # OSError: the name of a folder of zones, or one too long
        raise RequestRefusedError(BAD_END) from None


def _to_epoch(day: str, time: str, zone: str) -> int:
    try:
        local = datetime.strptime(f"{day} {time}", "%Y%m%d %H:%M:%S").replace(tzinfo=_find_zone(zone))
        return max(0, int(local.timestamp()))
    except (ValueError, OverflowError):
        raise RequestRefusedError(BAD_END) from None


def find_start(duration: Duration, end_s: int, sessions: Sessions, *, regular: bool, rule: DurationRule) -> int:
    """Where a request that ends at ``end_s`` begins, in epoch seconds. A session under way counts as one."""
    count, unit = duration
    if unit == "S":
        return end_s - count
    calendar = _step_back(end_s, count, unit, sessions.zone)
    if rule is DurationRule.CALENDAR:
        return calendar
    opens = sessions.opens(regular=regular)
    begun = int(np.searchsorted(opens, end_s, side="left"))
    if begun == 0:
        return calendar
    counted = int(opens[max(0, begun - count * _PER_UNIT[unit])])
    if unit == "D" or rule is DurationRule.STRICT:
        return counted
    first, _ = sessions.find_range(calendar, end_s, regular=regular)
    return min(counted, int(opens[min(first, len(opens) - 1)]))


def _step_back(end_s: int, count: int, unit: str, zone: str) -> int:
    end = datetime.fromtimestamp(end_s, UTC).astimezone(ZoneInfo(zone))
    count = min(count, _LONGEST[unit])
    if unit in "DW":
        return int((end - timedelta(days=count * (7 if unit == "W" else 1))).timestamp())
    months = end.year * 12 + end.month - 1 - count * (12 if unit == "Y" else 1)
    year, month = divmod(months, 12)
    day = min(end.day, monthrange(year, month + 1)[1])
    return int(end.replace(year=year, month=month + 1, day=day).timestamp())
