"""Harmless differences between gateways: how bars are dated, how many an answer has, where history is said to start.

IBKR documents none of them, so a loader must work with every value. How durations are counted is a habit too; see
`request_reach.py`. Scripted faults are in `faults.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.market import DAY_S, Bars, BarSize, label_dates
from ktrdr_pipelines.simulator.trading_hours import Sessions

_HEAD_SHIFTS_S = {"exact": 0, "early": -3653 * DAY_S, "late": 365 * DAY_S}


@dataclass(frozen=True)
class Habits:
    """The habits of one gateway.

    ``periods``: weeks and months are dated with the "last" of their sessions, the "first" of their days (Monday, the 1st),
    or the day "before" it (Sunday, the last of the month before). ``days``: daily bars are dated with the day on which their
    session ends ("close") or begins ("open": forex from Sunday to Thursday). ``newest``: the most bars of an answer; older
    ones are left out (0: no limit). ``head``: the head timestamp is "exact", ten years too "early", a year too "late", or
    refused ("none"). ``empty``: a window without bars is answered with the "error" 162, or with "no_bars" and no error.
    """

    periods: str = "last"
    days: str = "close"
    newest: int = 0
    head: str = "exact"
    empty: str = "error"

    def date_bars(self, bars: Bars, size: BarSize, sessions: Sessions) -> Bars:
        """``bars`` with the stamps that this gateway gives them."""
        if size.unit == "day" and self.days == "open":
            at = np.searchsorted(sessions.day, bars.stamp // DAY_S)
            return replace(bars, stamp=(sessions.open[at] + sessions.offset[at]) // DAY_S * DAY_S)
        if size.unit in ("week", "month") and self.periods != "last":
            key = label_dates(bars.stamp // DAY_S, size.unit)
            days = key * 7 - 3 if size.unit == "week" else key.astype("datetime64[M]").astype("datetime64[D]")
            return replace(bars, stamp=(days.astype(np.int64) - (self.periods == "before")) * DAY_S)
        return bars

    def cut_answer(self, bars: Bars) -> Bars:
        """The newest of ``bars``, as many as this gateway sends."""
        return bars.take(slice(-self.newest, None)) if self.newest else bars

    def shift_head(self, head_s: int | None) -> int | None:
        """The start of history (epoch seconds) as this gateway reports it; None: it reports none."""
        return None if head_s is None or self.head == "none" else max(0, head_s + _HEAD_SHIFTS_S[self.head])


USUAL = Habits()

VALUES: dict[str, tuple[str, ...]] = {
    "periods": ("last", "first", "before"),
    "days": ("close", "open"),
    "newest": (),
    "head": (*_HEAD_SHIFTS_S, "none"),
    "empty": ("error", "no_bars"),
}
"""The values of each habit; ``newest`` is a number."""


def read_habits(texts: Iterable[str]) -> Habits:
    """``["periods=first", "newest=100"]`` as `Habits`.

    Raises:
        InputError: no such habit or value.
    """
    habits = USUAL
    for text in texts:
        name, _, value = text.partition("=")
        if name not in VALUES:
            raise InputError(f"unknown habit {text!r}", advice=f"Write NAME=VALUE with one of {', '.join(VALUES)}.")
        if name == "newest":
            if not value.isdecimal():
                raise InputError(f"{text!r} is not a number of bars", advice="Write it like newest=100.")
            habits = replace(habits, newest=int(value))
        elif value not in VALUES[name]:
            raise InputError(
                f"unknown value of habit {name}: {value!r}", advice=f"Use one of {', '.join(VALUES[name])}."
            )
        else:
            changed: dict[str, Any] = {name: value}
            habits = replace(habits, **changed)
    return habits
