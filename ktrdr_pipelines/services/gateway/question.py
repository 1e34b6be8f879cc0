"""What the queries share: the gateway with short time-outs, and an error as a plain value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.settings import Settings

QUICK_S = 5.0
"""Longest wait for the connection, and for one answer, while a user waits."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error of `errors.py` as plain values."""

    kind: str
    message: str
    advice: str

    @classmethod
    def of(cls, error: KtrdrError) -> Problem:
        return cls(error.family, error.message, error.advice)


def quick_address(settings: Settings) -> GatewayAddress:
    """The gateway for a query that a user waits for: short time-outs, no retries, no wait for the end of an outage."""
    address = GatewayAddress.of(settings)
    return replace(
        address,
        connect_timeout_s=min(address.connect_timeout_s, QUICK_S),
        request_timeout_s=min(address.request_timeout_s, QUICK_S),
        probe_timeout_s=min(address.probe_timeout_s, QUICK_S),
        retry_waits_s=(),
        outage_patience_s=0.0,
    )
