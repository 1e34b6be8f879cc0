"""What can be asked about the gateway without loading bars: status, health, configuration, where history begins, clean-up.

The answers of `ktrdr ib status|health|config|ranges|cleanup` and of the REST API's `/ib/...`, as plain values with ``as_dict``.
Nothing is printed here, no bars are asked for, and every answer comes within a bounded time: a gateway that does not answer is
told about, not waited for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.discovery import NO_CHOICE, SHORT_BAR_HISTORY, discover, symbols_file
from ktrdr_pipelines.errors import GatewayUnreachable, InputError, KtrdrError, PacingError, TransientError
from ktrdr_pipelines.ib import pacing
from ktrdr_pipelines.ib.address import GatewayAddress
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.codes import Hold, name_farm
from ktrdr_pipelines.ib.contracts import Choice
from ktrdr_pipelines.ib.history import IBHistory, describe_head
from ktrdr_pipelines.ib.leases import ClientIds, LeasedId, in_use
from ktrdr_pipelines.ib.ledger import Grant, WaitCancelled
from ktrdr_pipelines.orchestration.dead_runs import reap_dead_runs
from ktrdr_pipelines.orchestration.instance import open_instance
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.series import (
    Instrument,
    Series,
    Timeframe,
    Window,
    file_symbol,
    forex,
    format_instant,
    parse_timeframe,
)
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.corrections import open_store
from ktrdr_pipelines.store.peek import peek
from ktrdr_pipelines.universe import universe_of

QUICK_S = 5.0
"""Longest wait for the gateway's greeting, and for one answer to a question that a person waits for."""
RANGES_AT_ONCE = 20
"""Most instruments whose start of history is asked for at once: each takes a unit of a budget of 60 in ten minutes."""
RANGES_PATIENCE_S = 30.0
TURN_PATIENCE_S = 5.0
CLEANUP_PATIENCE_S = 10.0

