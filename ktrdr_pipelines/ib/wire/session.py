"""One connection to a gateway: how it comes about, lives and ends, and one request on it from its sending to its end. The only
importer of ib_insync.

A thread of its own with its own event loop owns the connection, and the library is imported inside that thread: in
others it finds no event loop, or the wrong one (docs/dagster_facts.md, 7). Calls from any thread block until the answer, an
error of `errors.py`, or the time-out. What can be asked is in `client.py`, how answers are read in `decoding.py`, what is down in
`outages.py`, what a code means in `codes.py`, which alone decides whether a message ends a request.

Only the API handshake is made, none of the account, position and order requests that the library's `IB.connect` sends:
a loader needs none of them, and each is one more thing to wait for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError, RequestTimeout, TransientError
from ktrdr_pipelines.ib.codes import Hold, Outcome, classify
from ktrdr_pipelines.ib.wire.decoding import (
    check_bars_message,
    check_contract_message,
    check_samples_message,
    check_schedule_message,
    read_error,
    report_unreadable,
)
from ktrdr_pipelines.ib.wire.diagnostics import WELL_KNOWN_PORTS, NotAGatewayError, explain_unreachable
from ktrdr_pipelines.ib.wire.framing import BoundedReader
from ktrdr_pipelines.ib.wire.handshake import HungUpError, shake_hands
from ktrdr_pipelines.ib.wire.loop_thread import LoopThread
from ktrdr_pipelines.ib.wire.outages import Down

log = logging.getLogger(__name__)

CLIENT_ID_IN_USE = 326
_ERROR, _VALID_ID, _ACCOUNTS, _TIME = 4, 9, 15, 49
CONTRACT, BARS, CONTRACT_END, SAMPLES, HEAD, SCHEDULE = 10, 17, 52, 79, 88, 106
"""Messages that answer requests, by IBKR's number."""
_HEARD = (_ERROR, _VALID_ID, CONTRACT, _ACCOUNTS, BARS, _TIME, CONTRACT_END, SAMPLES, HEAD, SCHEDULE)
"""Messages that are listened to. The library keeps what others say (orders, positions, news), and lets many of them end any
request whose id they carry."""
_PROBE = "currentTime"
"""The library's name for the request that `GatewayClient.probe` sends."""

T = TypeVar("T")


class ClientIdInUse(TransientError):
    """Another program holds this client id (326). The caller takes the next one of its range."""


class HungUp(GatewayUnreachable):
    """The gateway closed the connection without a word as soon as it knew the client id: at times this is how it says 326."""


@dataclass
class _Open:
    """An unanswered request. ``answered_by``: the messages that can be its answer. ``seen_down``: everything that was down at
    any moment since it was sent. ``must_cancel``: it is over, but the gateway may not know."""

    answered_by: tuple[int, ...]
    seen_down: frozenset[Hold]
    must_cancel: bool = False


class NoData(Exception):
    """IB said in so many words that the window holds no data."""


