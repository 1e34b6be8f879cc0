"""One connection to a gateway, from handshake to end, and each request on it from its sending to its end.

A thread of its own with its own event loop owns the connection, and the client library is imported inside that thread: in
others it finds no event loop, or the wrong one (docs/dagster_facts.md, 7). Calls from any thread block until the answer, an error
of `errors.py`, or the time-out; several requests may be open at once. The requests are in `client.py`, the reading of answers in
`decoding.py`, outages in `outages.py`. Only `codes.py` decides what a code means, and whether a message ends a request.

Only the API handshake is made, none of the account, position and order requests that the library's ``IB.connect`` sends:
a loader needs none of them, and each is one more thing to wait for. Messages of other kinds are dropped unread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError, RequestTimeout, TransientError
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
    check_bars_message,
    check_contract_message,
    check_samples_message,
    check_schedule_message,
    read_error,
    report_unreadable,
)
from ktrdr_pipelines.ib.wire.diagnostics import WELL_KNOWN_PORTS, NotAGatewayError, explain_unreachable
from ktrdr_pipelines.ib.wire.handshake import ACCOUNTS, VALID_ID, Handshake, HungUpError
from ktrdr_pipelines.ib.wire.library import Library, load_library
from ktrdr_pipelines.ib.wire.loop_thread import LoopThread
from ktrdr_pipelines.ib.wire.message_socket import MessageSocket
from ktrdr_pipelines.ib.wire.outages import Outages

log = logging.getLogger(__name__)

CLIENT_ID_IN_USE = 326
_ERROR = 4
_ANSWERS = (CONTRACT, BARS, CONTRACT_END, SAMPLES, HEAD, SCHEDULE)
_READ = frozenset(str(message).encode() for message in (_ERROR, VALID_ID, ACCOUNTS, TIME, *_ANSWERS))

T = TypeVar("T")


class ClientIdInUse(TransientError):
    """Another program uses this client id (326). The caller takes the next one of its range."""


class HungUp(GatewayUnreachable):
    """The gateway closed the connection without a message as soon as it knew the client id: at times in place of 326."""


class NoData(Exception):
    """IB answered that the window has no data; the text is IB's."""


