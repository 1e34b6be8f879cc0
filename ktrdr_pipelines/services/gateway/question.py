"""How a question that somebody waits for is put to the gateway, and how its trouble is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.settings import Settings

QUICK_S = 5.0
"""Longest wait for the gateway's greeting, and for one answer to a question that a person waits for."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something did not work, as `errors.py` says it."""

    kind: str
    message: str
    advice: str

    @classmethod
    def of(cls, error: KtrdrError) -> Problem:
        return cls(error.family, error.message, error.advice)


def quick_address(settings: Settings) -> GatewayAddress:
    """The gateway, asked by somebody who waits for the answer: no retries, short time-outs, no waiting for a
    link that is down."""
    address = GatewayResource.of(settings).address()
    return replace(
        address,
        connect_timeout_s=min(address.connect_timeout_s, QUICK_S),
        request_timeout_s=min(address.request_timeout_s, QUICK_S),
        probe_timeout_s=min(address.probe_timeout_s, QUICK_S),
        retry_waits_s=(),
        outage_patience_s=0.0,
    )