@dataclass
class Conversation:
    """See `ib.client.GatewayClient`, which adds the questions."""

    host: str
    port: int
    client_id: int
    connect_timeout_s: float = 15.0
    request_timeout_s: float = 120.0
    probe_timeout_s: float = 10.0
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    ports: Mapping[int, str] = field(default_factory=lambda: WELL_KNOWN_PORTS)
    """Ports to try, and what usually listens there, when ``port`` leads to no gateway."""
    notices: list[str] = field(default_factory=list)
    """Messages of the gateway that ended no request (farms, links, warnings), newest last; at most the last hundred."""

    def __post_init__(self) -> None:
        self.down = Down()
        """What the gateway says is down at the moment; then "no data" is not believed."""
        self.clock_lag_s = 0.0
        """How many seconds the gateway's time was behind this machine's at the last probe; 0 if it was not."""
        self._thread: LoopThread | None = None
        self._ib: Any = None
        self._lib: Any = None
        self._id_in_use = False
        self._refusal = ""
        self._frames: BoundedReader | None = None
        self._open: dict[int, _Open] = {}
        self._heard: list[str] = []

    # -- life cycle -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """What the library believes, unless the gateway gave notice. It can be wrong on a dead connection: `probe` asks."""
        return self._ib is not None and bool(self._ib.isConnected()) and not self._refusal

    @property
    def account(self) -> str:
        """First managed account, as the gateway announced it; empty before `connect`."""
        accounts = self._ib.client.getAccounts() if self.is_connected else []
        return str(accounts[0]).strip() if accounts else ""

    def connect(self) -> None:
        """Connect and prove that the gateway answers.

        Raises:
            ClientIdInUse: another program holds the client id.
            HungUp: closed without a word; may mean that the client id is in use.
            GatewayUnreachable: nothing there, or not a gateway; says which well-known port does answer.
        """
        if self._thread is not None:
            raise RuntimeError("already connected")
        self._id_in_use, self._refusal, self.down = False, "", Down()
        self._thread = LoopThread(f"ib-gateway-{self.port}", self._load_library)
        try:
            self._shake_hands()
            self.probe()
        except BaseException as error:
            self.close()
            if self._id_in_use and isinstance(error, GatewayUnreachable):  # said after the greeting
                raise self._explain_id_in_use() from None
            raise

    def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after a failure."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(self._hang_up)

    async def _hang_up(self) -> None:
        connection = self._ib.client.conn
        if not connection.isConnected():
            return
        transport = connection.transport
        self._ib.client.disconnect()
        # Let it say goodbye, so that the gateway frees the client id; but not for ever to a peer that does not read.
        for _ in range(20):
            if not connection.isConnected():
                return
            await asyncio.sleep(0.01)
        transport.abort()
        await asyncio.sleep(0)

    def probe(self) -> datetime:
        """Ask the gateway for its time: a connection may look alive and be dead (laptop sleep, silent hang).

        Sets `clock_lag_s`. The answer is in whole seconds, so that a lag below one second does not show.

        Raises:
            GatewayUnreachable: no answer within ``probe_timeout_s``. HungUp: the connection was closed instead.
        """

        async def ask() -> Any:
            try:
                return await asyncio.wait_for(self._ib.reqCurrentTimeAsync(), self.probe_timeout_s)
            finally:
                self._forget(_PROBE)

        asked_at = self.now()
        try:
            answer: datetime = self._call(ask(), self.probe_timeout_s + 5)
        except GatewayUnreachable:
            raise
        except TransientError as error:  # a farewell that came instead (326)
            raise GatewayUnreachable(error.observed, advice=error.advice, code=error.code) from None
        except (TimeoutError, ConnectionError) as error:
            is_hung_up = isinstance(error, ConnectionError)
            raise (HungUp if is_hung_up else GatewayUnreachable)(
                f"{self.host}:{self.port} is connected but does not tell the time ({type(error).__name__})",
                advice="Restart TWS or the gateway, or look whether it shows a dialog.",
            ) from None
        is_behind = asked_at - answer > timedelta(seconds=1)
        self.clock_lag_s = (self.now() - answer).total_seconds() if is_behind else 0.0
        return answer

    # -- inside -----------------------------------------------------------------------------------------------------

    def _load_library(self) -> None:
        import ib_insync  # here and nowhere else: it looks for this thread's event loop

        # What the library logs as an error reaches the caller as an exception; twice would confuse.
        logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
        self._lib = ib_insync
        self._ib = ib_insync.IB()  # type: ignore[no-untyped-call]
        known = self._ib.client.decoder.handlers
        readers = {message: known[message] for message in _HEARD} | {_ERROR: self._read_error}
        for message in (CONTRACT, BARS, CONTRACT_END, SAMPLES, HEAD, SCHEDULE):
            readers[message] = self._guard(message, known[message])
        self._ib.client.decoder.handlers = readers
        self._frames = BoundedReader(self._ib.client)

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._thread is None:
            work.close()
            raise ConnectionError("the connection is closed")
        return self._thread.call(work, timeout_s)

    def _shake_hands(self) -> None:
        self._ib.wrapper.clientId = self.client_id
        work = shake_hands(
            self._ib.client,
            self.host,
            self.port,
            self.client_id,
            self.connect_timeout_s,
            lambda: self._refusal,
            lambda: self._damage,
        )
        try:
            self._call(work, self.connect_timeout_s * 2 + 5)
        except (OSError, ValueError, NotAGatewayError) as error:
            if self._id_in_use:
                raise self._explain_id_in_use() from None
            is_hung_up = isinstance(error, HungUpError)
            if isinstance(error, NotAGatewayError) and self.notices:
                error = NotAGatewayError(f"{error}; it said: {'; '.join(self.notices[-3:])}")
            explained = explain_unreachable(error, self.host, self.port, self.ports)
            if is_hung_up:
                explained = HungUp(explained.observed, doing=explained.doing, advice=explained.advice)
            raise explained from None

    @property
    def _damage(self) -> str:
        return self._frames.damage if self._frames is not None else ""

    def _explain_id_in_use(self) -> ClientIdInUse:
        return ClientIdInUse(
            f"client id {self.client_id} is in use at {self.host}:{self.port}",
            advice="Choose another, or leave the choice to the program.",
            code=CLIENT_ID_IN_USE,
        )

    # -- messages of the gateway, on the owner's loop ---------------------------------------------------------------

    def _read_error(self, fields: Sequence[str]) -> None:
        try:
            req_id, code, text = read_error(fields)
        except ValueError as error:
            if len(fields) > 2 and fields[2].isdecimal() and int(fields[2]) in self._open:
                self._fail(int(fields[2]), report_unreadable(error, fields))
            return
        open_request = self._open.get(req_id)
        outcome = classify(
            code,
            text,
            now=self.now(),
            # Only of bars does "no data" count as an answer.
            during_history=open_request is not None and open_request.answered_by == (BARS,),
            held=self.down.kinds if open_request is None else open_request.seen_down,
        )
        self._take_note(outcome)
        if open_request is not None and outcome.ends_request:
            open_request.must_cancel = outcome.must_cancel
            self._fail(req_id, _to_failure(outcome))
            return
        if open_request is not None or req_id <= 0:
            is_alarming = bool(outcome.holds) or outcome.reconnect or not outcome.is_known
            log.log(logging.WARNING if is_alarming else logging.INFO, "the gateway says %d: %s", code, text)
            self._heard.append(f"{code} {text}")
            self.notices.append(f"{code} {text}")
            del self.notices[:-100], self._heard[:-100]

    def _take_note(self, outcome: Outcome) -> None:
        """What a message means for the connection and for all requests on it, whomever it names."""
        self.down = self.down.after(outcome)
        self._id_in_use = self._id_in_use or outcome.next_client_id
        for each in self._open.values():
            each.seen_down |= self.down.kinds
        if outcome.reconnect:
            self._refusal = f"{outcome.text} ({outcome.code})"
        if outcome.reconnect or outcome.needs_resubscribe:
            # No answer will come any more: better known now than after the time-out.
            for req_id, each in self._open.items():
                each.must_cancel = outcome.must_cancel
                self._fail(req_id, _to_failure(outcome))
        if outcome.reconnect:
            self._fail(_PROBE, outcome.to_error())

    def _guard(self, message: int, read: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        """``read``, but an answer that cannot be read fails its request instead of leaving it to its time-out."""

        def reading(fields: list[str]) -> None:
            is_old = message == CONTRACT and self._ib.client.serverVersion() < 164
            text = fields[2 if is_old or message == CONTRACT_END else 1]
            open_request = self._open.get(req_id := int(text) if text.isdecimal() else -1)
            if open_request is None or message not in open_request.answered_by:
                return  # late, of a request that was given up; or no answer to what was asked
            try:
                if message == BARS:
                    check_bars_message(fields)
                elif message == SCHEDULE:
                    check_schedule_message(fields)
                elif message == SAMPLES:
                    check_samples_message(fields, self._ib.client.serverVersion())
                elif message == CONTRACT:
                    check_contract_message(fields, len(self._ib.wrapper._results.get(req_id, ())))
                read(fields)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the request has no answer
                self._fail(req_id, report_unreadable(error, fields))

        return reading

    def _fail(self, req_id: int | str, error: Exception) -> None:
        ended = self._ib.wrapper._futures.get(req_id)
        if ended is not None and not ended.done():
            ended.set_exception(error)

    def _forget(self, key: Any) -> None:
        """So that a late answer fills no list and nothing grows."""
        wrapper = self._ib.wrapper
        for table in (self._open, wrapper._futures, wrapper._results, wrapper._reqId2Contract):
            table.pop(key, None)

    def _request(
        self,
        doing: str,
        send: Callable[[int], None],
        cancel: Callable[[int], None],
        timeout_s: float,
        contract: Any,
        answered_by: tuple[int, ...],
        *,
        always_cancel: bool = False,
    ) -> Any:
        """Send one request and wait for its end: the library's result, or an exception. Only messages of the kinds
        ``answered_by`` are taken for answers."""

        async def run() -> Any:
            client, wrapper = self._ib.client, self._ib.wrapper
            req_id = client.getReqId()  # ConnectionError if there is none
            ended = wrapper.startReq(req_id, contract)
            this = self._open[req_id] = _Open(answered_by, self.down.kinds)
            self._heard = []
            try:
                send(req_id)
                result = await asyncio.wait_for(ended, timeout_s)
                if always_cancel and client.isReady():
                    cancel(req_id)
                return result
            except (TimeoutError, asyncio.CancelledError) as error:
                if client.isReady():
                    cancel(req_id)
                if isinstance(error, asyncio.CancelledError):
                    raise
                said = f"; meanwhile the gateway said: {'; '.join(self._heard[-3:])}" if self._heard else ""
                raise RequestTimeout(
                    f"no answer within {timeout_s:g} s; the request was cancelled{said}", doing=doing
                ) from None
            except (KtrdrError, NoData):
                if this.must_cancel and client.isReady():
                    cancel(req_id)
                raise
            finally:
                self._forget(req_id)

        try:
            return self._call(run(), timeout_s + 10)
        except TimeoutError:
            raise RequestTimeout(f"no answer within {timeout_s:g} s, and the connection hangs", doing=doing) from None
        except ConnectionError as error:
            raise TransientError(
                f"the connection to {self.host}:{self.port} was lost ({self._damage or error})",
                doing=doing,
                advice="It is made again for the next try.",
            ) from None
        except KtrdrError as error:
            raise error.while_doing(doing) from None


def _to_failure(outcome: Outcome) -> Exception:
    if outcome.proven_empty:
        return NoData(outcome.text)
    failure = outcome.to_error()
    failure.pauses_login = outcome.pauses_login
    return failure
