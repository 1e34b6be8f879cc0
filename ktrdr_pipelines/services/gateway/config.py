"""The settings of the gateway and of loads; sends no request."""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_pipelines.ib.client_ids import ClientIds
from ktrdr_pipelines.ib.endpoint import hide_secrets
from ktrdr_pipelines.ib.pacing import rules as pacing
from ktrdr_pipelines.settings import Settings


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The result of ``ib config``: settings, without secrets."""

    values: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        return dict(self.values)


def gateway_config(settings: Settings) -> GatewayConfig:
    """Settings without passwords, and IB's pacing rules, which are not settings."""
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
        "ledger": hide_secrets(settings.ledger_url) or str(settings.dagster_home / "ib"),
        "pacing_rules": {
            "requests_in_ten_minutes": pacing.WINDOW_UNITS,
            "seconds_between_identical_requests": pacing.IDENTICAL_S,
            "same_contract_requests_in_two_seconds": pacing.BURST_UNITS - 1,
            "weight_of_bid_ask": 2,
        },
    })  # fmt: skip
