"""The connection of a process: made with a free client id, probed before it is trusted, made again when it is lost, waited for
while the gateway restarts.

One connection at a time. The wire: `ib/wire/session.py`; the client ids: `client_ids.py`; retries of requests: `history.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.client_ids import Lease, lease_client_id
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.pacing.clock import Clock, Stamp, SystemClock
from ktrdr_pipelines.ib.wire.session import ClientIdInUse, HungUp

log = logging.getLogger(__name__)

PROBE_AFTER_S = 30.0
"""A connection unused for longer than this is probed before it is trusted again."""


@dataclass
class Connection:
    """The gateway at ``address``, for several threads; `close` on every path.

    While one thread connects or probes, the others wait for it. ``clock`` has to run on while the machine sleeps: a connection
    that was unused then is not to be trusted.
    """

    address: GatewayAddress
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    clock: Clock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        self.account = ""
        """Of the last connection; empty before the first."""
        self.has_given_up = False
        """True once the gateway could not be reached for as long as patience lasts."""
        self._client: GatewayClient | None = None
        self._connecting: GatewayClient | None = None
        self._lease: Lease | None = None
        self._used: Stamp = self.clock.read()
        self._is_suspect = False
        self._patience_s = 0.0
        self._mutex = threading.RLock()

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or without a connection."""
        return self._client.clock_lag_s if self._client is not None else 0.0

    @property
    def outage(self) -> str:
        """What the gateway reports as out now; empty when it reports nothing, or without a connection."""
        client = self._client
        return client.outages.describe() if client is not None and client.outages.kinds else ""

    def get(
        self,
        on_wait: Callable[[str, float], None] = lambda _reason, _seconds: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> GatewayClient:
        """The present connection, probed if it was idle, or a new one with the next free client id. ``on_wait`` gets reason and
        seconds at most of a wait for the gateway.

        Raises:
            GatewayUnreachable: see `GatewayClient.connect`; at once before the first connection, else when patience ends.
        """
        with self._mutex:
            if self._client is not None:
                try:
                    self.check(self._client)
                    return self._client
                except GatewayUnreachable as error:
                    log.warning("connecting again: %s", error.observed)
                    self.close()
            return self._connect_patiently(on_wait, sleep)

    def check(self, client: GatewayClient) -> None:
        """Check that ``client`` is the present connection and alive: probe it if it was idle or its last request failed.

        Raises:
            GatewayUnreachable: it is not.
        """
        with self._mutex:
            if client is not self._client or not client.is_connected:
                raise GatewayUnreachable(f"the connection to {self.address.host}:{self.address.port} was lost")
            idle_s = self.clock.read().age_of(self._used)
            # Negative: the clock was set back, so the idle time is unknown.
            if self._is_suspect or not 0 <= idle_s <= PROBE_AFTER_S:
                self._is_suspect = False  # before: another request may fail meanwhile
                try:
                    client.probe()
                except BaseException:
                    self._is_suspect = True
                    raise
                self.note_use(client)

    def note_use(self, client: GatewayClient, error: KtrdrError | None = None) -> None:
        """Note that a request was sent over ``client`` or has ended just now, with ``error`` if it failed.

        It never waits for a probe or a connection attempt of another request: an answer would wait with it.
        """
        if client is not self._client:
            return  # a request of a connection that was replaced meanwhile
        self._used = self.clock.read()
        if error is None:
            return
        if isinstance(error, GatewayUnreachable):
            with self._mutex:
                if client is self._client:
                    self.close()
        # A dead connection shows as a request without an answer: probe before the next one waits as long. The refusal of one
        # request does not end the suspicion of another.
        self._is_suspect = self._is_suspect or (error.is_transient and not error.pauses_login)

    def cancel_requests(self) -> None:
        """Cancel what is open, on the wire too; an attempt to connect ends. For another thread than the ones that ask."""
        client = self._client or self._connecting
        if client is not None:
            client.cancel_requests()

    def close(self) -> None:
        """Disconnect and release the client id. Harmless when repeated."""
        with self._mutex:
            client, lease = self._client, self._lease
            self._client = self._lease = None
            try:
                if client is not None:
                    client.close()
            finally:
                if lease is not None:
                    lease.release()

    def _connect_patiently(
        self, on_wait: Callable[[str, float], None], sleep: Callable[[float], None]
    ) -> GatewayClient:
        """Connect. A gateway that was connected before is waited for: it restarts every night."""
        pause_s = next(iter(self.address.retry_waits_s), 0.0)
        is_reported = False
        while True:
            # The monotonic clock stands still while the machine sleeps: sleep does not count as waiting.
            begun_s = time.monotonic()
            try:
                client = self._connect()
            except GatewayUnreachable as error:
                self._patience_s -= time.monotonic() - begun_s
                if self._patience_s <= 0:
                    self.has_given_up = True
                    if is_reported:
                        error.observed += f"; waited {self.address.return_patience_s:g} s for it to come back"
                    raise
                if not is_reported:
                    is_reported = True
                    log.warning("no gateway any more, waiting up to %g s for it: %s", self._patience_s, error.observed)
                    on_wait(f"the gateway is gone and may be restarting: {error.observed}", self._patience_s)
                wait_s = min(pause_s, self._patience_s)
                self._patience_s -= wait_s
                sleep(wait_s)
            else:
                self.has_given_up, self._patience_s = False, self.address.return_patience_s
                return client

    def _connect(self) -> GatewayClient:
        """One round through the client ids that are free."""
        taken: set[int] = set()
        has_hung_up = False
        while True:
            lease = lease_client_id(
                self.address.client_ids, self.address.leases_dir, preferred=self.address.client_id, skip=taken
            )
            client = GatewayClient(
                self.address.host,
                self.address.port,
                lease.client_id,
                connect_timeout_s=self.address.connect_timeout_s,
                request_timeout_s=self.address.request_timeout_s,
                probe_timeout_s=self.address.probe_timeout_s,
                now=self.now,
                library=self.address.library,
            )
            self._connecting = client
            try:
                client.connect()
            except ClientIdInUse:
                # Another program's, or of a connection whose end the gateway has not noticed yet.
                taken.add(lease.client_id)
                lease.release()
                continue
            except HungUp:
                # Perhaps this id is in use and the gateway closed before it sent 326: one other id is worth a try, not fifty.
                taken.add(lease.client_id)
                lease.release()
                if has_hung_up:
                    raise
                has_hung_up = True
                continue
            except BaseException:
                lease.release()
                raise
            finally:
                self._connecting = None
            self._client, self._lease, self._is_suspect = client, lease, False
            self.account = client.account
            self.note_use(client)
            return client
