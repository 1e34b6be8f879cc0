"""The simulated gateway on a port: an asyncio server with one `ClientConnection` per client, and a thread to run it in.

What is answered is decided in `client_session.py` and `gateway.py`. Use ``async with SimulatedGateway(market)`` in a running
loop, ``with run_in_thread(market)`` everywhere else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from ktrdr_pipelines.errors import InputError, TransientError
from ktrdr_pipelines.simulator.client_connection import ClientConnection
from ktrdr_pipelines.simulator.client_session import Session
from ktrdr_pipelines.simulator.disturbances import Disturbance
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.gateway import Gateway, RequestRecord
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines.simulator.market import Market
from ktrdr_pipelines.simulator.refusals import Refusal
from ktrdr_pipelines.simulator.trading_hours import us_stock_sessions

logger = logging.getLogger(__name__)

MAX_UNREADY = 128
"""Connections that have not finished the handshake. One more drops the oldest of them: real clients finish within moments."""


class SimulatedGateway:
    """A gateway listening on ``host`` and ``port`` (0: the system chooses; see `port` after `start`).

    ``clock`` gives epoch seconds and defaults to the system's; it decides what "now" is for bars, pacing and current time,
    while delays of answers and messages a second are real seconds. ``judge`` True judges pacing by the specification, None
    or False does not. Other keyword arguments are `Gateway`'s: ``pace_clock`` (needed where ``clock`` stands still and
    pacing is judged), ``zone``, ``durations``, ``habits``, ``account``, ``latency_s``, ``on_record``,
    ``server_version``.
    """

    def __init__(
        self,
        market: Market,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
        judge: bool | PacingJudge | None = True,
        faults: Iterable[FaultRule] = (),
        **options: Any,
    ) -> None:
        if isinstance(judge, bool):
            judge = PacingJudge() if judge else None
        self.host = host
        self.gateway = Gateway(market, judge=judge, faults=faults, **options)
        self._wanted_port = port
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._connections: dict[ClientConnection, None] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._return: asyncio.Task[None] | None = None
        self.is_hanging = False

    @property
    def port(self) -> int:
        """The port listened on, 0 before `start`."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server and self._server.sockets else 0

    @property
    def requests(self) -> list[RequestRecord]:
        """Every history, schedule and head request so far, and cancels, oldest first."""
        return self.gateway.requests

    @property
    def violations(self) -> list[tuple[float, str]]:
        """Pacing violations so far: time and rule broken."""
        return self.gateway.judge.violations if self.gateway.judge else []

    async def start(self) -> Self:
        """Listen.

        Raises:
            InputError: the address is not available (port in use, no such host).
        """
        try:
            self._server = await self._listen()
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen on {self.host}:{self._wanted_port}: {error}",
                advice="Choose another port, or 0 for any.",
            ) from error
        return self

    async def _listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._make_connection, self.host, self._wanted_port)

    def _make_connection(self) -> ClientConnection:
        return ClientConnection(Session(self.gateway), self, self._clock)

    def add(self, connection: ClientConnection) -> None:
        """A client has connected."""
        self._connections[connection] = None
        unready = [each for each in self._connections if each.session.is_unready]
        if len(unready) > MAX_UNREADY:
            unready[0].abort()
        connection.set_hanging(self.is_hanging)

    def remove(self, connection: ClientConnection) -> None:
        """A client's connection is gone."""
        self._connections.pop(connection, None)

    async def stop(self) -> None:
        """Stop listening and drop all clients. Safe to call twice."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._return is not None:
            self._return.cancel()
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        self.disconnect_clients()
        await server.wait_closed()

    def disconnect_clients(self) -> None:
        """Drop every connection at once, as a restart does, and keep listening. Call from the gateway's own thread."""
        for connection in list(self._connections):
            connection.abort()

    def broadcast(self, code: int, text: str) -> None:
        """Send a notice to every client (1100, 2105, ...). Call from the gateway's own thread."""
        for connection in list(self._connections):
            connection.perform(connection.session.broadcast(Refusal(code, text)))

    # --- disturbances -------------------------------------------------------------------------------------------------

    def begin(self, disturbance: Disturbance) -> None:
        """Start ``disturbance`` after its delay. Durations are real seconds."""
        if disturbance.delay_s > 0:
            self._later(disturbance.delay_s, lambda: self._begin_late(disturbance))
        else:
            self._begin_now(disturbance)

    def _begin_late(self, disturbance: Disturbance) -> None:
        self.gateway.begin(disturbance)
        self._begin_now(disturbance)

    def _begin_now(self, disturbance: Disturbance) -> None:
        logger.info("%s for %g s", disturbance.kind, disturbance.seconds)
        if disturbance.begin is not None:
            self.broadcast(disturbance.begin.code, disturbance.begin.text)
        if disturbance.kind == "restart":
            self._go_down(disturbance.seconds)
        elif disturbance.kind == "hang":
            self._set_hanging(True)
            self._later(disturbance.seconds, lambda: self._set_hanging(False))
        elif disturbance.is_outage:
            self._later(disturbance.seconds, lambda: self._end_outage(disturbance))

    def _end_outage(self, disturbance: Disturbance) -> None:
        self.gateway.end(disturbance)
        if disturbance.end is not None and all(other.kind != disturbance.kind for other in self.gateway.outages):
            self.broadcast(disturbance.end.code, disturbance.end.text)
        for connection in list(self._connections):
            connection.perform(connection.session.deliver_delayed())

    def _set_hanging(self, is_hanging: bool) -> None:
        self.is_hanging = is_hanging
        for connection in list(self._connections):
            connection.set_hanging(is_hanging)

    def _go_down(self, seconds: float) -> None:
        """Close the port and drop every client; listen on the same port again after ``seconds``."""
        if self._server is None:
            return
        server, self._wanted_port, self._server = self._server, self.port, None
        server.close()
        self.disconnect_clients()

        async def come_back() -> None:
            await asyncio.sleep(seconds)
            while self._server is None:
                try:
                    self._server = await self._listen()
                except OSError:
                    await asyncio.sleep(0.05)  # another process has the port at this moment

        self._return = asyncio.get_running_loop().create_task(come_back())

    def _later(self, delay_s: float, do: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            do()

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


class GatewayThread:
    """A `SimulatedGateway` in a thread with its own event loop. A context manager; attributes are the gateway's.

    Arguments are those of `SimulatedGateway`. Leaving the block stops the gateway and ends the thread.
    """

    def __init__(self, market: Market, **options: Any) -> None:
        self.server = SimulatedGateway(market, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="simulated-gateway", daemon=True)
        self._started = threading.Event()
        self._failure: Exception | None = None
        self.port = 0

    @property
    def host(self) -> str:
        return self.server.host

    @property
    def requests(self) -> list[RequestRecord]:
        return self.server.requests

    @property
    def violations(self) -> list[tuple[float, str]]:
        return self.server.violations

    def call(self, function: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        """Run ``function`` in the gateway's thread and return its result, e.g. ``call(gateway.server.disconnect_clients)``."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self.server.start())
            self.port = self.server.port
        except InputError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self.server.stop())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def start(self, timeout_s: float = 30.0) -> Self:
        """Start the thread and wait until the gateway listens.

        Raises:
            InputError: the address is not available.
            TransientError: the thread did not start in time.
        """
        us_stock_sessions()  # in the caller's thread: it changes the process's warning filters
        self._thread.start()
        if not self._started.wait(timeout_s):
            raise TransientError(f"the simulated gateway did not start within {timeout_s:g} s")
        if self._failure is not None:
            self._thread.join()
            self._loop.close()
            raise self._failure
        if not self.port:
            raise TransientError("the simulated gateway ended while starting")
        return self

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the gateway and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run_in_thread(market: Market, **options: Any) -> GatewayThread:
    """``with run_in_thread(SyntheticMarket()) as gateway: connect(gateway.host, gateway.port)``."""
    return GatewayThread(market, **options)
