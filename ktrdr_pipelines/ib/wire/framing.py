"""The gateway's bytes, cut into messages before the library sees them; never more of them held than one message takes.

What the messages mean is in `client.py` and `decoding.py`. The library keeps whatever arrives in one buffer without a bound,
copies all of it at every arrival, and forgets the rest of a piece in which it met a greeting that it cannot read. Here a
length that no gateway sends ends the connection before its bytes are held, and messages that nobody asked for are skipped
unread.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 0xFFFFFF
"""IBKR's own clients take no longer message (``ibapi/common.py``, MAX_MSG_LEN); a year of 5-minute bars needs a third of it."""
MAX_GREETING_BYTES = 1 << 16
"""Before the greeting is over: a version, accounts, notices."""

_GREETING = re.compile(rb"[0-9]{1,6}\0[^\0]*\0")
"""Server version, time of the connection."""


class BoundedReader:
    """Stands between the socket of the library's ``client`` and its decoder, and hands over whole messages one by one.

    Messages whose id has no entry in the decoder's table of handlers are dropped.
    """

    def __init__(self, client: Any) -> None:
        self.damage = ""
        """Why the peer was hung up on, in words that follow "it"; empty as long as it keeps to the framing."""
        self._client = client
        self._heard = {str(message).encode() for message in client.decoder.handlers}
        self._buffer = bytearray()
        client.conn.hasData -= client._onSocketHasData
        client.conn.hasData += self._feed

    @property
    def pending_bytes(self) -> int:
        """How many bytes wait for the rest of their message."""
        return len(self._buffer)

    def _feed(self, data: bytes) -> None:
        if self.damage:
            return
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            is_ready = self._client.isReady()
            if length > (MAX_MESSAGE_BYTES if is_ready else MAX_GREETING_BYTES) or not (length or is_ready):
                self._hang_up(f"announced a message of {length} bytes")
                return
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            message = bytes(self._buffer[:end])
            del self._buffer[:end]
            if not self._client.conn.isConnected():
                return  # the library has given up, over an earlier message
            try:
                self._hand_over(message)
            except (ValueError, IndexError) as error:  # from the library, and only before the greeting is over
                self._hang_up(f"greeted with what cannot be read ({str(error)[:80]})")
                return

    def _hand_over(self, message: bytes) -> None:
        # The first message is the greeting: the version takes the place of the id.
        is_greeting = not self._client.serverVersion()
        if is_greeting and not _GREETING.fullmatch(message, LENGTH_BYTES):
            raise ValueError(f"no version: {message[LENGTH_BYTES : LENGTH_BYTES + 40]!r}")
        if is_greeting or message[LENGTH_BYTES : message.find(b"\0", LENGTH_BYTES)] in self._heard:
            self._client._onSocketHasData(message)

    def _hang_up(self, damage: str) -> None:
        self.damage = damage
        self._buffer.clear()
        transport: asyncio.Transport | None = self._client.conn.transport
        if transport is not None:
            transport.abort()
