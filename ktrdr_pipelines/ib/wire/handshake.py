"""Come to terms with a gateway, or know within moments why not. Nothing is asked beyond the API's own greeting.

The library's ``connectAsync`` waits for its whole time-out when the client id is in use, when the gateway hangs up (a trusted-IP
rule, a container whose gateway is not up), and when something else than a gateway listens. Here all of them are watched for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ktrdr_pipelines.ib.wire.diagnostics import NotAGatewayError

_WATCH_S = 0.02


class HungUpError(NotAGatewayError):
    """A gateway greeted, was told the client id, and closed the connection without a word."""


async def shake_hands(
    client: Any,
    host: str,
    port: int,
    client_id: int,
    timeout_s: float,
    refusal: Callable[[], str],
    damage: Callable[[], str],
) -> None:
    """Connect the library's ``client``. ``refusal`` gives the words with which the gateway refuses, empty if it did not;
    ``damage`` says how it broke the protocol, empty as long as it did not.

    Raises:
        NotAGatewayError: connected, but no greeting came about; says what was seen. HungUpError: see there.
        OSError, TimeoutError, ValueError: not connected at all (ValueError: what no host name can be).
    """
    ended: list[str] = []

    def on_end(why: str = "") -> None:
        ended.append(why)

    client.conn.disconnected += on_end
    client.apiError += on_end
    attempt = asyncio.ensure_future(client.connectAsync(host, port, client_id, timeout_s))
    is_reached = False
    try:
        while not (attempt.done() or refusal() or ended or damage()):
            await asyncio.wait({attempt}, timeout=_WATCH_S)
            is_reached = is_reached or client.conn.isConnected()
    finally:
        client.conn.disconnected -= on_end
        client.apiError -= on_end
        has_given_up = not attempt.done()
        attempt.cancel()
        await asyncio.wait({attempt})
    try:
        if not has_given_up:
            await attempt
            return
    except TimeoutError:
        if not is_reached:
            raise
    version = client.decoder.serverVersion  # the client forgets its own with the connection
    if refusal():
        raise NotAGatewayError(f"refused: {refusal()}")
    if damage():
        raise NotAGatewayError(f"answers, but not as a gateway does: it {damage()}")
    if has_given_up:
        why = f" ({ended[0]})" if ended and ended[0] else ""
        seen = HungUpError if version else NotAGatewayError
        raise seen(f"closed the connection before the greeting was over{why}")
    if version:
        raise NotAGatewayError(f"greets (server version {version}) but does not finish it within {timeout_s:g} s")
    raise NotAGatewayError(f"accepts connections but does not greet as a gateway within {timeout_s:g} s")