_FARM_CODES = {
    2103: ("quotes", "broken"), 2104: ("quotes", "ok"), 2108: ("quotes", "idle"), 2119: ("quotes", "connecting"),
    2105: ("history", "broken"), 2106: ("history", "ok"), 2107: ("history", "idle"),
    2157: ("contracts", "broken"), 2158: ("contracts", "ok"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something did not work, as `errors.py` says it."""

    kind: str
    message: str
    advice: str

    @classmethod
    def of(cls, error: KtrdrError) -> Problem:
        return cls(error.family, f"{error.doing}: {error.observed}" if error.doing else error.observed, error.advice)


@dataclass(frozen=True, slots=True)
class Farm:
    """One of IB's data farms as the gateway last spoke of it. ``kind``: quotes, history or contracts."""

    name: str
    kind: str
    state: str


@dataclass(frozen=True, slots=True)
class Link:
    """A connection that was made for the question and closed after it."""

    host: str
    port: int
    connected: bool
    account: str = ""
    source: str = ""
    """``simulator``, ``paper`` or ``live``, by the account; empty without a connection."""
    client_id: int | None = None
    gateway_time: datetime | None = None
    clock_lag_s: float = 0.0
    link_to_ib: bool | None = None
    """False while the gateway says that it has lost IB's servers; None without a connection."""
    farms: tuple[Farm, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class PacingState:
    """The budget of this login, shared by all processes. ``used`` of ``limit`` units in the last ten minutes."""

    used: int
    limit: int
    next_free_at: datetime
    waiting: int
    """Requests that wait for their turn now."""
    unanswered: int
    pauses: tuple[tuple[datetime, str], ...]
    """Pauses of everything: until when, and why."""


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """The answer of ``ib status``. ``pacing`` is None, and ``pacing_problem`` says why, when the ledger cannot be read."""

    asked_at: datetime
    connection: Link
    client_ids_in_use: tuple[LeasedId, ...]
    pacing: PacingState | None
    pacing_problem: Problem | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        return {
            "asked_at": format_instant(self.asked_at),
            "connection": _link_as_dict(self.connection),
            "client_ids_in_use": [_leased_as_dict(leased) for leased in self.client_ids_in_use],
            "pacing": _pacing_as_dict(self.pacing) if self.pacing else None,
            "pacing_problem": asdict(self.pacing_problem) if self.pacing_problem else None,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class GatewayHealth:
    """The answer of ``ib health``: everything was really tried just now."""

    asked_at: datetime
    checks: tuple[Check, ...]
    problem: Problem | None = None
    """Of the first check that failed because of a known error."""

    @property
    def healthy(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "healthy": self.healthy,
            "asked_at": format_instant(self.asked_at),
            "checks": [asdict(check) for check in self.checks],
            "problem": asdict(self.problem) if self.problem else None,
        }


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The answer of ``ib config``: what is configured, without secrets."""

    values: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        return dict(self.values)


@dataclass(frozen=True, slots=True)
class DataRange:
    """Of one series: what IB has, as far as it tells, and what is held. Times are bar opens, both ends included.

    ``earliest`` is IB's head timestamp: a hint, at times too early or too late. None with no ``problem``: IB tells none.
    """

    symbol: str
    timeframe: str
    earliest: datetime | None
    latest: datetime | None
    """The last bar that is complete by the calendar."""
    held_first: datetime | None = None
    held_last: datetime | None = None
    problem: Problem | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        return {
            "symbol": self.symbol,
            "timeframe": self.timeframe,
            "earliest": _text(self.earliest),
            "latest": _text(self.latest),
            "held": {"first": _text(self.held_first), "last": _text(self.held_last)},
            "problem": asdict(self.problem) if self.problem else None,
        }


@dataclass(frozen=True, slots=True)
class DataRanges:
    """The answer of ``ib ranges``."""

    asked_at: datetime
    ranges: tuple[DataRange, ...]
    requests_made: int = 0

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "asked_at": format_instant(self.asked_at),
            "ranges": [each.as_dict() for each in self.ranges],
            "ib_requests_made": self.requests_made,
        }


@dataclass(frozen=True, slots=True)
class Cleanup:
    """The answer of ``ib cleanup``."""

    disconnected: tuple[LeasedId, ...]
    """Client ids whose process was interrupted, as by Ctrl-C, and has let go."""
    still_in_use: tuple[LeasedId, ...]
    """Those of processes that did not let go in time, belong to somebody else, or live on another machine."""
    runs_ended: tuple[str, ...] = field(default=())
    """Dagster runs of dead processes, marked as failed, their places freed."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "disconnected": [_leased_as_dict(leased) for leased in self.disconnected],
            "still_in_use": [_leased_as_dict(leased) for leased in self.still_in_use],
            "runs_ended": list(self.runs_ended),
        }


# -- the questions --------------------------------------------------------------------------------------------------


def gateway_status(settings: Settings) -> GatewayStatus:
    """Connection, client ids in use, pacing, farms. Connects for a moment; an unreachable gateway is part of the answer."""
    address = _quick_address(settings)
    before = tuple(in_use(address.leases_dir))  # without the one that this question takes
    with IBHistory(address) as history:
        try:
            link = _look_at(history, address)
        except KtrdrError as error:
            link = Link(address.host, address.port, connected=False, problem=Problem.of(error))
        try:
            state, problem = _pacing_state(history), None
        except KtrdrError as error:
            state, problem = None, Problem.of(error)
    return GatewayStatus(datetime.now(UTC), link, before, state, problem)


def gateway_health(settings: Settings) -> GatewayHealth:
    """Try what a load needs: the connection, the gateway's time, a contract, the farms, the ledger, the data folder."""
    address = _quick_address(settings)
    checks: list[Check] = []
    problems: list[Problem] = []

    def check(name: str, attempt: Callable[[], str]) -> bool:
        begun = time.monotonic()
        try:
            detail, ok = attempt(), True
        except KtrdrError as error:
            detail, ok = str(error), False
            problems.append(Problem.of(error))
        checks.append(Check(name, ok, detail, round(time.monotonic() - begun, 3)))
        return ok

    with IBHistory(address) as history:
        if check("connection", lambda: _say_connected(history.connect(), history, address)):
            client = history.connect()
            check("gateway time", lambda: format_instant(client.probe()))
            check("contract lookup", lambda: _look_up_something(client))
            check("farms", lambda: _say_farms(client))
        check("pacing ledger", lambda: _say_pacing(_pacing_state(history)))
    check("data folder", lambda: _try_data_folder(settings))
    return GatewayHealth(datetime.now(UTC), tuple(checks), problems[0] if problems else None)


def gateway_config(settings: Settings) -> GatewayConfig:
    """What is configured about the gateway and the loads. Passwords are left out; pacing rules are IB's and no settings."""
    shown = GatewayResource.of(settings)
    return GatewayConfig({
        "host": settings.ib_host,
        "port": settings.ib_port,
        "client_id": settings.ib_client_id,
        "client_id_ranges": {ids.name.lower(): list(ids.value) for ids in ClientIds},
        "connect_timeout_s": settings.ib_connect_timeout_s,
        "request_timeout_s": settings.ib_request_timeout_s,
        "retry_waits_s": list(settings.ib_retry_waits_s),
        "history_limits": str(settings.history_limits),
        "data_dir": str(settings.data_dir),
        "universe_file": str(settings.universe_path),
        "dagster_home": str(settings.dagster_home),
        "ledger": shown.ledger_url or str(settings.dagster_home / "ib"),
        "pacing_rules": {
            "requests_in_ten_minutes": pacing.WINDOW_UNITS,
            "seconds_between_identical_requests": pacing.IDENTICAL_S,
            "same_contract_requests_in_two_seconds": pacing.BURST_UNITS - 1,
            "weight_of_bid_ask": 2,
        },
    })  # fmt: skip


def data_ranges(
    settings: Settings, symbols: Sequence[str] | None = None, timeframes: Sequence[str] | None = None
) -> DataRanges:
    """Where the history of ``symbols`` begins by IB's head timestamps, and where it ends; without symbols those of the
    universe, without timeframes those that the universe lists (1d for a symbol that it does not name).

    Each head timestamp is a history request and counts; one that has to wait long for its turn is told as a pacing problem of
    its series instead of being waited for.

    Raises:
        InputError: no such symbol or timeframe, or more than `RANGES_AT_ONCE` instruments.
    """
    wanted = _choose_series(settings, symbols, timeframes)
    now = datetime.now(UTC)
    store = open_store(settings.data_dir)
    found: list[DataRange] = []
    deadline = time.monotonic() + RANGES_PATIENCE_S
    gone: Problem | None = None
    with IBHistory(_quick_address(settings)) as history:
        for symbol, (instrument, names) in wanted.items():
            pinned, head, problem = instrument, None, gone
            if time.monotonic() > deadline:
                problem = problem or Problem("timeout", "not asked: the others took too long", "Ask for fewer symbols.")
            if problem is None:
                pinned, head, problem = _find_head(history, symbol, instrument, deadline)
                if problem is not None and problem.kind == GatewayUnreachable.family:
                    gone = problem  # the others would wait for the same
            for timeframe in names:
                if pinned is None:
                    found.append(DataRange(symbol, timeframe.name, None, None, problem=problem))
                    continue
                series = Series(pinned, timeframe)
                why, latest, held = problem, None, None
                try:
                    latest = _last_complete(series, now)
                    with peek(store, series, now=now) as (view, _):
                        held = view.extent(series)
                except KtrdrError as error:
                    why = why or Problem.of(error)
                is_short = timeframe.seconds <= 30
                earliest = max(head, now - SHORT_BAR_HISTORY) if head and is_short else head
                found.append(
                    DataRange(
                        pinned.symbol,
                        timeframe.name,
                        earliest,
                        latest,
                        datetime.fromtimestamp(held.first_open_s, UTC) if held else None,
                        datetime.fromtimestamp(held.last_open_s, UTC) if held else None,
                        why,
                    )
                )
        return DataRanges(now, tuple(found), history.requests_made)


def list_discovered(settings: Settings) -> list[Instrument]:
    """Instruments that IB was asked for a while ago and that are still remembered; nobody is asked."""
    with IBHistory(_quick_address(settings)) as history:
        return [known.instrument for known in symbols_file(history).list_found() if known.instrument is not None]


def discover_symbol(settings: Settings, symbol: str, choice: Choice = NO_CHOICE) -> Instrument:
    """What ``symbol`` means: with no ``choice`` the instrument that the universe calls so, else what IB finds; with its conId.

    Raises:
        InputError: no symbol, or several contracts fit. PermanentError: IB knows none. TransientError: IB did not answer.
    """
    file_symbol(symbol)
    universe = universe_of(settings)
    instrument = universe.find_instrument(symbol) if choice == NO_CHOICE else None
    with IBHistory(_quick_address(settings)) as history:
        return history.pin(instrument) if instrument else discover(symbol, history=history, choice=choice).instrument


def cleanup(settings: Settings) -> Cleanup:
    """Disconnect every process of this program from the gateway: each is interrupted as by Ctrl-C, keeps what it loaded, and
    gives its client id back. Runs whose process is dead are ended too. Other programs' connections are not ours to end.
    """
    leases_dir = _quick_address(settings).leases_dir
    before = in_use(leases_dir)
    for pid in {leased.pid for leased in before if leased.is_here and leased.pid != os.getpid()}:
        try:
            os.kill(pid, signal.SIGINT)
        except (ProcessLookupError, PermissionError):
            continue
    deadline = time.monotonic() + CLEANUP_PATIENCE_S
    after = in_use(leases_dir)
    while time.monotonic() < deadline and any(leased in before and leased.is_here for leased in after):
        time.sleep(0.1)
        after = in_use(leases_dir)
    with open_instance(settings) as instance:
        ended = reap_dead_runs(instance)
    return Cleanup(
        disconnected=tuple(leased for leased in before if leased not in after),
        still_in_use=tuple(leased for leased in before if leased in after),
        runs_ended=tuple(ended),
    )


# -- inside ---------------------------------------------------------------------------------------------------------


def _quick_address(settings: Settings) -> GatewayAddress:
    """The gateway, asked by somebody who waits for the answer: no retries, short time-outs."""
    address = GatewayResource.of(settings).address()
    return replace(
        address,
        connect_timeout_s=min(address.connect_timeout_s, QUICK_S),
        request_timeout_s=min(address.request_timeout_s, QUICK_S),
        probe_timeout_s=min(address.probe_timeout_s, QUICK_S),
        retry_waits_s=(),
    )


def _look_at(history: IBHistory, address: GatewayAddress) -> Link:
    client = history.connect()
    told = client.probe()  # what the gateway had to say of its farms has come before this answer
    return Link(
        host=address.host,
        port=address.port,
        connected=True,
        account=client.account,
        source=history.source,
        client_id=client.client_id,
        gateway_time=told,
        clock_lag_s=client.clock_lag_s,
        link_to_ib=Hold.LINK not in client.down.kinds,
        farms=tuple(read_farms(client.notices)),
    )


def read_farms(notices: Iterable[str]) -> list[Farm]:
    """The farms that the gateway's ``notices`` ("2106 HMDS data farm connection is OK:ushmds") speak of, each as last said."""
    found: dict[tuple[str, str], Farm] = {}
    for notice in notices:
        number, _, text = notice.partition(" ")
        if number.isdigit() and int(number) in _FARM_CODES:
            kind, state = _FARM_CODES[int(number)]
            name = name_farm(text)
            found[kind, name] = Farm(name, kind, state)
    return sorted(found.values(), key=lambda farm: (farm.kind, farm.name))


def _pacing_state(history: IBHistory) -> PacingState:
    budget = history.ledger.snapshot()
    return PacingState(
        used=budget.used,
        limit=budget.limit,
        next_free_at=datetime.fromtimestamp(budget.next_free_at_s, UTC),
        waiting=budget.waiting,
        unanswered=budget.open,
        pauses=tuple((datetime.fromtimestamp(hold.until_s, UTC), hold.reason) for hold in budget.holds),
    )


def _say_connected(client: GatewayClient, history: IBHistory, address: GatewayAddress) -> str:
    return f"{address.host}:{address.port} as client {client.client_id}, {history.source} account {client.account}"


def _look_up_something(client: GatewayClient) -> str:
    found = client.contract_details(forex("EURUSD"), timeout_s=QUICK_S)
    return found[0].describe() if found else "answered; this gateway knows no EURUSD"


def _say_farms(client: GatewayClient) -> str:
    if client.down.kinds:
        raise TransientError(
            f"the gateway says it is down: {client.down.describe()}", advice="Wait: IB mends it, and loads wait for it."
        )
    return (
        ", ".join(f"{farm.kind} {farm.name} {farm.state}" for farm in read_farms(client.notices)) or "nothing is down"
    )


def _say_pacing(state: PacingState) -> str:
    return f"{state.used} of {state.limit} used, next free {format_instant(state.next_free_at)}"


def _try_data_folder(settings: Settings) -> str:
    series = next(iter(universe_of(settings)), None)
    if series is not None:
        open_store(settings.data_dir).check_writable(series)
    return f"{settings.data_dir} can be written"


def _choose_series(
    settings: Settings, symbols: Sequence[str] | None, timeframes: Sequence[str] | None
) -> dict[str, tuple[Instrument | None, list[Timeframe]]]:
    """By symbol as asked for: the instrument (None: not in the universe) and the timeframes."""
    chosen = [parse_timeframe(name) for name in timeframes] if timeframes else None
    universe = universe_of(settings)
    listed: dict[str, list[Timeframe]] = {}
    for series in universe:
        listed.setdefault(series.instrument.symbol, []).append(series.timeframe)
    wanted: dict[str, tuple[Instrument | None, list[Timeframe]]] = {}
    for symbol in symbols or listed:
        file_symbol(symbol)
        instrument = universe.find_instrument(symbol)
        names = listed.get(instrument.symbol, []) if instrument else []
        wanted.setdefault(
            instrument.symbol if instrument else symbol, (instrument, chosen or names or [parse_timeframe("1d")])
        )
    if len(wanted) > RANGES_AT_ONCE:
        raise InputError(
            f"{len(wanted)} instruments at once",
            doing="asking where histories begin",
            advice=f"Name at most {RANGES_AT_ONCE} symbols: each takes one of {pacing.WINDOW_UNITS} requests in ten minutes.",
        )
    return wanted


def _find_head(
    history: IBHistory, symbol: str, instrument: Instrument | None, deadline: float
) -> tuple[Instrument | None, datetime | None, Problem | None]:
    """Instrument as pinned, its head timestamp, and what went wrong. A failure is never told as "there is none"."""
    pinned: Instrument | None = instrument
    try:
        pinned = history.pin(instrument) if instrument else discover(symbol, history=history).instrument
        client = history.connect()
        with _take_turn(history, describe_head(pinned), min(deadline, time.monotonic() + TURN_PATIENCE_S)) as grant:
            try:
                head = client.head_timestamp(pinned, timeout_s=QUICK_S, sending=grant.sending)
            except KtrdrError as error:
                if error.pauses_login:
                    history.ledger.penalise(error.observed)
                raise
            finally:
                history.requests_made += grant.sent_at_s is not None
    except KtrdrError as error:
        return pinned, None, Problem.of(error)
    return pinned, head, None


def _take_turn(history: IBHistory, ask: pacing.Ask, deadline: float) -> Grant:
    """Leave to send ``ask``, waited for until ``deadline`` (of the monotonic clock)."""
    told: list[str] = []

    def remember(_seconds: float, rule: pacing.Rule, until_s: float) -> None:
        told.append(f"the next request may go at {format_instant(datetime.fromtimestamp(until_s, UTC))} ({rule})")

    try:
        return history.ledger.acquire(ask, on_wait=remember, cancel=lambda: bool(told) and time.monotonic() > deadline)
    except WaitCancelled:
        raise PacingError(told[-1], advice="Ask again then.") from None


def _last_complete(series: Series, now: datetime) -> datetime | None:
    back = timedelta(days=14) if series.timeframe.is_intraday else timedelta(days=93)
    bars = expected_bars(series, Window(now - back, now), complete_at_s=int(now.timestamp()))
    return datetime.fromtimestamp(int(bars.opens[-1]), UTC) if len(bars) else None


def _leased_as_dict(leased: LeasedId) -> dict[str, object]:
    return {"client_id": leased.client_id, "pid": leased.pid or None}


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


def _link_as_dict(link: Link) -> dict[str, object]:
    return {
        **asdict(link),
        "gateway_time": _text(link.gateway_time),
        "farms": [asdict(farm) for farm in link.farms],
        "problem": asdict(link.problem) if link.problem else None,
    }


def _pacing_as_dict(state: PacingState) -> dict[str, object]:
    return {
        "used": state.used,
        "limit": state.limit,
        "next_free_at": format_instant(state.next_free_at),
        "waiting": state.waiting,
        "unanswered": state.unanswered,
        "pauses": [{"until": format_instant(until), "reason": reason} for until, reason in state.pauses],
    }
