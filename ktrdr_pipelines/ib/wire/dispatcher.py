"""Messages of the gateway, each to the request whose id it carries, and what they mean for the connection. No I/O.

Runs on the loop of the connection's thread. `decoding.py` reads bars and checks the other answers, which the library's decoder
reads (`answers.py`); only `codes.py` decides what a code means, and whether a message ends a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ktrdr_pipelines.ib.codes import Outcome, classify
from ktrdr_pipelines.ib.wire.answers import (
    BARS,
    CONTRACT,
    CONTRACT_END,
    HEAD,
    SAMPLES,
    SCHEDULE,
    TIME,
    AnswerCollector,
    OpenRequest,
    OpenRequests,
)
from ktrdr_pipelines.ib.wire.decoding import (
    check_contract_message,
    check_samples_message,
    check_schedule_message,
    read_bars_message,
    read_error,
    report_unreadable,
)
from ktrdr_pipelines.ib.wire.outages import Outages

log = logging.getLogger(__name__)

ERROR = 4
_ANSWERS = (CONTRACT, BARS, CONTRACT_END, SAMPLES, HEAD, SCHEDULE)
MESSAGES = (ERROR, TIME, *_ANSWERS)
"""The messages that are read, by IBKR's number. Others (orders, positions, news) are none of a loader's business."""


class NoData(Exception):
    """IB answered that the window has no data; the text is IB's."""


class Dispatcher:
    """State of one connection as its messages make it. ``notices`` grows to the last hundred messages that ended no request."""

    def __init__(self, now: Callable[[], datetime], notices: list[str]) -> None:
        self.open_requests = OpenRequests()
        self.probing: asyncio.Future[datetime] | None = None
        """The open request for the time, which has no id."""
        self.outages = Outages()
        self.id_in_use = False
        self.refusal = ""
        """Why the gateway ended the connection; empty as long as it did not."""
        self._answers = AnswerCollector(self.open_requests)
        self._now, self._notices = now, notices
        self._decoder: Any = None
        self._server_version = 0

    def decode_with(self, decoder: type[Any], server_version: int) -> None:
        """Use the library's ``decoder`` from now on."""
        self._decoder, self._server_version = decoder(self._answers, server_version), server_version

    def read(self, message: int, fields: list[str]) -> None:
        """Take one message of `MESSAGES`; ``fields`` begin with its number."""
        if message == ERROR:
            self._read_error(fields)
        elif message == TIME:
            self._read_time(fields)
        elif message in _ANSWERS:
            self._read_answer(message, fields)

    def fail_all(self, error: Exception) -> None:
        """End every open request with ``error``: the connection ended."""
        for request in self.open_requests.values():
            request.fail(error)
        self._fail_probe(error)

    def _fail_probe(self, error: Exception) -> None:
        if self.probing is not None and not self.probing.done():
            self.probing.set_exception(error)

    def _read_time(self, fields: list[str]) -> None:
        calls = self._answers.calls
        self._decoder.interpret(fields)
        if self.probing is None or self.probing.done() or self._answers.calls == calls or not self._answers.time_s:
            return
        with suppress(ValueError, OverflowError, OSError):  # no time: the probe goes on to its time-out
            self.probing.set_result(datetime.fromtimestamp(self._answers.time_s, UTC))

    def _read_answer(self, message: int, fields: list[str]) -> None:
        """Hand an answer to its request. One that cannot be read fails its request at once: the library would leave the request
        to its time-out."""
        is_old = message == CONTRACT and self._server_version < 164
        request = self._find_request(fields[2 if is_old or message == CONTRACT_END else 1 :])
        if request is None or request.ended.done() or message not in request.answered_by:
            return  # late, of a request that was given up; or no answer to what was asked
        calls = self._answers.calls
        try:
            if message == BARS:
                request.finish(read_bars_message(fields))
                return
            _check(message, fields, self._server_version, len(request.parts))
            self._decoder.interpret(fields)
            if self._answers.calls == calls:
                raise ValueError("the client library cannot decode it")
        except (ValueError, IndexError) as error:
            request.fail(report_unreadable(error, fields))

    def _read_error(self, fields: Sequence[str]) -> None:
        try:
            req_id, code, text = read_error(fields)
        except ValueError as error:
            if unread := self._find_request(fields[2:]):
                unread.fail(report_unreadable(error, fields))
            return
        request = self.open_requests.get(req_id)
        outcome = classify(
            code,
            text,
            now=self._now(),
            # Only of bars does "no data" count as an answer.
            during_history=request is not None and request.answered_by == (BARS,),
            outages=self.outages.kinds if request is None else request.outages_seen,
        )
        self._take_note(outcome)
        if request is not None and outcome.ends_request:
            request.must_cancel = outcome.row.goes_on
            request.fail(_to_failure(outcome))
            return
        if request is not None or req_id <= 0:
            is_alarming = bool(outcome.begins) or outcome.row.reconnect or not outcome.is_known
            log.log(logging.WARNING if is_alarming else logging.INFO, "message %d of the gateway: %s", code, text)
            self._notices.append(f"{code} {text}")
            del self._notices[:-100]
            for each in self.open_requests.values() if request is None else (request,):
                each.notices.append(f"{code} {text}")
                del each.notices[:-3]

    def _find_request(self, fields: Sequence[str]) -> OpenRequest | None:
        """The open request whose id is the first of ``fields``."""
        text = fields[0] if fields else ""
        return self.open_requests.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 12 else None

    def _take_note(self, outcome: Outcome) -> None:
        """What a message means for the connection and for all requests on it, whichever request it names."""
        self.outages = self.outages.after(outcome)
        self.id_in_use = self.id_in_use or outcome.row.next_client_id
        for request in self.open_requests.values():
            request.outages_seen |= self.outages.kinds
        if outcome.row.reconnect or outcome.row.needs_resubscribe:
            # No answer will come any more: better known now than after the time-out.
            for request in self.open_requests.values():
                request.must_cancel = outcome.row.goes_on
                request.fail(_to_failure(outcome))
        if outcome.row.reconnect:
            self.refusal = f"{outcome.text} ({outcome.code})"
            self._fail_probe(outcome.to_error())


def _check(message: int, fields: list[str], server_version: int, parts: int) -> None:
    """Check that an answer is as long as it claims; ``parts`` of it came in earlier messages.

    Raises:
        ValueError, IndexError: it is not.
    """
    if message == SCHEDULE:
        check_schedule_message(fields)
    elif message == SAMPLES:
        check_samples_message(fields, server_version)
    elif message == CONTRACT:
        check_contract_message(fields, parts)


def _to_failure(outcome: Outcome) -> Exception:
    if outcome.is_empty:
        return NoData(outcome.text)
    failure = outcome.to_error()
    failure.pauses_login = outcome.row.pauses_login
    return failure
