"""Checks everything that a load needs."""

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
    """One check and its outcome."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class GatewayHealth:
    """The result of ``ib health``. Nothing in it is remembered from earlier."""

    asked_at: datetime
    checks: tuple[Check, ...]
    problem: Problem | None = None
    """The first known error."""

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
    """Check what a load needs: the connection, the gateway's time, a contract, the farms, the ledger, the data folder."""
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
        if check("connection", lambda: _describe_connection(history.connect(), history, address)):
            client = history.connect()
            check("gateway time", lambda: format_instant(client.probe()))
            check("contract lookup", lambda: _look_up_contract(client))
            check("farms", lambda: _check_farms(client))
        check("pacing ledger", lambda: _describe_pacing(pacing_state(history)))
    check("data folder", lambda: _check_data_folder(settings))
    return GatewayHealth(datetime.now(UTC), tuple(checks), problems[0] if problems else None)


def _describe_connection(client: GatewayClient, history: IBHistory, address: GatewayAddress) -> str:
    return f"{address.host}:{address.port} as client {client.client_id}, {history.source} account {client.account}"


def _look_up_contract(client: GatewayClient) -> str:
    found = client.contract_details(forex("EURUSD"), timeout_s=QUICK_S)
    return found[0].describe() if found else "answered; this gateway has no EURUSD"


def _check_farms(client: GatewayClient) -> str:
    if client.outages.kinds:
        raise TransientError(
            f"the gateway reports an outage: {client.outages.describe()}",
            advice="Wait until IB ends it; loads wait too.",
        )
    return (
        ", ".join(f"{farm.kind} {farm.name} {farm.state}" for farm in read_farms(client.notices))
        or "no outage reported"
    )


def _describe_pacing(state: PacingState) -> str:
    return f"{state.used} of {state.limit} used, next free {format_instant(state.next_free_at)}"


def _check_data_folder(settings: Settings) -> str:
    universe_of(settings)
    check_folder(settings.data_dir)
    return f"{settings.data_dir} is writable"
