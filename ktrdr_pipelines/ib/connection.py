"""The connection of a process: made with a client id that is free, asked whether it is alive before it is trusted, made anew when
it is lost, waited for when the gateway is gone for a while.

One connection at a time. The wire is `ib/wire/session.py`'s, the ids of this program's processes `client_ids.py`'s; which
request is tried again and when is `history.py`'s.
"""

from __future__ import annotations

import logging
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
"""A connection unused for longer than this is asked for the time before it is trusted again."""


@dataclass
class Connection:
    """The gateway at ``address``. One thread at a time; `close` on every path.

    ``on_wait`` is told why and how long at most, when the gateway has to be waited for. ``clock`` has to go on while the machine
    sleeps: a connection that was left alone then is no longer to be trusted.
    """

    address: GatewayAddress
    on_wait: Callable[[str, float], None] = lambda _reason, _seconds: None
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    clock: Clock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        self.account = ""
        """Of the last connection; empty if there never was one."""
        self.has_given_up = False
        """True after the gateway could not be reached, with all the patience it deserved."""
        self._client: GatewayClient | None = None
        self._lease: Lease | None = None
        self._used: Stamp = self.clock.read()
        self._is_suspect = False
        self._patience_s = 0.0

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or nobody asked yet."""
        return self._client.clock_lag_s if self._client is not None else 0.0

    def get(self) -> GatewayClient:
        """The connection: kept, probed when it was idle, or made anew with the next free client id.

        Raises:
            GatewayUnreachable: see `GatewayClient.connect`; at once if there never was a connection, else when patience ends.
        """
        if self._client is not None:
            try:
                self.check()
                return self._client
            except GatewayUnreachable as error:
                log.warning("connecting again: %s", error.observed)
                self.close()
        return self._connect_patiently()

    def check(self) -> None:
        """See that the connection is alive, asking the gateway if it was idle or something went wrong on it.

        Raises:
            GatewayUnreachable: it is not.
        """
        if self._client is None or not self._client.is_connected:
            raise GatewayUnreachable(f"the connection to {self.address.host}:{self.address.port} is gone")
        idle_s = self.clock.read().age_of(self._used)
        # Less than nothing: a clock that was set back cannot tell.
        if self._is_suspect or not 0 <= idle_s <= PROBE_AFTER_S:
            self._client.probe()
            self._is_suspect = False
            self.note_use()

    def note_use(self, error: KtrdrError | None = None) -> None:
        """A request was sent or has ended just now, with ``error`` if it failed."""
        self._used = self.clock.read()
        if error is None:
            return
        if isinstance(error, GatewayUnreachable):
            self.close()
        # A request without an answer is how a dead connection shows itself: ask before the next one waits as long.
        self._is_suspect = error.retry_helps and not error.pauses_login

    def close(self) -> None:
        """Disconnect and give the client id back. Harmless when repeated."""
        client, lease = self._client, self._lease
        self._client = self._lease = None
        try:
            if client is not None:
                client.close()
        finally:
            if lease is not None:
                lease.release()

    def _connect_patiently(self) -> GatewayClient:
        """Connect. A gateway that was there before is waited for: it restarts every night."""
        pause_s = next(iter(self.address.retry_waits_s), 0.0)
        is_told = False
        while True:
            # The monotonic clock stands still while the machine sleeps: sleeping is no waiting.
            begun_s = time.monotonic()
            try:
                client = self._connect()
            except GatewayUnreachable as error:
                self._patience_s -= time.monotonic() - begun_s
                if self._patience_s <= 0:
                    self.has_given_up = True
                    if is_told:
                        error.observed += f"; waited {self.address.return_patience_s:g} s for it to come back"
                    raise
                if not is_told:
                    is_told = True
                    log.warning("the gateway is gone, waiting up to %g s for it: %s", self._patience_s, error.observed)
                    self.on_wait(f"the gateway is gone and may be restarting: {error.observed}", self._patience_s)
                wait_s = min(pause_s, self._patience_s)
                self._patience_s -= wait_s
                self.sleep(wait_s)
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
            try:
                client.connect()
            except ClientIdInUse:
                # Some other program's, or a zombie the gateway has not noticed yet.
                taken.add(lease.client_id)
                lease.release()
                continue
            except HungUp:
                # Perhaps this id is in use and the gateway did not come to say so: one other is worth a try, not fifty.
                taken.add(lease.client_id)
                lease.release()
                if has_hung_up:
                    raise
                has_hung_up = True
                continue
            except BaseException:
                lease.release()
                raise
            self._client, self._lease, self._is_suspect = client, lease, False
            self.account = client.account
            self.note_use()
            return client
