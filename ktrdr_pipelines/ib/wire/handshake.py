"""The handshake with a gateway: versions, client id, accounts, the first request id; or why it failed, within moments.

The library's ``Client.connectAsync`` was tried: it waits for its whole time-out when the client id is in use, when the gateway
hangs up (a trusted-IP rule, a container whose gateway is not up), and when something else than a gateway listens.
"""

from __future__ import annotations

import asyncio
import re

from ktrdr_pipelines.ib.wire.diagnostics import NotAGatewayError
from ktrdr_pipelines.ib.wire.framing import frame

VALID_ID, ACCOUNTS = 9, 15
"""Messages that end the handshake, in either order, by IBKR's number."""
_VERSION = re.compile(rb"([0-9]{1,6})\0[^\0]*\0")
"""Server version, time of the connection."""


class HungUpError(NotAGatewayError):
    """A gateway greeted, got the client id, and closed the connection without a message."""


class Handshake:
    """State of one handshake. ``done`` ends when accounts and a request id are there, or with the reason of the failure."""

    def __init__(self, versions: tuple[int, int]) -> None:
        self.server_version = 0
        """0 before the gateway's greeting."""
        self.accounts: list[str] = []
        self.first_id: int | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._versions = versions

    @property
    def greeting(self) -> bytes:
        """The first bytes to send: the range of versions."""
        return b"API\0" + frame(b"v%d..%d" % self._versions)

    def read_version(self, payload: bytes) -> int:
        """The server version of the gateway's greeting, the first message.

        Raises:
            ValueError: no version, or one that is too old.
        """
        found = _VERSION.fullmatch(payload)
        if not found:
            raise ValueError(f"greeted with {payload[:40]!r} instead of a version")
        if (version := int(found[1])) < self._versions[0]:
            raise ValueError(f"greeted with server version {version}; the oldest supported one is {self._versions[0]}")
        self.server_version = version
        return version

    def read(self, message: int, fields: list[str]) -> None:
        """Take note of a message that came after the version.

        Raises:
            ValueError: accounts or a request id that cannot be read.
        """
        if message not in (VALID_ID, ACCOUNTS):
            return
        if len(fields) != 3:
            raise ValueError(f"greeted with a message {message} of {len(fields)} fields")
        if message == ACCOUNTS:
            self.accounts = [account.strip() for account in fields[2].split(",") if account.strip()]
        elif re.fullmatch(r"-?[0-9]{1,10}", fields[2]):
            self.first_id = int(fields[2])
        else:
            raise ValueError(f"greeted with {fields[2][:40]!r} as the next request id")
        if self.accounts and self.first_id is not None and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: NotAGatewayError) -> None:
        """End the handshake with ``error``; nothing if it has ended."""
        if not self.done.done():
            self.done.set_exception(error)

    def explain_end(self, damage: str, reason: str) -> NotAGatewayError:
        """The error when the connection ended first: ``damage`` breaks the protocol, ``reason`` is the socket's."""
        if damage:
            return NotAGatewayError(f"answers, but not as a gateway does: it {damage}")
        seen = HungUpError if self.server_version else NotAGatewayError
        return seen(f"closed the connection before the greeting was over{f' ({reason})' if reason else ''}")

    def explain_time_out(self, timeout_s: float) -> NotAGatewayError:
        """The error when the gateway accepted the connection and the handshake did not end within ``timeout_s``."""
        if self.server_version:
            return NotAGatewayError(
                f"greets (server version {self.server_version}) but does not finish the handshake within {timeout_s:g} s"
            )
        return NotAGatewayError(f"accepts connections but does not greet as a gateway within {timeout_s:g} s")
