"""The address of a gateway, with time-outs and patience: plain values. The settings have the defaults. Nothing connects here."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from ktrdr_pipelines.ib.client_ids import ClientIds
from ktrdr_pipelines.settings import Settings

OUTAGE_PATIENCE_S = 300.0
"""How long requests wait in all for the end of an outage. Then they are sent anyway: the gateway's notices may be out of date,
and an answer during an outage is not believed (`codes.classify`). The nightly restart takes minutes."""
RETURN_PATIENCE = 5.0
"""A gateway that was connected and is gone is waited for this many times the sum of all retry waits: 525 s by default. The
nightly restart takes minutes, longer than the retries of one request (105 s)."""


@dataclass(frozen=True)
class GatewayAddress:
    """The gateway's address, and how long to wait for what."""

    host: str
    port: int
    _: KW_ONLY
    connect_timeout_s: float
    request_timeout_s: float
    retry_waits_s: tuple[float, ...]
    """Seconds before each retry of a transient failure; their number is the number of retries."""
    library: str
    """The client library (`ib/wire/library.py`)."""
    client_id: int | None = None
    client_ids: ClientIds = ClientIds.PERSON
    probe_timeout_s: float = 10.0
    outage_patience_s: float = OUTAGE_PATIENCE_S
    """0: requests fail at once during an outage of what they need."""
    state_dir: Path = Path()
    """Folder of the pacing ledger and the client id leases, shared by all processes of this machine."""
    ledger_url: str = field(default="", repr=False)
    """May contain a password."""

    @classmethod
    def of(cls, settings: Settings) -> GatewayAddress:
        """The gateway of the settings, for a user: with the client id that is configured, if one is."""
        return cls(
            host=settings.ib_host,
            port=settings.ib_port,
            client_id=settings.ib_client_id,
            connect_timeout_s=settings.ib_connect_timeout_s,
            request_timeout_s=settings.ib_request_timeout_s,
            retry_waits_s=settings.ib_retry_waits_s,
            state_dir=settings.dagster_home,
            ledger_url=settings.ledger_url,
            library=settings.ib_library,
        )

    @property
    def login(self) -> str:
        """The key of the shared pacing budget. The account would be better, but is known only once connected, and requests
        have to be paced before; two addresses of one login are rare."""
        host = "127.0.0.1" if self.host.lower() in ("localhost", "::1") else self.host.lower()
        return f"{host}:{self.port}"

    @property
    def return_patience_s(self) -> float:
        """Seconds to wait for a gateway that was connected and is gone; 0 where nothing is retried."""
        return RETURN_PATIENCE * sum(self.retry_waits_s)

    @property
    def leases_dir(self) -> Path:
        """Folder of the client ids that this program uses at this gateway."""
        key = "".join(c if c.isalnum() else "_" for c in self.login)
        return self.state_dir / "ib" / f"client_ids_{key}"


def hide_secrets(url: str) -> str:
    """The URL of a ledger's database as it may be shown: without passwords. Empty for an empty one."""
    if not url:
        return ""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        return "(not a database URL)"  # its use explains what is wrong with it
    secret = {name: "hidden" for name in parsed.query if "pass" in name.lower()}
    return parsed.update_query_dict(secret).render_as_string(hide_password=True)
