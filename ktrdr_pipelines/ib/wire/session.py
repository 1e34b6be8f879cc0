"""One connection to a gateway, from handshake to end, and each request on it from its sending to its end.

A thread of its own with its own event loop owns the connection, and the client library is imported inside that thread: in
others it finds no event loop, or the wrong one (docs/dagster_facts.md, 7). Calls from any thread block until the answer, an error
of `errors.py`, or the time-out; several requests may be open at once. The requests are in `client.py`, the gateway's messages in
`dispatcher.py`.

Only the API handshake is made, none of the account, position and order requests that the library's ``IB.connect`` sends:
a loader needs none of them, and each is one more thing to wait for. Messages of other kinds are dropped unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError, RequestTimeout, TransientError
from ktrdr_pipelines.ib.wire.answers import OpenRequest, OpenRequests
from ktrdr_pipelines.ib.wire.diagnostics import WELL_KNOWN_PORTS, NotAGatewayError, explain_unreachable
from ktrdr_pipelines.ib.wire.dispatcher import MESSAGES, Dispatcher
from ktrdr_pipelines.ib.wire.handshake import ACCOUNTS, VALID_ID, Handshake, HungUpError
from ktrdr_pipelines.ib.wire.library import Library, load_library
from ktrdr_pipelines.ib.wire.loop_thread import LoopThread
from ktrdr_pipelines.ib.wire.message_socket import MessageSocket
from ktrdr_pipelines.ib.wire.outages import Outages

CLIENT_ID_IN_USE = 326
_READ = frozenset(str(message).encode() for message in (VALID_ID, ACCOUNTS, *MESSAGES))

T = TypeVar("T")


class ClientIdInUse(TransientError):
    """Another program uses this client id (326). The caller takes the next one of its range."""


class HungUp(GatewayUnreachable):
    """The gateway closed the connection without a message as soon as it knew the client id: at times in place of 326."""


@dataclass
class GatewaySession:
    """See `ib.client.GatewayClient`, which adds the requests."""

    host: str
    port: int
    client_id: int
    _: KW_ONLY
    connect_timeout_s: float
    request_timeout_s: float
    probe_timeout_s: float
    library: str
    """The client library that encodes and decodes."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    ports: Mapping[int, str] = field(default_factory=lambda: WELL_KNOWN_PORTS)
    """Ports to try, and what usually listens there, when ``port`` leads to no gateway."""
    notices: list[str] = field(default_factory=list)
    """Messages of the gateway that ended no request (farms, links, warnings), newest last; at most the last hundred."""

    def __post_init__(self) -> None:
        self.clock_lag_s = 0.0
        """How many seconds the gateway's time was behind this machine's at the last probe; 0 if it was not."""
        self._dispatcher = Dispatcher(self.now, self.notices)
        self._thread: LoopThread | None = None
        self._library: Library | None = None
        self._socket: MessageSocket | None = None
        self._handshake: Handshake | None = None
        self._requests: Any = None
        self._next_id = 0

    # -- life cycle -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the socket is open and the gateway gave no notice. It may be dead nevertheless: see `probe`."""
        return self._thread is not None and self._is_open and not self._dispatcher.refusal

    @property
    def account(self) -> str:
        """First managed account, as the gateway announced it; empty before `connect`."""
        accounts = self._handshake.accounts if self._handshake is not None and self.is_connected else []
        return accounts[0] if accounts else ""

    @property
    def outages(self) -> Outages:
        """What the gateway reports as out at the moment; then "no data" is not believed."""
        return self._dispatcher.outages

    @property
    def open_requests(self) -> OpenRequests:
        """The unanswered requests by id."""
        return self._dispatcher.open_requests

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
        self._dispatcher = Dispatcher(self.now, self.notices)
        self._socket = self._handshake = None
        self._thread = LoopThread(f"ib-gateway-{self.port}", self._load_library)
        try:
            self._connect()
            self.probe()
        except BaseException as error:
            self.close()
            if self._dispatcher.id_in_use and isinstance(error, GatewayUnreachable):  # refused after the handshake
                raise self._explain_id_in_use() from None
            raise

    def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after a failure."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(self._hang_up)

    def cancel_requests(self) -> None:
        """Cancel all open requests, on the wire too, and an attempt to connect; their callers get a ConnectionError or what it
        means to them. The connection stays. For another thread than theirs."""
        thread = self._thread
        if thread is not None:
            thread.cancel_all()

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
            if self._dispatcher.id_in_use:
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

    async def _hang_up(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def _ask_time(self) -> datetime:
        self._check_open()
        self._dispatcher.probing = asyncio.get_running_loop().create_future()
        try:
            self._requests.reqCurrentTime()
            return await asyncio.wait_for(self._dispatcher.probing, self.probe_timeout_s)
        finally:
            self._dispatcher.probing = None

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
        self._dispatcher.fail_all(ConnectionError(reason or "the socket was closed"))

    def _explain_id_in_use(self) -> ClientIdInUse:
        return ClientIdInUse(
            f"client id {self.client_id} is in use at {self.host}:{self.port}",
            advice="Choose another, or leave the choice to the program.",
            code=CLIENT_ID_IN_USE,
        )

    def _on_message(self, payload: bytes) -> None:
        assert self._handshake is not None
        assert self._socket is not None
        if not self._handshake.server_version:
            version = self._handshake.read_version(payload)
            self._requests = self.library_parts.requests_over(self._socket, self.client_id, version)
            self._dispatcher.decode_with(self.library_parts.decoder, version)
            self._requests.startApi()
            return
        head, end, _ = payload.partition(b"\0")
        if not end or head not in _READ:
            return
        message, fields = int(head), payload.decode(errors="backslashreplace").split("\0")[:-1]
        if message in MESSAGES:
            self._dispatcher.read(message, fields)
        elif not self._handshake.done.done():
            self._handshake.read(message, fields)
            self._socket.frames.is_greeting = not self._handshake.done.done()
        if self._dispatcher.refusal:
            self._handshake.fail(NotAGatewayError(f"refused: {self._dispatcher.refusal}"))

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
            open_requests = self.open_requests
            open_requests[req_id] = request
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
                notices = "; ".join(request.notices)
                raise RequestTimeout(
                    f"no answer within {timeout_s:g} s; the request was cancelled"
                    + (f"; messages of the gateway meanwhile: {notices}" if notices else ""),
                    doing=doing,
                ) from None
            finally:
                del open_requests[req_id]
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
