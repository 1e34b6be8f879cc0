"""Where bars come from, as the load sees it: the questions it can ask and the shape of an answer.

`ib/history.py` is the real one, tests bring fakes. No implementation here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from ktrdr_pipelines.bars.answer import Answer
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import Source


class History(Protocol):
    """Where bars come from: IB behind pacing and retries (`ib/history.py`), or a fake. The questions may come from several
    threads at once."""

    @property
    def source(self) -> Source:
        """Whose bars these are; known once `pin` was called."""

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's (0: it is not); known once `pin` was called."""

    @property
    def outage(self) -> str:
        """What the gateway reports as out now; empty when it reports nothing."""

    def pin(self, instrument: Instrument, call: Call | None = None) -> Instrument:
        """The instrument with IB's conId and time zone."""

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> Answer:
        """One answer; raises a KtrdrError when there is none. Never an empty answer for a failure."""

    def find_head(self, instrument: Instrument, call: Call | None = None) -> datetime | None:
        """IB's hint where history starts."""

    def interrupt(self) -> None:
        """End the questions that are under way in other threads; they raise `Interrupted`."""

    def resume(self) -> None:
        """Questions are possible again."""
