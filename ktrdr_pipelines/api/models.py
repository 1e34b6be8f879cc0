"""The JSON of the REST API: what is accepted, and what is answered, for checking and for OpenAPI.

The answers themselves are made by `services/gateway/`, `services/inspection.py` and `loading/report.py`; the models describe
them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ktrdr_pipelines.domain.load_request import Choice, Mode
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES

SYMBOL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 .&/+'\-]{0,31}$"
_LISTED = "^({0})(,({0}))*$"
TIME_PATTERN = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+\-]\d\d:?\d\d)?)?$"
Timeframe = StrEnum("Timeframe", {f"t{name}": name for name in (*TIMEFRAMES, "1M")})  # type: ignore[misc]
"""Every timeframe; ``1M`` is read as ``1mo``."""

Symbol = Annotated[str, StringConstraints(pattern=SYMBOL_PATTERN, max_length=32)]
Time = Annotated[
    str,
    StringConstraints(pattern=TIME_PATTERN),
    Field(description="ISO 8601; a bare date is its midnight UTC, a time without a zone is UTC."),
]
SYMBOLS_PATTERN = _LISTED.format(SYMBOL_PATTERN[1:-1])
TIMEFRAMES_PATTERN = _LISTED.format("|".join((*TIMEFRAMES, "1M")))
Symbols = Annotated[str, StringConstraints(pattern=SYMBOLS_PATTERN, max_length=800)]
"""One symbol, or several separated by commas."""
Timeframes = Annotated[str, StringConstraints(pattern=TIMEFRAMES_PATTERN, max_length=400)]
SymbolPath = Annotated[
    str,
    Path(
        description="As the universe names it: AAPL, BRK B, EURUSD.",
        pattern=SYMBOL_PATTERN,
        max_length=32,
        examples=["AAPL"],
    ),
]
TimeframePath = Annotated[Timeframe, Path(description="1M is read as 1mo.", examples=["1d"])]


class Problem(BaseModel):
    """What failed and what to do about it."""

    kind: str = Field(
        description="input, configuration, not_found, permanent, transient, gateway, pacing, timeout, data, store, busy, bug …"
    )
    message: str
    advice: str


class Refusal(BaseModel):
    """The one shape of everything that is not an answer."""

    error: Problem


class Answer(BaseModel):
    """More fields may come."""

    model_config = ConfigDict(extra="allow")


class Range(BaseModel):
    """The first and the last of something; null when there is none."""

    first: str | None
    last: str | None


class ContractChoice(BaseModel):
    """What chooses among several contracts of one symbol."""

    sec_type: Literal["", "STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO", "CFD"] = ""
    exchange: Annotated[str, StringConstraints(pattern=r"^([A-Z0-9][A-Z0-9.]{0,15})?$")] = ""
    currency: Annotated[str, StringConstraints(pattern=r"^([A-Z]{3})?$")] = ""
    con_id: Annotated[int, Field(ge=0, lt=1 << 31, description="IB's contract id; 0 is none.")] = 0

    def choice(self) -> Choice:
        """The same as discovery wants it."""
        return Choice(self.sec_type, self.exchange, self.currency, self.con_id)


class LoadRequest(ContractChoice):
    """What to load. ``start`` may be called ``start_date`` and ``end`` ``end_date``, but not both.

    ``sec_type``, ``exchange``, ``currency`` and ``con_id`` choose among several contracts of a symbol that the universe does not
    name yet; for one that it names they have to be true of it.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "allOf": [{"not": {"required": ["start", "start_date"]}}, {"not": {"required": ["end", "end_date"]}}],
            "examples": [
                {
                    "symbol": "MSFT",
                    "timeframe": "1d",
                    "mode": "full",
                    "start": "2023-01-01T00:00:00Z",
                    "end": "2023-02-01",
                }
            ],
        },
    )

    symbol: Symbol
    timeframe: Timeframe
    mode: Mode = Mode.TAIL
    start: Time | None = Field(None, description="Included.")
    start_date: Time | None = Field(None, description="Another name of start.")
    end: Time | None = Field(None, description="Not included; without it now.")
    end_date: Time | None = Field(None, description="Another name of end.")
    wait: bool | None = Field(None, description="Another place for the query parameter of this name.", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_two_names(cls, given: Any) -> Any:
        for one, other in (("start", "start_date"), ("end", "end_date")):
            if isinstance(given, dict) and one in given and other in given:
                raise ValueError(f"{one} and {other} are two names of one thing; give one of them")
        return given


class LoadResult(Answer):
    """What a load did."""

    status: Literal["success", "partial", "failed"] = Field(description="partial: some windows failed, see failures.")
    fetched_bars: int
    cached_before: bool
    merged_file: str
    gaps_analyzed: int
    segments_fetched: int
    ib_requests_made: int
    run_id: str | None = Field(description="Its Dagster run; null when there was nothing to load.")
    run_ids: list[str] = Field(description="All its runs: two where the process of the first was killed.")
    failures: list[dict[str, Any]]


class LoadProgress(BaseModel):
    """The state of a load. ``result`` is null until it is over, and if it failed as a whole."""

    run_id: str
    status: Literal["queued", "running", "success", "partial", "failed"]
    symbol: str
    timeframe: str
    mode: str
    start: str | None
    end: str | None
    sec_type: str = Field(
        description="This and the next three: the choice of contract as given; empty or 0: not given."
    )
    exchange: str
    currency: str
    con_id: int
    accepted_at: str
    started_at: str | None
    ended_at: str | None
    loads_before: int | None = Field(description="How many loads are before it in the queue.")
    requests_planned: int
    requests_done: int
    bars: int = Field(description="New bars in the file so far.")
    windows_failed: int
    waiting_for: str | None
    waiting_until: str | None
    result: LoadResult | None
    problem: dict[str, Any] | None


class RunSeries(BaseModel):
    """One series of a run."""

    symbol: str
    timeframe: str
    partitions_completed: list[str]


class RunProgress(BaseModel):
    """How far a run of another entry point is, as Dagster recorded it. ``partitions``: its first and its last."""

    run_id: str
    status: Literal["queued", "running", "success", "partial", "failed", "canceled"] = Field(
        description="partial: failed after some partitions were completed."
    )
    origin: str = Field(
        description="cli, notebook, api, sensor, schedule, reconcile; dagster for its UI and its own commands."
    )
    mode: str
    series: list[RunSeries]
    partitions: Range
    accepted_at: str
    started_at: str | None
    ended_at: str | None
    failures: list[dict[str, Any]] = Field(
        description="window, kind and error of each; only error where no more is known."
    )


class Held(BaseModel):
    """One series and what is held of it; ``problem`` when its files cannot be read."""

    symbol: str
    timeframe: str
    file: str
    rows: int | None
    first: str | None
    last: str | None
    problem: str | None


class HeldList(BaseModel):
    """A page of the universe's series."""

    series: list[Held]
    total: int
    next_offset: int | None


class Bar(BaseModel):
    """One bar; ``timestamp`` is its start, of daily and longer bars the session's date."""

    timestamp: str
    open: float
    high: float
    low: float
    close: float
    volume: float


class Bars(BaseModel):
    """The oldest ``limit`` bars of a window. ``next_start`` is where to go on; null when the window ends here."""

    symbol: str
    timeframe: str
    count: int
    next_start: str | None
    notices: list[str] = Field(description="What is wrong with the file, rows that were left out among it.")
    bars: list[Bar]


class Gaps(Answer):
    """What is held, missing and absent at IB; see `ktrdr gaps`."""

    symbol: str
    timeframe: str
    file: str
    missing: list[dict[str, Any]]


class PacingClass(Answer):
    """One class of work: tail, interactive or backfill."""

    work: str
    used: int = Field(description="Units used in the last ten minutes.")
    waiting: int
    kept_from: int = Field(description="Units that are free now and kept for higher classes.")


class PacingWait(Answer):
    """A request that waits for its place in the budget."""

    work: str
    symbol: str
    since: str
    until: str = Field(description="Expected time; requests to come may move it.")
    pid: int
    host: str = Field(description="Empty: the machine that answers.")


class Pacing(Answer):
    """The budget of the login, shared by all processes."""

    used: int
    limit: int
    next_free_at: str
    waiting: int
    unanswered: int
    pauses: list[dict[str, Any]]
    classes: list[PacingClass]
    queue: list[PacingWait] = Field(description="In the order of service.")


class Status(Answer):
    """Connection, client ids, pacing, farms."""

    connection: dict[str, Any]
    client_ids_in_use: list[dict[str, Any]]
    pacing: Pacing | None


class Health(Answer):
    """What was tried just now."""

    healthy: bool
    checks: list[dict[str, Any]]


class Ranges(Answer):
    """Where histories begin and end."""

    ranges: list[dict[str, Any]]
    ib_requests_made: int


class Cleaned(Answer):
    """What was disconnected and ended."""

    disconnected: list[dict[str, Any]]
    still_in_use: list[dict[str, Any]]
    runs_ended: list[str]


class DiscoverRequest(ContractChoice):
    """A symbol to look up; the other fields choose among several contracts of that name."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"symbol": "EURUSD"}]})

    symbol: Symbol


class InstrumentType(StrEnum):
    """Kinds of instruments, as English words."""

    STOCK = "stock"
    FOREX = "forex"
    FUTURES = "futures"
    CONTINUOUS_FUTURES = "continuous_futures"
    INDEX = "index"
    CRYPTO = "crypto"
    CFD = "cfd"


class Discovered(BaseModel):
    """An instrument. ``con_id`` is null until IB was asked."""

    symbol: str
    instrument_type: InstrumentType
    sec_type: str
    con_id: int | None
    exchange: str
    primary_exchange: str
    currency: str
    ib_symbol: str
    expiry: str
    what_to_show: str
    time_zone: str


class DiscoveredList(BaseModel):
    """Instruments that are known."""

    symbols: list[Discovered]
    count: int
