# ruff: noqa: N802, N803 - methods and arguments are called as in IB's API
"""Open requests, and the answers that the library's decoder hands over, each to the request whose id it carries.

`AnswerCollector` is the wrapper of IB's API for the library's ``Decoder``: the decoder calls the method that a message is named
after, and ignores messages without one. Bars never come here: `decoding.py` reads them. How a message is checked before, and what
an error means for a request: `dispatcher.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ktrdr_pipelines.ib.codes import Outage

CONTRACT, BARS, TIME, CONTRACT_END, SAMPLES, HEAD, SCHEDULE = 10, 17, 49, 52, 79, 88, 106
"""Messages that answer requests, by IBKR's number."""


@dataclass
class OpenRequest:
    """A request from its sending to its end. ``answered_by``: the messages that can be its answer. ``outages_seen``: everything
    that was out at any moment since it was sent. ``must_cancel``: it is over, but the gateway may not know."""

    answered_by: tuple[int, ...]
    outages_seen: frozenset[Outage]
    ended: asyncio.Future[Any]
    parts: list[Any] = field(default_factory=list)
    """What came so far, of an answer in several messages."""
    notices: list[str] = field(default_factory=list)
    """The last messages of the gateway that came meanwhile and ended nothing."""
    must_cancel: bool = False

    def finish(self, answer: Any) -> None:
        """End it with ``answer``; nothing if it has ended."""
        if not self.ended.done():
            self.ended.set_result(answer)

    def fail(self, error: Exception) -> None:
        """End it with ``error``; nothing if it has ended."""
        if not self.ended.done():
            self.ended.set_exception(error)


OpenRequests = dict[int, OpenRequest]
"""The open requests of a connection by id; several at once."""


class AnswerCollector:
    """What the decoder calls. Objects are the library's, times are texts as the gateway wrote them.

    The decoder logs and forgets what it cannot read. ``calls`` counts what it could: a message that did not increase it is
    unreadable.
    """

    def __init__(self, requests: OpenRequests) -> None:
        self.calls = 0
        self.time_s: int | None = None
        """The gateway's time of the last `currentTime`, in epoch seconds."""
        self._requests = requests

    def contractDetails(self, reqId: int, details: Any) -> None:
        self._requests[reqId].parts.append(details)
        self.calls += 1

    def contractDetailsEnd(self, reqId: int) -> None:
        self._finish(reqId, self._requests[reqId].parts)

    def symbolSamples(self, reqId: int, samples: list[Any]) -> None:
        self._finish(reqId, samples)

    def headTimestamp(self, reqId: int, text: str) -> None:
        self._finish(reqId, text)

    def historicalSchedule(self, reqId: int, _start: str, _end: str, zone: str, sessions: list[Any]) -> None:
        self._finish(reqId, (zone, [(each.startDateTime, each.endDateTime, each.refDate) for each in sessions]))

    def currentTime(self, time: int) -> None:
        self.time_s = time
        self.calls += 1

    def _finish(self, req_id: int, answer: Any) -> None:
        self._requests[req_id].finish(answer)
        self.calls += 1
