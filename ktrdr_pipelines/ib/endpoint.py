"""Where a gateway is, and how to come to it: values from the settings. Nothing is connected here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ktrdr_pipelines.ib.client_ids import ClientIds

HOLD_PATIENCE_S = 300.0
"""How long requests wait in all for a link or farm that the gateway calls broken. Then they are sent anyway: its notices may
be out of date, and an answer of a broken farm is not believed (`codes.classify`). The nightly restart takes minutes."""
RETURN_PATIENCE = 5.0
"""A gateway that was there and is gone is waited for this many times the sum of all retry waits: 525 s by default. The nightly
restart takes minutes, which the retries of one request (105 s) need not outlast."""


@dataclass(frozen=True)
class GatewayAddress:
    """Where the gateway is and how to come to it; from the settings."""

    host: str
    port: int
    client_id: int | None = None
    client_ids: ClientIds = ClientIds.PERSON
    connect_timeout_s: float = 15.0
    request_timeout_s: float = 120.0
    probe_timeout_s: float = 10.0
    retry_waits_s: tuple[float, ...] = (15.0, 30.0, 60.0)
    hold_patience_s: float = HOLD_PATIENCE_S
    """0: what needs a link or farm that is down fails at once."""
    state_dir: Path = Path()
    """Folder of the pacing ledger and the client id leases, shared by all processes of this machine."""
    ledger_url: str = field(default="", repr=False)
    """May contain a password."""
    library: str = "ib_insync"
    """The client library (`ib/wire/library.py`)."""

    @property
    def login(self) -> str:
        """What all programs that share the budget agree on. The account would be better, but is known only once
        connected, and asking is what has to be paced; two addresses of one login are rare."""
        host = "127.0.0.1" if self.host.lower() in ("localhost", "::1") else self.host.lower()
        return f"{host}:{self.port}"

    @property
    def return_patience_s(self) -> float:
        """How long a gateway that was there is waited for when it is gone; none where nothing is retried."""
        return RETURN_PATIENCE * sum(self.retry_waits_s)

    @property
    def leases_dir(self) -> Path:
        """Folder of the client ids that this program holds at this gateway."""
        key = "".join(c if c.isalnum() else "_" for c in self.login)
        return self.state_dir / "ib" / f"client_ids_{key}"
