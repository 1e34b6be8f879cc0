"""One socket to a gateway: messages in and out, the end of the connection, and why it ended.

The library's own socket was tried first (``Client.conn`` with ``Client.connectAsync``). It keeps whatever arrives in one buffer
without a bound, copies all of it at every arrival, and offers no public place between socket and decoder where messages could be
bounded or left out. asyncio's ``Protocol`` is that place; the library's client writes to it as it would to its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ktrdr_pipelines.ib.wire.framing import FrameBuffer

_CLOSE_S = 0.2
"""How long a peer that does not read may delay the end."""


class MessageSocket(asyncio.Protocol):
    """``on_message`` gets each payload; a ValueError that it raises ends the connection, with its text as the reason. ``on_end``
    is called once, with the reason or an empty text."""

    def __init__(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self.frames = FrameBuffer()
        self.damage = ""
        """How the peer broke the protocol, in words that follow "it"; empty as long as it did not."""
        self._on_message, self._on_end = on_message, on_end
        self._transport: asyncio.Transport | None = None
        self._is_gone = asyncio.Event()

    # -- asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.damage:
            return
        try:
            for payload in self.frames.feed(data):
                self._on_message(payload)
        except ValueError as error:
            self.damage = str(error)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.frames.clear()
        self._is_gone.set()
        self._on_end(self.damage or (str(exc) if exc else ""))

    # -- what the library's client calls

    def sendMsg(self, data: bytes) -> None:  # noqa: N802 - the library's name
        """Write ``data``, a whole message; nothing once the connection is gone."""
        if self._transport is not None:
            self._transport.write(data)

    def isConnected(self) -> bool:  # noqa: N802 - the library's name
        """Whether the socket is open. It may be and the gateway dead: only an answer shows that it lives."""
        return self._transport is not None

    # -- the end

    async def close(self) -> None:
        """Close in order, so that the gateway frees the client id; after `_CLOSE_S` without order. Harmless when repeated."""
        if self._transport is None:
            return
        if not self._transport.is_closing():
            self._transport.write_eof()
            self._transport.close()
        try:
            await asyncio.wait_for(self._is_gone.wait(), _CLOSE_S)
        except TimeoutError:
            self.abort()
            await asyncio.sleep(0)

    def abort(self) -> None:
        """Close at once, whatever was not sent yet."""
        self.frames.clear()
        if self._transport is not None:
            self._transport.abort()
