"""The routes under ``/data``: loads, what is held, bars, gaps."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.convertors import StringConvertor, register_url_convertor

from ktrdr_pipelines.api import models
from ktrdr_pipelines.api.bar_pages import MOST_BARS, Format, list_held, read_page, render_page
from ktrdr_pipelines.api.error_responses import NotHere, refuse_problem
from ktrdr_pipelines.api.loads import LoadOrder, LoadRecord, Loads
from ktrdr_pipelines.domain.instruments import Series, file_symbol
from ktrdr_pipelines.domain.time import format_instant, parse_range
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.orchestration.runs.queries import find_run
from ktrdr_pipelines.services.inspection import inspect_one
from ktrdr_pipelines.services.load_inputs import refuse_before_partitions
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.store import utc_now
from ktrdr_pipelines.universe.file import universe_of


class _SymbolParts(StringConvertor):
    """A symbol may hold a slash (EUR/USD), which arrives here decoded: one part of the path or two. `file_symbol` and the
    universe say whether it is one."""

    regex = "(?!load/)[^/]+(?:/[^/]+)?"


register_url_convertor("symbol", _SymbolParts())
router = APIRouter(prefix="/data", tags=["data"])

LONGEST_WAIT_S = 600.0
"""A load that takes longer is answered with 202, though ``wait`` was wished: connections are cut by whatever lies between."""

_LOAD_ANSWERS: dict[int | str, dict[str, Any]] = {
    202: {"model": models.LoadProgress, "description": "Accepted; ask GET /data/load/{run_id} how far it is."},
    404: {"model": models.Refusal, "description": "IB knows no such contract, or gives no permission for it."},
    503: {"model": models.Refusal, "description": "No gateway, or too many loads wait (busy): ask again later."},
}
_NOT_HERE: dict[int | str, dict[str, Any]] = {404: {"model": models.Refusal, "description": "There is none."}}
_NO_WAIT = "false: answer 202 at once. true (default): answer when the load is over, or 202 after ten minutes."

Start = Annotated[models.Time | None, Query(description="Included. ISO 8601; without it from the first held bar.")]
End = Annotated[models.Time | None, Query(description="Not included. ISO 8601; without it to the last held bar.")]


@router.post("/load", response_model=models.LoadResult, responses=_LOAD_ANSWERS, summary="Load missing bars")
async def load(
    request: Request, wanted: models.LoadRequest, wait: Annotated[bool | None, Query(description=_NO_WAIT)] = None
) -> Any:
    """Queues a load, which becomes a Dagster run like any other. A load like one that is queued or going is that one. A symbol
    that the universe does not name is looked up; several contracts of that name are a refusal that lists them.

    The answer of a load that failed as a whole is a refusal; with ``partial`` some windows failed, which ``failures`` lists.
    """
    if wait is not None and wanted.wait is not None and wait != wanted.wait:
        raise InputError("wait is said twice and differs", advice="Say it once.")
    loads, settings = _loads(request), _settings(request)
    record, _ = await asyncio.to_thread(lambda: loads.submit(make_order(wanted, settings)))
    if wait is False or wanted.wait is False:
        return _accepted(loads, record)
    over = asyncio.wrap_future(loads.ended(record))
    try:
        await asyncio.wait_for(asyncio.shield(over), LONGEST_WAIT_S)
    except TimeoutError:
        return _accepted(loads, record)
    if record.result is not None and record.status != "failed":
        return _result(record)
    problem = record.problem or {
        "kind": "bug",
        "message": "the load failed without a word",
        "advice": "See the Dagster UI.",
    }
    return refuse_problem(
        str(problem["kind"]), str(problem["message"]), str(problem["advice"]), {"Location": _place(record)}
    )


@router.get(
    "/load/{run_id}",
    response_model=models.LoadProgress | models.RunProgress,
    responses=_NOT_HERE,
    summary="How far a load is",
)
async def progress(request: Request, run_id: str) -> Any:
    """Of the last thousand loads over this API all that is known; of every other run (a command's, a sensor's, the UI's) what
    Dagster recorded."""
    loads, settings = _loads(request), _settings(request)

    def of_this_api() -> models.LoadProgress | None:
        record = loads.find(run_id)
        return _describe(loads, record) if record is not None else None

    if (ours := await asyncio.to_thread(of_this_api)) is not None:
        return ours
    run = await request.app.state.file_questions.share(("run", run_id), lambda: find_run(settings, run_id))
    if run is None:
        raise NotHere(
            "neither this API nor Dagster knows a load of that id",
            advice="The Dagster UI lists all runs; a load of which nothing was missing is none.",
        )
    return run.as_dict()


@router.get("", response_model=models.HeldList, summary="The series, and what is held of each")
async def held(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
) -> Any:
    """Every series of the universe, in its order."""
    settings = _settings(request)
    return await request.app.state.file_questions.run(lambda: list_held(settings, limit, offset))


@router.get(
    "/{symbol:symbol}/{timeframe}/gaps",
    response_model=models.Gaps,
    responses=_NOT_HERE,
    summary="What is missing, and why",
)
async def gaps(request: Request, symbol: models.SymbolPath, timeframe: models.TimeframePath) -> Any:
    """As `ktrdr gaps`. IB is not asked and nothing is changed."""
    settings = _settings(request)

    def answer() -> dict[str, object]:
        series = find_series(settings, symbol, timeframe)
        return inspect_one(series.instrument.symbol, series.timeframe.name, settings).as_dict()

    return await request.app.state.file_questions.share(("gaps", symbol, timeframe), answer)


@router.get(
    "/{symbol:symbol}/{timeframe}",
    response_model=models.Bars,
    responses={
        **_NOT_HERE,
        200: {
            "description": "The bars; in CSV and Arrow X-Next-Start and X-Notice say what next_start and notices say.",
            "content": {"text/csv": {}, "application/vnd.apache.arrow.stream": {}},
        },
    },
    summary="The held bars of a window",
)
async def bars(
    request: Request,
    symbol: models.SymbolPath,
    timeframe: models.TimeframePath,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, Query(ge=1, le=MOST_BARS, description="Most bars in one answer.")] = 10_000,
    format: Annotated[Format, Query(description="How to write them.")] = Format.JSON,
) -> Response:
    """From the files; IB is not asked. A window with more bars than ``limit`` is answered with its oldest ones, and says where
    to go on."""
    first, last = parse_range(start, end)
    settings = _settings(request)

    def answer() -> Response:
        series = find_series(settings, symbol, timeframe)
        return render_page(series, read_page(settings, series, first, last, limit), format)

    shown: Response = await request.app.state.file_questions.run(answer)
    return shown


def make_order(wanted: models.LoadRequest, settings: Settings) -> LoadOrder:
    """What ``wanted`` means, in one spelling.

    Raises:
        InputError: it cannot be meant.
    """
    file_symbol(wanted.symbol)
    first, last = parse_range(wanted.start or wanted.start_date, wanted.end or wanted.end_date, now=utc_now())
    timeframe = parse_timeframe(wanted.timeframe)
    refuse_before_partitions(timeframe, first, last, settings)
    choice = wanted.choice()
    return LoadOrder(
        _spell(wanted.symbol, settings),
        timeframe.name,
        str(wanted.mode),
        format_instant(first) if first else None,
        format_instant(last) if last else None,
        choice.sec_type,
        choice.exchange,
        choice.currency,
        choice.con_id,
    )


def _spell(symbol: str, settings: Settings) -> str:
    """``symbol`` as the universe spells it, else in capitals, as IB is asked for it."""
    if symbol == symbol.upper() and "." not in symbol and "/" not in symbol:
        return symbol  # `Universe.find_instrument` would try no other spelling
    instrument = universe_of(settings).find_instrument(symbol)
    return instrument.symbol if instrument else symbol.upper()


def find_series(settings: Settings, symbol: str, timeframe: str) -> Series:
    """The series that the path names.

    Raises:
        NotHere: the universe names no such instrument. InputError: no symbol, no timeframe.
    """
    file_symbol(symbol)
    universe = universe_of(settings)
    instrument = universe.find_instrument(symbol)
    if instrument is None:
        raise NotHere(
            f"{symbol} is not in the universe", advice="POST /api/v1/data/load looks it up at IB and adds it."
        )
    return Series(instrument, parse_timeframe(timeframe))


def _settings(request: Request) -> Settings:
    return request.app.state.settings  # type: ignore[no-any-return]


def _loads(request: Request) -> Loads:
    return request.app.state.loads  # type: ignore[no-any-return]


def _place(record: LoadRecord) -> str:
    return f"/api/v1/data/load/{record.run_id}"


def _accepted(loads: Loads, record: LoadRecord) -> JSONResponse:
    return JSONResponse(_describe(loads, record).model_dump(mode="json"), 202, {"Location": _place(record)})


def _result(record: LoadRecord) -> dict[str, Any]:
    return {**(record.result or {}), "run_id": record.run_id, "run_ids": record.run_ids}


def _describe(loads: Loads, record: LoadRecord) -> models.LoadProgress:
    order = record.order
    return models.LoadProgress.model_validate({
        "run_id": record.run_id,
        "status": record.status,
        "symbol": order.symbol,
        "timeframe": order.timeframe,
        "mode": order.mode,
        "start": order.start,
        "end": order.end,
        "sec_type": order.sec_type,
        "exchange": order.exchange,
        "currency": order.currency,
        "con_id": order.con_id,
        "accepted_at": record.accepted_at,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "loads_before": loads.position(record),
        "requests_planned": record.requests_planned,
        "requests_done": record.requests_done,
        "bars": record.bars,
        "windows_failed": record.windows_failed,
        "waiting_for": record.waiting_for,
        "waiting_until": record.waiting_until,
        "result": _result(record) if record.result else None,
        "problem": record.problem,
    })  # fmt: skip
