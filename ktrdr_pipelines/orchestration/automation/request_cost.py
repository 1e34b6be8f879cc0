"""What missing bars cost: the planned number of requests, without a gateway. Pure.

Sensors start only what costs at most KTRDR_AUTO_REQUESTS requests; the rest is the user's decision, with the command that
loads it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits, Timeframe
from ktrdr_pipelines.planning.durations import NOMINAL_S
from ktrdr_pipelines.planning.requests import plan_requests


@dataclass(frozen=True, slots=True)
class Cost:
    """A number of requests. Not ``is_exact``: an estimate, for bars that cost far more than a sensor may start."""

    requests: int
    is_exact: bool = True

    def __str__(self) -> str:
        return f"{self.requests:,} requests" if self.is_exact else f"about {self.requests:,} requests"


def reach_s(timeframe: Timeframe, limits: HistoryLimits, requests: int) -> int:
    """Seconds that cost more than ``requests`` longest requests, when all expected bars in them are missing. Twice the nominal
    length, because a day of a request is a session; for seconds eight times, because most of a week is closed."""
    longest = timeframe.longest_request(limits)
    return (8 if longest.unit == "S" else 2) * (requests + 1) * longest.count * NOMINAL_S[longest.unit]


def cost_of(series: Series, missing: ExpectedBars, limits: HistoryLimits, most: int) -> Cost:
    """The cost of ``missing`` bars (not empty) of ``series``; an estimate where it is above ``most``.

    A series that IB serves only up to now is one request.
    """
    if series.instrument.ends_now:
        return Cost(1)
    first_s = int(missing.opens[0])
    part = missing.take(missing.opens < first_s + reach_s(series.timeframe, limits, most))
    if len(part) < len(missing):
        requests = len(plan_requests(series.timeframe, part, limits))
        if requests > most:
            return Cost(math.ceil(requests * len(missing) / len(part)), is_exact=False)
    return Cost(len(plan_requests(series.timeframe, missing, limits)))


def command_for(series: Series, mode: Mode, window: Window | None = None) -> str:
    """The command with which a user loads ``window`` (without one: what ``mode`` means) of ``series``."""
    words = ["ktrdr", "ib-load", series.instrument.symbol, series.timeframe.name, "--mode", mode.value]
    if window is not None:
        words += ["--start", format_instant(window.start), "--end", format_instant(window.end)]
    return shlex.join(words)
