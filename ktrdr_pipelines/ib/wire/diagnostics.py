"""Why no connection came about, in words that say what to change: which port answers, which setting to look at.

No protocol here: plain connections that are closed at once. Ports: IBKR's API documentation (docs/ib_facts.md, 9).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from ktrdr_pipelines.errors import GatewayUnreachable

WELL_KNOWN_PORTS: Mapping[int, str] = {
    4001: "IB Gateway live",
    4002: "IB Gateway paper",
    7496: "TWS live",
    7497: "TWS paper",
}

_SETTINGS = (
    "Look for a dialog asking to accept the connection, see that the API is enabled and that this machine is a trusted IP "
    "in its settings, or check IB_PORT."
)


class NotAGatewayError(Exception):
    """Something accepted the connection and did not behave as a gateway; the text says what was seen."""


def explain_unreachable(error: BaseException, host: str, port: int, ports: Mapping[int, str]) -> GatewayUnreachable:
    """The error to raise for ``error``, met while connecting to ``host``:``port``. Tries ``ports`` (number to meaning)."""
    where = f"{host}:{port}"
    doing = "connecting to IB"
    if isinstance(error, socket.gaierror | ValueError):
        return GatewayUnreachable(f"host {host!r} is not known ({error})", advice="Check IB_HOST.", doing=doing)
    others = describe_open_ports(host, skip=port, ports=ports)
    if isinstance(error, NotAGatewayError):
        return GatewayUnreachable(f"{where} {error}", advice=f"{_SETTINGS} {others}", doing=doing)
    reason = "connection refused" if isinstance(error, ConnectionRefusedError) else str(error) or repr(error)
    return GatewayUnreachable(
        f"no gateway at {where} ({reason})",
        advice=f"Start TWS or IB Gateway, or try the program with `ktrdr simulator --port {port}`. {others}",
        doing=doing,
    )


def describe_open_ports(
    host: str, *, skip: int, ports: Mapping[int, str] = WELL_KNOWN_PORTS, timeout_s: float = 0.5
) -> str:
    """A sentence saying which of ``ports`` but ``skip`` answer at ``host``. Takes at most ``timeout_s`` for each."""
    found = [
        f"{port} ({meaning})" for port, meaning in ports.items() if port != skip and _answers(host, port, timeout_s)
    ]
    if not found:
        return f"None of IB's usual ports ({', '.join(map(str, ports))}) answers at {host}."
    return f"Something answers at {host} on {', '.join(found)}: set IB_PORT."


def _answers(host: str, port: int, timeout_s: float) -> bool:
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True
