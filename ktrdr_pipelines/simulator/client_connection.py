"""One socket of the simulated gateway: an asyncio protocol that carries bytes and timers to and from its `Session`.

What is answered is decided in `client_session.py`; which connections exist, in `server.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from ktrdr_pipelines.simulator.client_session import Action, Begin, Close, Send, Session, Wait
from ktrdr_pipelines.simulator.disturbances import Disturbance

logger = logging.getLogger(__name__)

LINGER_S = 5.0
"""How long a client may take to read what was sent to it before its closing connection is aborted."""


class ConnectionOwner(Protocol):
    """What a connection needs of the server."""

    def add(self, connection: ClientConnection) -> None: ...
    def remove(self, connection: ClientConnection) -> None: ...
    def begin(self, disturbance: Disturbance) -> None: ...


class ClientConnection(asyncio.Protocol):
    """One socket and its session. ``clock`` gives the market's time in epoch seconds."""

    def __init__(self, session: Session, owner: ConnectionOwner, clock: Callable[[], float]) -> None:
        self.session = session
        self._owner = owner
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._is_paused = False
        self._is_hanging = False
        self._due: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.add(self)

    def data_received(self, data: bytes) -> None:
        self._answer(data)

    def _answer(self, data: bytes = b"") -> None:
        # One message at a time: while a client does not read, neither its requests nor its due answers are served;
        # otherwise its answers would pile up here.
        self.perform(self.session.receive(data, self._clock(), time.monotonic(), limit=1))
        while self.session.has_message and not self._is_paused:
            self.perform(self.session.receive(b"", self._clock(), time.monotonic(), limit=1))

    def pause_writing(self) -> None:
        self._is_paused = True
        self._update_reading()

    def resume_writing(self) -> None:
        self._is_paused = False
        while self._due and not self._is_paused:
            self.perform(self.session.wake(self._due.pop(0)))
        if self.session.has_message and not self._is_paused:
            self._answer()
        self._update_reading()

    def set_hanging(self, is_hanging: bool) -> None:
        """Stop reading, or resume it: data that arrived in between is answered late."""
        self._is_hanging = is_hanging
        self._update_reading()

    def _update_reading(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._is_paused or self._is_hanging:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._owner.remove(self)
        self.session.release()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._due.clear()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self.session.release()

    def perform(self, actions: list[Action]) -> None:
        """Carry out actions in order; adjacent sends go out in one write."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        pending: list[bytes] = []
        for action in actions:
            if isinstance(action, Send):
                pending.append(action.data)
            elif isinstance(action, Wait):
                self._set_timer(action)
            elif isinstance(action, Begin):
                self._owner.begin(action.disturbance)
                if transport.is_closing():
                    return
            else:
                self._close(transport, pending, action)
                return
        transport.write(b"".join(pending))

    def _close(self, transport: asyncio.Transport, pending: list[bytes], action: Close) -> None:
        logger.info("closing client %s: %s", self.session.client_id, action.reason)
        transport.write(b"".join(pending))
        transport.close()
        self._timers.add(asyncio.get_running_loop().call_later(LINGER_S, transport.abort))

    def _set_timer(self, wait: Wait) -> None:
        def wake() -> None:
            self._timers.discard(timer)
            if self._is_paused:
                self._due.append(wait.token)
            else:
                self.perform(self.session.wake(wait.token))

        timer = asyncio.get_running_loop().call_later(wait.delay_s, wake)
        self._timers.add(timer)
