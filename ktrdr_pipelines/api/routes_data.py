"""The routes under ``/data``: loads, what is held, bars, gaps."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import State

from ktrdr_pipelines.api import models
from ktrdr_pipelines.api.bar_pages import MOST_BARS, Format, list_held, read_page, render_page
from ktrdr_pipelines.api.error_responses import NotHere, refuse_problem
from ktrdr_pipelines.api.loads import Loads
from ktrdr_pipelines.domain.instruments import Series, file_symbol
from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.domain.time import format_instant, parse_range
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.runs.load_state import LoadState
from ktrdr_pipelines.orchestration.runs.queries import find_run, is_run_id
from ktrdr_pipelines.services.inspection import inspect_one
from ktrdr_pipelines.services.load_inputs import refuse_before_partitions
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.store import utc_now
from ktrdr_pipelines.universe.file import universe_of


class _SymbolParts(StringConvertor):
    """A symbol may have a slash (EUR/USD), which arrives here decoded: one part of the path or two. `file_symbol` and the
    universe decide whether it is one."""

    regex = "(?!load/)[^/]+(?:/[^/]+)?"


register_url_convertor("symbol", _SymbolParts())
router = APIRouter(prefix="/data", tags=["data"])

LONGEST_WAIT_S = 600.0
"""A load that takes longer is answered with 202, although ``wait`` was asked for: proxies cut connections that stay silent."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
"""Between two looks at a load that is waited for."""

_LOAD_ANSWERS: dict[int | str, dict[str, Any]] = {
    202: {"model": models.LoadProgress, "description": "Accepted; its state is at GET /data/load/{run_id}."},
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
    """Submits a run to Dagster's queue. A load equal to one that is queued or running joins it. A symbol that the universe does
    not name is looked up first, and so is the start of a history where only IB knows it; several contracts of that name are an
    error that lists them. An empty window is answered at once, without a run.

    The answer of a load that failed as a whole is a refusal; with ``partial`` some windows failed, which ``failures`` lists.
    """
    if wait is not None and wanted.wait is not None and wait != wanted.wait:
        raise InputError("wait is given twice and differs", advice="Give it once.")
    loads, questions = _loads(request), request.app.state.load_questions
    asked = make_request(wanted, _settings(request))
    found = await questions.run(lambda: loads.submit(asked))
    if isinstance(found, LoadReport):
        return {**found.as_dict(), "run_id": None, "run_ids": []}
    if wait is not False and wanted.wait is not False:
        found = await _wait(request.app.state, found)
    if not found.is_over:
        return JSONResponse(_describe(found).model_dump(mode="json"), 202, {"Location": _place(found)})
    if found.result is not None and found.status != "failed":
        return _result(found)
    problem = found.problem or {
        "kind": "bug",
        "message": "the load failed without a reason",
        "advice": "See the Dagster UI.",
    }
    return refuse_problem(
        str(problem["kind"]), str(problem["message"]), str(problem["advice"]), {"Location": _place(found)}
    )


async def _wait(app: State, state: LoadState) -> LoadState:
    """``state`` when its load is over, after `LONGEST_WAIT_S`, or when the server ends. All who wait share its readings."""
    run_id = state.run_id
    deadline, pause = time.monotonic() + LONGEST_WAIT_S, FIRST_PAUSE_S
    while not state.is_over and not app.is_ending and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, LONGEST_PAUSE_S)
        latest: LoadState | None = await app.load_questions.share(("load", run_id), lambda: app.loads.find(run_id))
        state = latest or state
    return state


@router.get(
    "/load/{run_id}",
    response_model=models.LoadProgress | models.RunProgress,
    responses=_NOT_HERE,
    summary="The state of a load",
)
async def progress(request: Request, run_id: str) -> Any:
    """From Dagster's records: of loads over this API with their progress and result, of every other run (a command's, a sensor's,
    the UI's) what is recorded of its partitions."""
    loads, settings = _loads(request), _settings(request)

    def answer() -> models.LoadProgress | dict[str, object] | None:
        if not is_run_id(run_id):
            return None
        state = loads.find(run_id)
        if state is not None:
            return _describe(state)
        run = find_run(settings, run_id)
        return run.as_dict() if run is not None else None

    found = await request.app.state.file_questions.share(("run", run_id), answer)
    if found is None:
        raise NotHere(
            "Dagster has no load of that id",
            advice="Check the id; the Dagster UI lists all runs.",
        )
    return found


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
    """As `ktrdr gaps`. Asks IB nothing and changes nothing."""
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
            "description": "The bars; in CSV and Arrow X-Next-Start and X-Notice have what next_start and notices have.",
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
    """From the files; IB is not asked. A window with more bars than ``limit`` is answered with its oldest ones, and where to go
    on."""
    first, last = parse_range(start, end)
    settings = _settings(request)

    def answer() -> Response:
        series = find_series(settings, symbol, timeframe)
        return render_page(series, read_page(settings, series, first, last, limit), format)

    shown: Response = await request.app.state.file_questions.run(answer)
    return shown


def make_request(wanted: models.LoadRequest, settings: Settings) -> LoadRequest:
    """The request that the JSON describes.

    Raises:
        InputError: invalid input, or the window lies before the first partition.
    """
    start, end = wanted.start or wanted.start_date, wanted.end or wanted.end_date
    request = LoadRequest.parse(
        wanted.symbol, wanted.timeframe, wanted.mode, start=start, end=end, choice=wanted.choice(), now=utc_now()
    )
    refuse_before_partitions(request.timeframe, request.start, request.end, settings)
    return request


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


def _place(state: LoadState) -> str:
    return f"/api/v1/data/load/{state.run_id}"


def _result(state: LoadState) -> dict[str, Any]:
    return {**(state.result or {}), "run_id": state.run_id, "run_ids": list(state.run_ids)}


def _describe(state: LoadState) -> models.LoadProgress:
    request = state.request.to_config()
    return models.LoadProgress.model_validate({
        **request,
        "start": request["start"] or None,
        "end": request["end"] or None,
        "run_id": state.run_id,
        "status": state.status,
        "accepted_at": format_instant(state.accepted_at),
        "started_at": format_instant(state.started_at) if state.started_at else None,
        "ended_at": format_instant(state.ended_at) if state.ended_at else None,
        "loads_before": state.loads_before,
        **state.progress,
        "result": _result(state) if state.result else None,
        "problem": state.problem,
    })  # fmt: skip
