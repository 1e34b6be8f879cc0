"""A history that answers from a given truth, with faults by script: for tests of the load, without a socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.report import Ended, Event, Failure, Planned
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.durations import reach_back
from ktrdr_pipelines.planning.requests import Request

IntArray = npt.NDArray[np.int64]
Fault = Callable[[RawBars], RawBars]

TIMEOUTS: dict[str, Any] = {"connect_timeout_s": 15.0, "request_timeout_s": 120.0, "retry_waits_s": (15.0, 30.0, 60.0)}
"""Of a `GatewayAddress`, as the settings have them."""


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def window(start: str, end: str) -> Window:
    return Window(utc(start), utc(end))


def raw_bars(opens_s: IntArray, *, no_data_text: str = "") -> RawBars:
    """Valid bars at ``opens_s`` whose prices follow from the stamp alone."""
    base = 100.0 + (opens_s // 60 % 1000) / 100
    volume = (opens_s // 3600 % 977).astype(np.float64)
    return RawBars(opens_s, base, base + 0.5, base - 0.5, base + 0.25, volume, no_data_text)


def pick(raw: RawBars, keep: npt.NDArray[np.bool_] | IntArray | slice) -> RawBars:
    return RawBars(*(getattr(raw, n)[keep] for n in ("opens_s", "open", "high", "low", "close", "volume")))


@dataclass
class FakeHistory:
    """Answers every request from ``truth`` (opens). ``script``: what to do with the n-th request (from 1): a function of the
    right answer, or an exception to raise."""

    truth: IntArray
    script: dict[int, Fault | Exception] = field(default_factory=dict)
    head: datetime | None = None
    source: str = "paper"
    requests: list[Request] = field(default_factory=list)
    heads_asked: int = 0
    clock_lag_s: float = 0.0
    outage: str = ""
    reaches_back_s: int = 86400
    """How much further back than its window an answer reaches at least; its duration may lead further."""

    @classmethod
    def of(cls, series: Series, span: Window, **more: object) -> FakeHistory:
        """A history that has every bar the calendar expects in ``span``."""
        return cls(expected_bars(series, span).opens, **more)  # type: ignore[arg-type]

    @property
    def requests_made(self) -> int:
        return len(self.requests) + self.heads_asked

    def interrupt(self) -> None:
        """Answers come at once: there is nothing to interrupt."""

    def resume(self) -> None:
        """See `interrupt`."""

    def pin(self, instrument: Instrument, call: Call | None = None) -> Instrument:
        return replace(instrument, con_id=4711, time_zone="America/New_York")

    def find_head(self, instrument: Instrument, call: Call | None = None) -> datetime | None:
        self.heads_asked += 1
        (call or Call()).costs.requests += 1
        return self.head

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> RawBars:
        self.requests.append(request)
        (call or Call()).costs.requests += 1
        # Over-answers at the old end, as IB does; the forming bar is up to the truth.
        end_s = int(request.end.timestamp())
        start_s = reach_back(end_s, request.duration)
        if request.duration.unit != "S":  # seconds are clock time, all else may count sessions
            start_s = min(start_s, request.window.start_s - self.reaches_back_s)
        opens = self.truth[(self.truth >= start_s) & (self.truth < end_s)]
        answer = raw_bars(opens, no_data_text="" if len(opens) else "HMDS query returned no data")
        fault = self.script.get(len(self.requests))
        if isinstance(fault, Exception):
            raise fault
        return fault(answer) if fault else answer


class MovingClock:
    """The real time plus what was slept through: waits take no time, and the ledger sees them pass."""

    def __init__(self) -> None:
        self.slept_s = 0.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.slept_s += seconds

    def now_s(self) -> float:
        return time.time() + self.slept_s

    def read(self) -> Reading:
        return Reading(self.now_s(), time.monotonic() + self.slept_s, "test")


def run_load(load: Load) -> Iterator[Event]:
    """The events of one load, one request at a time.

    Raises:
        KtrdrError: the load could not begin.
    """
    has_begun = False
    for _, event in drive([load]):
        has_begun |= isinstance(event, Planned)
        if isinstance(event, Failure) and not has_begun:
            raise event.error
        if not isinstance(event, Ended):
            yield event
