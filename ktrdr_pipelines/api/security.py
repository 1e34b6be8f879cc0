"""Access control: loopback only, or a token; no foreign web page; no body larger than any request needs.

Pure ASGI, around everything else, so that refusals reveal no routes. A browser on this machine is not trusted: DNS rebinding
makes a stranger's page speak to 127.0.0.1 (hence the Host check), and a form of any page can post there (hence the Origin check).
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktrdr_pipelines.api.error_responses import refuse
from ktrdr_pipelines.errors import InputError

MAX_BODY_BYTES = 16_384
MAX_QUERY_BYTES = 8_192


def is_loopback(host: str) -> bool:
    """Whether ``host``, as given to listen on, is reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may lead anywhere, also later


def check_binding(host: str, token: str) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        InputError: ``host`` is no loopback address, and there is no token.
    """
    if not is_loopback(host) and not token:
        raise InputError(
            f"{host} can be reached from other machines, and no token is set",
            doing="serving the REST API",
            advice="Set KTRDR_API_TOKEN to a long random text, or serve on 127.0.0.1.",
        )


class Guard:
    """The ASGI application ``app``, for those who may ask."""

    def __init__(self, app: ASGIApp, *, host: str, token: str) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {"127.0.0.1", "localhost", "::1", host.lower().strip("[]")} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._hosts is not None and _name_of(headers.get("host", "")) not in self._hosts:
            refusal = refuse(
                421, "forbidden", "this server is not known by that Host", "Use http://127.0.0.1 and its port."
            )
        elif not _is_same_origin(headers):
            refusal = refuse(403, "forbidden", "web pages of other sites may not use this server")
        elif self._token and not self._has_token(headers):
            refusal = refuse(
                401,
                "unauthorized",
                "the token is missing or wrong",
                "Send the header `Authorization: Bearer` with the value of KTRDR_API_TOKEN.",
                {"WWW-Authenticate": "Bearer"},
            )
        elif len(scope.get("query_string", b"")) > MAX_QUERY_BYTES:
            refusal = refuse(422, "input", f"the query is longer than {MAX_QUERY_BYTES} bytes")
        else:
            body = await _read_body(headers, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
                return
            refusal = refuse(413, "input", f"the body is larger than {MAX_BODY_BYTES} bytes")
        await refusal(scope, receive, send)

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"


def _name_of(host: str) -> str:
    """``host`` of a Host header without its port, in small letters; empty if it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same_origin(headers: Headers) -> bool:
    """False for a request that a browser makes on behalf of another site. Programs send neither header."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:
        return False


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body; None if it is too large, found out without reading more of it than that."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or len(length) > 18 or int(length) > MAX_BODY_BYTES:
        return None
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += bytes(message.get("body", b""))
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    is_told = False

    async def again() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