@dataclass
class GatewaySession:
    """See `ib.client.GatewayClient`, which adds the requests."""

    host: str
    port: int
    client_id: int
    connect_timeout_s: float = 15.0
    request_timeout_s: float = 120.0
    probe_timeout_s: float = 10.0
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    ports: Mapping[int, str] = field(default_factory=lambda: WELL_KNOWN_PORTS)
    """Ports to try, and what usually listens there, when ``port`` leads to no gateway."""
    library: str = "ib_insync"
    """The client library that encodes and decodes."""
    notices: list[str] = field(default_factory=list)
    """Messages of the gateway that ended no request (farms, links, warnings), newest last; at most the last hundred."""

    def __post_init__(self) -> None:
        self.outages = Outages()
        """What the gateway reports as out at the moment; then "no data" is not believed."""
        self.clock_lag_s = 0.0
        """How many seconds the gateway's time was behind this machine's at the last probe; 0 if it was not."""
        self.open_requests = OpenRequests()
        self._answers = AnswerCollector(self.open_requests)
        self._thread: LoopThread | None = None
        self._library: Library | None = None
        self._socket: MessageSocket | None = None
        self._handshake: Handshake | None = None
        self._requests: Any = None
        self._decoder: Any = None
        self._next_id = 0
        self._probing: asyncio.Future[datetime] | None = None
        self._id_in_use = False
        self._refusal = ""
        self._recent: list[str] = []

    # -- life cycle -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the socket is open and the gateway gave no notice. It may be dead nevertheless: see `probe`."""
        return self._thread is not None and self._is_open and not self._refusal

    @property
    def account(self) -> str:
        """First managed account, as the gateway announced it; empty before `connect`."""
        accounts = self._handshake.accounts if self._handshake is not None and self.is_connected else []
        return accounts[0] if accounts else ""

    @property
    def library_parts(self) -> Library:
        """The client library, which `connect` imports."""
        if self._library is None:
            raise ConnectionError("the connection was never made")
        return self._library

    @property
    def pending_bytes(self) -> int:
        """How many received bytes wait for the rest of their message."""
        return self._socket.frames.pending_bytes if self._socket is not None else 0

    def connect(self) -> None:
        """Connect and see that the gateway answers.

        Raises:
            ClientIdInUse: another program uses the client id.
            HungUp: closed without a message; may mean that the client id is in use.
            GatewayUnreachable: nothing there, or not a gateway; names the well-known port that does answer.
        """
        if self._thread is not None:
            raise RuntimeError("already connected")
        self._id_in_use, self._refusal, self.outages = False, "", Outages()
        self._socket = self._handshake = None
        self._thread = LoopThread(f"ib-gateway-{self.port}", self._load_library)
        try:
            self._connect()
            self.probe()
        except BaseException as error:
            self.close()
            if self._id_in_use and isinstance(error, GatewayUnreachable):  # the refusal came after the handshake
                raise self._explain_id_in_use() from None
            raise

    def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after a failure."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(self._hang_up)

    def probe(self) -> datetime:
        """Ask the gateway for its time: a connection may look alive and be dead (laptop sleep, silent hang).

        Sets `clock_lag_s`. The answer is in whole seconds, so that a lag below one second does not show.

        Raises:
            GatewayUnreachable: no answer within ``probe_timeout_s``. HungUp: the connection was closed instead.
        """
        asked_at = self.now()
        try:
            answer = self._call(self._ask_time(), self.probe_timeout_s + 5)
        except GatewayUnreachable:
            raise
        except TransientError as error:  # a refusal that came instead (326)
            raise GatewayUnreachable(error.observed, advice=error.advice, code=error.code) from None
        except (TimeoutError, ConnectionError) as error:
            is_hung_up = isinstance(error, ConnectionError)
            raise (HungUp if is_hung_up else GatewayUnreachable)(
                f"{self.host}:{self.port} is connected but does not answer the time request ({type(error).__name__})",
                advice="Restart TWS or the gateway, or look whether it shows a dialog.",
            ) from None
        is_behind = asked_at - answer > timedelta(seconds=1)
        self.clock_lag_s = (self.now() - answer).total_seconds() if is_behind else 0.0
        return answer

    # -- the connection, mostly on the thread's loop ------------------------------------------------------------------

    def _load_library(self) -> None:
        self._library = load_library(self.library)

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._thread is None:
            work.close()
            raise ConnectionError("the connection is closed")
        return self._thread.call(work, timeout_s)

    def _connect(self) -> None:
        try:
            self._call(self._shake_hands(), self.connect_timeout_s * 2 + 5)
        except (OSError, ValueError, NotAGatewayError) as error:
            if self._id_in_use:
                raise self._explain_id_in_use() from None
            is_hung_up = isinstance(error, HungUpError)
            if isinstance(error, NotAGatewayError) and self.notices:
                error = NotAGatewayError(f"{error}; its last messages: {'; '.join(self.notices[-3:])}")
            explained = explain_unreachable(error, self.host, self.port, self.ports)
            if is_hung_up:
                explained = HungUp(explained.observed, doing=explained.doing, advice=explained.advice)
            raise explained from None

    async def _shake_hands(self) -> None:
        self._handshake = hands = Handshake(self.library_parts.versions)
        self._socket = socket = MessageSocket(self._on_message, self._on_end)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.connect_timeout_s):
            await loop.create_connection(lambda: socket, self.host, self.port)
        socket.sendMsg(hands.greeting)
        try:
            await asyncio.wait_for(hands.done, self.connect_timeout_s)
        except TimeoutError:
            raise hands.explain_time_out(self.connect_timeout_s) from None
        finally:
            hands.done.cancel()
        self._next_id = hands.first_id or 0
        socket.frames.is_greeting = False

    async def _hang_up(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def _ask_time(self) -> datetime:
        self._check_open()
        self._probing = asyncio.get_running_loop().create_future()
        try:
            self._requests.reqCurrentTime()
            return await asyncio.wait_for(self._probing, self.probe_timeout_s)
        finally:
            self._probing = None

    @property
    def _is_open(self) -> bool:
        return self._socket is not None and self._socket.isConnected()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ConnectionError("Not connected")

    def _on_end(self, reason: str) -> None:
        assert self._socket is not None
        assert self._handshake is not None
        self._handshake.fail(self._handshake.explain_end(self._socket.damage, reason))
        lost = ConnectionError(reason or "the socket was closed")
        self.open_requests.fail_all(lost)
        self._fail_probe(lost)

    def _fail_probe(self, error: Exception) -> None:
        if self._probing is not None and not self._probing.done():
            self._probing.set_exception(error)

    def _explain_id_in_use(self) -> ClientIdInUse:
        return ClientIdInUse(
            f"client id {self.client_id} is in use at {self.host}:{self.port}",
            advice="Choose another, or leave the choice to the program.",
            code=CLIENT_ID_IN_USE,
        )

    # -- messages of the gateway, on the thread's loop ----------------------------------------------------------------

    def _on_message(self, payload: bytes) -> None:
        assert self._handshake is not None
        assert self._socket is not None
        if not self._handshake.server_version:
            version = self._handshake.read_version(payload)
            self._requests = self.library_parts.requests_over(self._socket, self.client_id, version)
            self._decoder = self.library_parts.decoder(self._answers, version)
            self._requests.startApi()
            return
        head, end, _ = payload.partition(b"\0")
        if not end or head not in _READ:
            return
        message, fields = int(head), payload.decode(errors="backslashreplace").split("\0")[:-1]
        if message == _ERROR:
            self._read_error(fields)
        elif message == TIME:
            self._read_time(fields)
        elif message in _ANSWERS:
            self._read_answer(message, fields)
        elif not self._handshake.done.done():
            self._handshake.read(message, fields)

    def _read_time(self, fields: list[str]) -> None:
        calls = self._answers.calls
        self._decoder.interpret(fields)
        if self._probing is None or self._probing.done() or self._answers.calls == calls or not self._answers.time_s:
            return
        with suppress(ValueError, OverflowError, OSError):  # no time: the probe goes on to its time-out
            self._probing.set_result(datetime.fromtimestamp(self._answers.time_s, UTC))

    def _read_answer(self, message: int, fields: list[str]) -> None:
        """Hand an answer to its request. One that cannot be read fails its request at once: the library would leave the request
        to its time-out, and trust the count of bars in front of them."""
        version = self._handshake.server_version if self._handshake is not None else 0
        is_old = message == CONTRACT and version < 164
        request = self._find_request(fields[2 if is_old or message == CONTRACT_END else 1 :])
        if request is None or request.ended.done() or message not in request.answered_by:
            return  # late, of a request that was given up; or no answer to what was asked
        calls = self._answers.calls
        try:
            _check(message, fields, version, len(request.parts))
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
            now=self.now(),
            # Only of bars does "no data" count as an answer.
            during_history=request is not None and request.answered_by == (BARS,),
            outages=self.outages.kinds if request is None else request.outages_seen,
        )
        self._take_note(outcome)
        if request is not None and outcome.ends_request:
            request.must_cancel = outcome.must_cancel
            request.fail(_to_failure(outcome))
            return
        if request is not None or req_id <= 0:
            is_alarming = bool(outcome.begins) or outcome.reconnect or not outcome.is_known
            log.log(logging.WARNING if is_alarming else logging.INFO, "message %d of the gateway: %s", code, text)
            self._recent.append(f"{code} {text}")
            self.notices.append(f"{code} {text}")
            del self.notices[:-100], self._recent[:-100]

    def _find_request(self, fields: Sequence[str]) -> OpenRequest | None:
        """The open request whose id is the first of ``fields``."""
        text = fields[0] if fields else ""
        return self.open_requests.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 12 else None

    def _take_note(self, outcome: Outcome) -> None:
        """What a message means for the connection and for all requests on it, whichever request it names."""
        self.outages = self.outages.after(outcome)
        self._id_in_use = self._id_in_use or outcome.next_client_id
        for request in self.open_requests.values():
            request.outages_seen |= self.outages.kinds
        if outcome.reconnect or outcome.needs_resubscribe:
            # No answer will come any more: better known now than after the time-out.
            for request in self.open_requests.values():
                request.must_cancel = outcome.must_cancel
                request.fail(_to_failure(outcome))
        if outcome.reconnect:
            self._refusal = f"{outcome.text} ({outcome.code})"
            self._fail_probe(outcome.to_error())
            if self._handshake is not None:
                self._handshake.fail(NotAGatewayError(f"refused: {self._refusal}"))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _request(
        self,
        doing: str,
        send: Callable[[int], None],
        cancel: Callable[[int], None] | None,
        timeout_s: float,
        answered_by: tuple[int, ...],
        *,
        always_cancel: bool = False,
    ) -> Any:
        """Send one request and wait for its end: the answer as `AnswerCollector` has it, or an exception. Only messages of the
        kinds ``answered_by`` are taken for answers. ``cancel`` None: such a request cannot be cancelled."""

        async def run() -> Any:
            self._check_open()
            req_id, self._next_id = self._next_id, self._next_id + 1
            request = OpenRequest(answered_by, self.outages.kinds, asyncio.get_running_loop().create_future())
            self.open_requests[req_id] = request
            self._recent = []
            try:
                send(req_id)
                result = await asyncio.wait_for(request.ended, timeout_s)
                request.must_cancel = always_cancel
                return result
            except asyncio.CancelledError:
                request.must_cancel = True
                raise
            except TimeoutError:
                request.must_cancel = True
                recent = f"; messages of the gateway meanwhile: {'; '.join(self._recent[-3:])}" if self._recent else ""
                raise RequestTimeout(
                    f"no answer within {timeout_s:g} s; the request was cancelled{recent}", doing=doing
                ) from None
            finally:
                del self.open_requests[req_id]
                if cancel is not None and request.must_cancel and self._is_open:
                    cancel(req_id)

        try:
            return self._call(run(), timeout_s + 10)
        except TimeoutError:
            raise RequestTimeout(f"no answer within {timeout_s:g} s, and the connection hangs", doing=doing) from None
        except ConnectionError as error:
            damage = self._socket.damage if self._socket is not None else ""
            raise TransientError(
                f"the connection to {self.host}:{self.port} was lost ({damage or error})",
                doing=doing,
                advice="It is made again for the next try.",
            ) from None
        except KtrdrError as error:
            raise error.while_doing(doing) from None


def _check(message: int, fields: list[str], server_version: int, parts: int) -> None:
    """See that an answer is as long as it claims; ``parts`` of it came in earlier messages.

    Raises:
        ValueError, IndexError: it is not.
    """
    if message == BARS:
        check_bars_message(fields)
    elif message == SCHEDULE:
        check_schedule_message(fields)
    elif message == SAMPLES:
        check_samples_message(fields, server_version)
    elif message == CONTRACT:
        check_contract_message(fields, parts)


def _to_failure(outcome: Outcome) -> Exception:
    if outcome.is_empty:
        return NoData(outcome.text)
    failure = outcome.to_error()
    failure.pauses_login = outcome.pauses_login
    return failure
