"""Error responses of the REST API: one JSON shape for everything, and one table from kinds of failures to HTTP status codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ktrdr_pipelines.api import models
from ktrdr_pipelines.errors import InputError, KtrdrError

log = logging.getLogger(__name__)

STATUS_OF = {
    "input": 422,
    "configuration": 503,
    "not_found": 404,
    "permanent": 404,
    "transient": 503,
    "gateway": 503,
    "pacing": 503,
    "timeout": 504,
    "data": 502,
    "store": 507,
    "busy": 503,
    "bug": 500,
    "error": 500,
}
"""By `KtrdrError.family`. IB's refusals are about what was named (no such contract, no permission for it): 404. Trouble of IB or
on the way to it is 503 or 504, bars that break the rules are 502, a disk that refuses is 507. A broken universe file is 503:
the question was right."""

_RETRY_AFTER = {"busy": 10, "pacing": 15, "transient": 15}
_KIND_OF = {404: "not_found", 405: "input", 400: "input", 413: "input", 415: "input", 422: "input"}
_LONGEST = 20_000
"""All candidates of an ambiguous symbol are in one message: dozens for a future."""


class NotHere(KtrdrError):
    """What the path names does not exist."""

    family = "not_found"


def refuse(
    status: int, kind: str, message: str, advice: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The one shape of every refusal."""
    return JSONResponse(
        {"error": {"kind": kind, "message": _clean(message), "advice": _clean(advice)}}, status, dict(headers or {})
    )


def refuse_problem(kind: str, message: str, advice: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal with the status that the table has for ``kind``."""
    more = {"Retry-After": str(_RETRY_AFTER[kind])} if kind in _RETRY_AFTER else {}
    return refuse(STATUS_OF.get(kind, 500), kind, message, advice, {**more, **(headers or {})})


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in that shape."""

    @app.exception_handler(KtrdrError)
    async def of_ours(_request: Request, error: KtrdrError) -> JSONResponse:
        return refuse_problem(error.family, error.message, error.advice)

    @app.exception_handler(RequestValidationError)
    async def of_form(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = []
        for each in error.errors()[:5]:
            # Not the input itself: it may be huge, or no text at all.
            where = ".".join(str(part)[:60] for part in each["loc"] if part not in ("query", "body", "path"))
            problems.append(f"{where}: {_describe_form(each)}" if where else _describe_form(each))
        return refuse(422, "input", "; ".join(problems), "See /docs for what this route takes.")

    @app.exception_handler(HTTPException)
    async def of_http(_request: Request, error: HTTPException) -> JSONResponse:
        kind = _KIND_OF.get(error.status_code, "bug" if error.status_code >= 500 else "input")
        detail = error.detail if isinstance(error.detail, str) else HTTPStatus(error.status_code).phrase
        advice = "See /docs for the routes." if error.status_code in (404, 405) else ""
        return refuse(error.status_code, kind, detail, advice, error.headers)

    @app.exception_handler(Exception)
    async def of_bugs(_request: Request, error: Exception) -> JSONResponse:
        log.error("an unforeseen error", exc_info=error)
        return refuse(500, "bug", "an unforeseen error", "The server's log has the traceback. Please report it.")


def refuse_unknown_parameters(request: Request) -> None:
    """A route's dependency: an unknown parameter is probably misspelt, and the answer would be to another question.

    Raises:
        InputError: there is one.
    """
    route = request.scope.get("route")
    known = [field.alias for field in route.dependant.query_params] if isinstance(route, APIRoute) else []
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        raise InputError(f"unknown parameter {names}", advice=f"This route knows {', '.join(known) or 'none'}.")


_ADVICE_OF = {
    models.TIME_PATTERN: "write 2024-03-05 or 2024-03-05T14:30:00Z",
    models.SYMBOL_PATTERN: "a symbol has at most 32 letters, digits, inner spaces and . & / + ' - signs",
    models.SYMBOLS_PATTERN: "write symbols like AAPL,MSFT",
    models.TIMEFRAMES_PATTERN: "write timeframes like 1h,1d",
}
"""What the refusal has instead of a regular expression."""


def _describe_form(error: Mapping[str, Any]) -> str:
    pattern = (error.get("ctx") or {}).get("pattern")
    return str(error["msg"]) if pattern is None else _ADVICE_OF.get(pattern, "invalid format")


def _clean(text: str) -> str:
    """Text that can be written as UTF-8, of bounded length."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:_LONGEST]
