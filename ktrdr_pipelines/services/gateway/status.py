"""The connection, client ids in use, the pacing budget and the data farms, now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.client_ids import LeasedId, in_use
from ktrdr_pipelines.ib.codes import Outage, name_farm
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.services.gateway.question import Problem, quick_address
from ktrdr_pipelines.settings import Settings

_FARM_CODES = {
    2103: ("quotes", "broken"), 2104: ("quotes", "ok"), 2108: ("quotes", "idle"), 2119: ("quotes", "connecting"),
    2105: ("history", "broken"), 2106: ("history", "ok"), 2107: ("history", "idle"),
    2157: ("contracts", "broken"), 2158: ("contracts", "ok"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Farm:
    """One of IB's data farms, in the state last reported. ``kind``: quotes, history or contracts."""

    name: str
    kind: str
    state: str


@dataclass(frozen=True, slots=True)
class Link:
    """A connection that was opened for the query and closed after it."""

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
    """False while the gateway reports that its link to IB is lost; None without a connection."""
    farms: tuple[Farm, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class PacingClass:
    """One class of work (tail, interactive, backfill): units ``used`` in the last ten minutes, requests ``waiting``, and
    the units ``kept_from`` it now, of those that are free, for higher classes."""

    work: str
    used: int
    waiting: int
    kept_from: int


@dataclass(frozen=True, slots=True)
class PacingWait:
    """A request in a pacing wait: its class, symbol, since when, and its expected time. ``host`` is empty for this machine."""

    work: str
    symbol: str
    since: datetime
    until: datetime
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class PacingState:
    """The budget of this login, shared by all processes. ``used`` of ``limit`` units in the last ten minutes."""

    used: int
    limit: int
    next_free_at: datetime
    waiting: int
    """Requests in a pacing wait now."""
    unanswered: int
    pauses: tuple[tuple[datetime, str], ...]
    """Pauses of all requests: until when, and why."""
    classes: tuple[PacingClass, ...] = ()
    queue: tuple[PacingWait, ...] = ()
    """The waiting requests, in the order of service."""


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """The result of ``ib status``. ``pacing`` is None and ``pacing_problem`` set if the ledger cannot be read."""

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
            "client_ids_in_use": [leased.as_dict() for leased in self.client_ids_in_use],
            "pacing": _pacing_as_dict(self.pacing) if self.pacing else None,
            "pacing_problem": asdict(self.pacing_problem) if self.pacing_problem else None,
        }


def gateway_status(settings: Settings) -> GatewayStatus:
    """Connection, client ids in use, pacing, farms. Connects for a moment; an unreachable gateway is part of the result."""
    address = quick_address(settings)
    before = tuple(in_use(address.leases_dir))  # without the id that this query takes
    with IBHistory(address) as history:
        try:
            link = _look_at(history, address)
        except KtrdrError as error:
            link = Link(address.host, address.port, connected=False, problem=Problem.of(error))
        try:
            state, problem = pacing_state(history), None
        except KtrdrError as error:
            state, problem = None, Problem.of(error)
    return GatewayStatus(datetime.now(UTC), link, before, state, problem)


def _look_at(history: IBHistory, address: GatewayAddress) -> Link:
    client = history.connect()
    now = client.probe()  # the gateway reports its farms before it answers
    return Link(
        host=address.host,
        port=address.port,
        connected=True,
        account=client.account,
        source=history.source,
        client_id=client.client_id,
        gateway_time=now,
        clock_lag_s=client.clock_lag_s,
        link_to_ib=Outage.LINK not in client.outages.kinds,
        farms=tuple(read_farms(client.notices)),
    )


def read_farms(notices: Iterable[str]) -> list[Farm]:
    """The farms in the gateway's ``notices`` ("2106 HMDS data farm connection is OK:ushmds"), each in its last state."""
    found: dict[tuple[str, str], Farm] = {}
    for notice in notices:
        number, _, text = notice.partition(" ")
        if number.isdigit() and int(number) in _FARM_CODES:
            kind, state = _FARM_CODES[int(number)]
            name = name_farm(text)
            found[kind, name] = Farm(name, kind, state)
    return sorted(found.values(), key=lambda farm: (farm.kind, farm.name))


def pacing_state(history: IBHistory) -> PacingState:
    budget = history.ledger.snapshot()
    return PacingState(
        used=budget.used,
        limit=budget.limit,
        next_free_at=datetime.fromtimestamp(budget.next_free_at_s, UTC),
        waiting=budget.waiting,
        unanswered=budget.open,
        pauses=tuple((datetime.fromtimestamp(pause.until_s, UTC), pause.reason) for pause in budget.pauses),
        classes=tuple(PacingClass(str(c.work), c.used, c.waiting, c.kept_from) for c in budget.classes),
        queue=tuple(
            PacingWait(
                work=str(each.work),
                symbol=each.symbol,
                since=datetime.fromtimestamp(each.since_s, UTC),
                until=datetime.fromtimestamp(each.until_s, UTC),
                pid=each.pid,
                host=each.host,
            )
            for each in budget.queue
        ),
    )


def _link_as_dict(link: Link) -> dict[str, object]:
    return {
        **asdict(link),
        "gateway_time": format_instant(link.gateway_time) if link.gateway_time else None,
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
        "classes": [asdict(each) for each in state.classes],
        "queue": [
            {**asdict(each), "since": format_instant(each.since), "until": format_instant(each.until)}
            for each in state.queue
        ],
    }
