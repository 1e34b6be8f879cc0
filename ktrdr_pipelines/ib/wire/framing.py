"""Framing: the gateway's bytes, cut into messages. Pure. At most one message is kept, and none longer than a gateway sends."""

from __future__ import annotations

from collections.abc import Iterator

LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 0xFFFFFF
"""IBKR's own clients take no longer message (``ibapi/common.py``, MAX_MSG_LEN); a year of 5-minute bars needs a third of it."""
MAX_GREETING_BYTES = 1 << 16
"""Before the handshake is over: a version, accounts, notices."""


def frame(payload: bytes) -> bytes:
    """``payload`` as a message: its length in four bytes, then itself."""
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


class FrameBuffer:
    """Bytes in, payloads of whole messages out. ``is_greeting``: short messages only, none empty; until the handshake ends."""

    def __init__(self) -> None:
        self.is_greeting = True
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """How many bytes wait for the rest of their message."""
        return len(self._buffer)

    def clear(self) -> None:
        """Drop what is left."""
        self._buffer.clear()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that ``data`` completes, one by one.

        Raises:
            ValueError: a length that no gateway sends; its bytes are not waited for.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if length > (MAX_GREETING_BYTES if self.is_greeting else MAX_MESSAGE_BYTES) or (
                self.is_greeting and not length
            ):
                raise ValueError(f"announced a message of {length} bytes")
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield payload
