"""The routes under ``/ib``: about the gateway, never about bars. The answers are `services/gateway/`'s."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ktrdr_pipelines.api import models
from ktrdr_pipelines.api.coalesce import Turnstile
from ktrdr_pipelines.api.error_responses import refuse_problem
from ktrdr_pipelines.domain.instruments import Instrument
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.services.gateway.cleanup import cleanup as disconnect_everything
from ktrdr_pipelines.services.gateway.config import gateway_config
from ktrdr_pipelines.services.gateway.health import gateway_health
from ktrdr_pipelines.services.gateway.question import Problem
from ktrdr_pipelines.services.gateway.ranges import data_ranges
from ktrdr_pipelines.services.gateway.status import gateway_status
from ktrdr_pipelines.services.gateway.symbols import discover_symbol, list_discovered
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import universe_of

router = APIRouter(prefix="/ib", tags=["gateway"])

_TYPES = {
    "STK": models.InstrumentType.STOCK, "CASH": models.InstrumentType.FOREX, "FUT": models.InstrumentType.FUTURES,
    "CONTFUT": models.InstrumentType.CONTINUOUS_FUTURES, "IND": models.InstrumentType.INDEX,
    "CRYPTO": models.InstrumentType.CRYPTO, "CFD": models.InstrumentType.CFD,
}  # fmt: skip
_MOST_NAMES = 100


def _tools(request: Request) -> tuple[Settings, Turnstile]:
    return request.app.state.settings, request.app.state.gateway_questions


def _state_tools(request: Request) -> tuple[Settings, Turnstile]:
    return request.app.state.settings, request.app.state.state_questions


@router.get("/status", response_model=models.Status, summary="Connection, client ids, pacing budget, farms")
async def status(request: Request) -> Any:
    """Connects for a moment. An unreachable gateway is part of the answer: ``connection.connected`` is false then."""
    settings, questions = _state_tools(request)
    return (await questions.share("status", lambda: gateway_status(settings))).as_dict()


@router.get(
    "/health",
    response_model=models.Health,
    summary="Try what a load needs",
    responses={503: {"model": models.Refusal, "description": "Something failed; the error has what."}},
)
async def health(request: Request) -> Any:
    """Asks the gateway for its time and a contract, and looks at farms, ledger and data folder, within seconds."""
    settings, questions = _state_tools(request)
    found = await questions.share("health", lambda: gateway_health(settings))
    if found.healthy:
        return found.as_dict()
    problem = found.problem or Problem("transient", "a check failed", "")
    failed = ", ".join(check.name for check in found.checks if not check.ok)
    answer = refuse_problem(problem.kind, f"{failed}: {problem.message}", problem.advice)
    answer.status_code = 503
    return answer


@router.get("/config", summary="How the gateway and loads are configured", response_model=models.Answer)
def config(request: Request) -> Any:
    """Without secrets."""
    return gateway_config(_tools(request)[0]).as_dict()


@router.get("/ranges", response_model=models.Ranges, summary="Where histories begin, by IB's head timestamps")
async def ranges(
    request: Request,
    symbols: Annotated[
        list[models.Symbols] | None,
        Query(
            description="Repeated, or separated by commas; without it those of the universe.", max_length=_MOST_NAMES
        ),
    ] = None,
    timeframes: Annotated[
        list[models.Timeframes] | None, Query(description="Repeated, or separated by commas.", max_length=_MOST_NAMES)
    ] = None,
) -> Any:
    """Each symbol takes one request of the pacing budget, unless it was asked within a week. What IB did not answer is
    the ``problem`` of its series."""
    settings, questions = _tools(request)
    names, frames = _split(symbols, "symbols"), _split(timeframes, "timeframes")
    found = await questions.share(("ranges", names, frames), lambda: data_ranges(settings, names, frames))
    return found.as_dict()


@router.post("/cleanup", response_model=models.Cleaned, summary="Disconnect everything from the gateway")
async def cleanup(request: Request) -> Any:
    """Interrupts every process of this program that holds a client id, loads included (what they loaded is kept), and ends the
    runs of dead processes. Takes up to ten seconds."""
    settings, questions = _state_tools(request)
    return (await questions.share("cleanup", lambda: disconnect_everything(settings))).as_dict()


@router.post("/symbols/discover", response_model=models.Discovered, summary="Find the contract of a symbol")
async def discover(request: Request, wanted: models.DiscoverRequest) -> Any:
    """Tried in the specification's order. Several contracts of that name are an error that lists them."""
    settings, questions = _tools(request)
    choice = wanted.choice()
    found = await questions.share(
        ("discover", wanted.symbol, choice), lambda: discover_symbol(settings, wanted.symbol, choice)
    )
    return _describe(found)


@router.get("/symbols/discovered", response_model=models.DiscoveredList, summary="The instruments that are known")
def discovered(
    request: Request, instrument_type: Annotated[models.InstrumentType | None, Query(description="Only these.")] = None
) -> Any:
    """Those of the universe, and those that IB was asked for not long ago. IB is not asked."""
    settings = _tools(request)[0]
    universe = universe_of(settings)
    known = {instrument.symbol: instrument for instrument in list_discovered(settings)}
    known |= {series.instrument.symbol: series.instrument for series in universe}
    found = [_describe(each) for each in known.values()]
    if instrument_type is not None:
        found = [each for each in found if each.instrument_type is instrument_type]
    return models.DiscoveredList(symbols=found, count=len(found))


def _describe(instrument: Instrument) -> models.Discovered:
    return models.Discovered(
        symbol=instrument.symbol,
        instrument_type=_TYPES[instrument.sec_type],
        sec_type=instrument.sec_type,
        con_id=instrument.con_id or None,
        exchange=instrument.exchange,
        primary_exchange=instrument.primary_exchange,
        currency=instrument.currency,
        ib_symbol=instrument.ib_symbol,
        expiry=instrument.expiry,
        what_to_show=instrument.what_to_show,
        time_zone=instrument.time_zone,
    )


def _split(values: list[str] | None, what: str) -> tuple[str, ...] | None:
    """``values`` with commas taken apart; None when nothing was given."""
    if values is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",")))
    if not all(names) or len(names) > _MOST_NAMES:
        raise InputError(
            f"{what} is empty in places, or names more than {_MOST_NAMES}", advice="Write it like symbols=AAPL,MSFT."
        )
    return names
