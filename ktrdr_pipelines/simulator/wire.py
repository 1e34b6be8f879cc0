"""Bytes to messages and back: the framing of the TWS socket protocol. No I/O; the fields of messages are in `messages.py`.

A frame is a big-endian 4-byte length and that many bytes of payload; the payload is fields, each ended by a NUL. The first
thing a client sends is the bare prefix ``API\\0`` and then one frame with the versions it speaks (``v100..176``).
Sources: the installed clients (the client of ib_insync 0.9.86, the framing of ibapi 9.81).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

HANDSHAKE_PREFIX = b"API\0"
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 16
"""The longest frame accepted from a client. Real requests stay under 2 KB; the limit bounds the memory of one connection."""
MAX_ANSWER_BYTES = 0xFFFFFF
"""The longest payload sent: IBKR's clients refuse longer ones (MAX_MSG_LEN of ibapi)."""


class WireError(ValueError):
    """The peer broke the framing. Later bytes have no meaning, so the connection must be closed."""


class FrameDecoder:
    """Cuts a byte stream into frame payloads. Feed it whatever arrived, in pieces of any size.

    ``max_bytes`` bounds one payload; a longer or empty one raises `WireError`, and so does every later `feed`.
    """

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes
        self._broken = ""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add ``data`` and yield each payload that is now complete, oldest first."""
        if self._broken:
            raise WireError(self._broken)
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if not 0 < length <= self._max_bytes:
                self._broken = f"frame of {length} bytes (allowed: 1 to {self._max_bytes})"
                self._buffer.clear()
                raise WireError(self._broken)
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield payload

    @property
    def has_payload(self) -> bool:
        """True if `feed` would yield or raise without more data."""
        if len(self._buffer) < LENGTH_BYTES:
            return False
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        return not 0 < length <= self._max_bytes or len(self._buffer) >= LENGTH_BYTES + length

    @property
    def pending_bytes(self) -> int:
        """The number of bytes of an unfinished frame."""
        return len(self._buffer)


def split_fields(payload: bytes) -> list[str]:
    """The fields of a payload. Bytes that are not UTF-8 become backslash escapes, as in the clients.

    Raises:
        WireError: the payload does not end with a NUL.
    """
    if not payload.endswith(b"\0"):
        raise WireError("payload does not end with NUL")
    return payload[:-1].decode(errors="backslashreplace").split("\0")


def join_fields(fields: Iterable[object]) -> bytes:
    """Fields as a payload: ``str`` of each and a NUL; True and False as 1 and 0, None as an empty field."""
    return "".join(f"{_text(field)}\0" for field in fields).encode()


def _text(field: object) -> str:
    if field is None:
        return ""
    if isinstance(field, bool):
        return "1" if field else "0"
    return str(field)


def frame(payload: bytes) -> bytes:
    """A payload with its length in front."""
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def encode(*fields: object) -> bytes:
    """One frame with ``fields``."""
    return frame(join_fields(fields))
