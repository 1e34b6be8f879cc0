"""Whether anything can be loaded now: each thing that a load needs is tried."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ktrdr_pipelines.domain.instruments import forex
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import KtrdrError, TransientError
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.services.gateway.question import QUICK_S, Problem, quick_address
from ktrdr_pipelines.services.gateway.status import PacingState, pacing_state, read_farms
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.paths import check_folder
from ktrdr_pipelines.universe.file import universe_of


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


def gateway_health(settings: Settings) -> GatewayHealth:
    """Try what a load needs: the connection, the gateway's time, a contract, the farms, the ledger, the data folder."""
    address = quick_address(settings)
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
        check("pacing ledger", lambda: _say_pacing(pacing_state(history)))
    check("data folder", lambda: _try_data_folder(settings))
    return GatewayHealth(datetime.now(UTC), tuple(checks), problems[0] if problems else None)


def _say_connected(client: GatewayClient, history: IBHistory, address: GatewayAddress) -> str:
    return f"{address.host}:{address.port} as client {client.client_id}, {history.source} account {client.account}"


def _look_up_something(client: GatewayClient) -> str:
    found = client.contract_details(forex("EURUSD"), timeout_s=QUICK_S)
    return found[0].describe() if found else "answered; this gateway knows no EURUSD"


def _say_farms(client: GatewayClient) -> str:
    if client.outages.kinds:
        raise TransientError(
            f"the gateway says it is down: {client.outages.describe()}",
            advice="Wait: IB mends it, and loads wait for it.",
        )
    return (
        ", ".join(f"{farm.kind} {farm.name} {farm.state}" for farm in read_farms(client.notices)) or "nothing is down"
    )


def _say_pacing(state: PacingState) -> str:
    return f"{state.used} of {state.limit} used, next free {format_instant(state.next_free_at)}"


def _try_data_folder(settings: Settings) -> str:
    universe_of(settings)
    check_folder(settings.data_dir)
    return f"{settings.data_dir} can be written"
