"""Ask IB for history as it wants to be asked: paced, one connection, retried.

Between the use case (`load.py`) and the wire (`client.py`). The budget is `ledger.py`'s, the meaning of codes `codes.py`'s.
Retries are tenacity's, with the specification's schedule: 3 after the first try, after 15, 30 and 60 s, for transient
errors only. Nothing is decided here about which bars are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import tenacity

from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError, PermanentError, StoreError
from ktrdr_pipelines.ib.answers import RawBars
from ktrdr_pipelines.ib.client import ClientIdInUse, GatewayClient
from ktrdr_pipelines.ib.clock import Clock
from ktrdr_pipelines.ib.codes import Hold
from ktrdr_pipelines.ib.contracts import ContractInfo, choose_contract, list_candidates, pin_contract
from ktrdr_pipelines.ib.leases import ClientIds, Lease, lease_client_id
from ktrdr_pipelines.ib.ledger import Ledger, open_ledger
from ktrdr_pipelines.ib.pacing import Ask, Rule, bars_ask, contract_text, head_ask
from ktrdr_pipelines.plan import Request
from ktrdr_pipelines.series import Instrument, Series, format_instant

log = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_AFTER_S = 30.0
"""A connection unused for longer than this is asked for the time before it is trusted again."""

HOLD_PATIENCE_S = 300.0
"""How long requests wait in all for a link or farm that the gateway calls broken. Then they are sent anyway: its notices may
be out of date, and an answer of a broken farm is not believed (`codes.classify`). The nightly restart takes minutes."""


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
    state_dir: Path = Path()
    """Folder of the pacing ledger and the client id leases, shared by all processes of this machine."""
    ledger_url: str = ""

    @property
    def login(self) -> str:
        """What all programs that share the budget agree on. The account would be better, but is known only once
        connected, and asking is what has to be paced; two addresses of one login are rare."""
        host = "127.0.0.1" if self.host.lower() in ("localhost", "::1") else self.host.lower()
        return f"{host}:{self.port}"


@dataclass
class Waiting:
    """What a person should know while nothing seems to happen: told to ``on_wait``."""

    reason: str
    seconds: float
    until: datetime


@dataclass
class IBHistory:
    """Bars, contracts and the start of history from one gateway. Use as a context manager; one thread at a time."""

    address: GatewayAddress
    on_wait: Callable[[Waiting], None] = lambda _: None
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    clock: Clock | None = None
    """The ledger's clock; None is the machine's (or the database server's)."""

    def __post_init__(self) -> None:
        self._client: GatewayClient | None = None
        self._lease: Lease | None = None
        self._ledger_opened: Ledger | None = None
        self._used_at = 0.0
        self._is_suspect = False
        self._account = ""
        self._heads: dict[str, datetime | None] = {}  # asked once per connection: each counts as a history request
        self._pinned: dict[tuple[Instrument, int], Instrument] = {}
        self._patience_s = HOLD_PATIENCE_S
        self.requests_made = 0
        self.retries = 0
        self.pacing_wait_s = 0.0

    def __enter__(self) -> IBHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, give the client id back, close the ledger. Harmless when repeated."""
        self._disconnect()
        if self._ledger_opened is not None:
            self._ledger_opened.close()
            self._ledger_opened = None

    @property
    def source(self) -> Literal["simulator", "paper", "live"]:
        """``simulator``, ``paper`` or ``live``, by the account id of the last connection: IB's paper accounts begin with D
        (DU, DF for advisors), no live one does."""
        if self._account.startswith("SIM"):
            return "simulator"
        return "paper" if self._account.startswith("D") else "live"

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or nobody asked yet."""
        return self._client.clock_lag_s if self._client is not None else 0.0

    # -- what can be asked ------------------------------------------------------------------------------------------

    def pin(self, instrument: Instrument) -> Instrument:
        """``instrument`` with the conId that IB means by it.

        Raises:
            PermanentError: IB knows no such contract.
            InputError: it knows several.
        """
        key = (instrument, instrument.con_id)  # a conId is no part of the instrument's equality, but it decides
        if key not in self._pinned:
            doing = f"looking up {instrument.symbol} ({instrument.sec_type} {instrument.currency})"
            details = self._details(instrument, doing)
            try:
                self._pinned[key] = pin_contract(instrument, choose_contract(instrument, details))
            except KtrdrError as error:
                raise error.while_doing(doing) from None
        return self._pinned[key]

    def discover(self, symbol: str) -> Instrument:
        """What a symbol that no universe names means to IB: tried as CASH, then as STK.

        Raises:
            PermanentError: nothing of that name. InputError: several contracts, or no symbol at all.
        """
        tried = []
        for candidate in list_candidates(symbol):
            details = self._details(candidate, f"looking up {symbol} as {candidate.sec_type}")
            if details:
                return pin_contract(candidate, choose_contract(candidate, details))
            tried.append(f"{candidate.sec_type} {candidate.ib_symbol} {candidate.currency}")
        raise PermanentError(
            f"IB knows no {symbol} (tried as {', '.join(tried)})",
            doing="looking up a symbol",
            advice="Check the spelling, or describe the instrument in the universe file.",
            code=200,
        )

    def fetch(self, series: Series, request: Request) -> RawBars:
        """The bars of one request, uncut. No bars only if IB said so; every failure is raised."""
        instrument, timeframe = series.instrument, series.timeframe
        doing = f"loading {series} {request.window}"
        ask = describe_bars(series, request)

        def send(client: GatewayClient, on_sent: Callable[[], None]) -> RawBars:
            return client.historical_bars(
                instrument,
                end=request.end,
                duration=str(request.duration),
                bar_size=timeframe.ib_bar_size,
                intraday=timeframe.is_intraday,
                doing=doing,
                on_sent=on_sent,
            )

        return self._retry(doing, lambda: self._paced(ask, send))

    def find_head(self, instrument: Instrument) -> datetime | None:
        """IB's head timestamp: a hint of where history starts, or None. Counts as a history request.

        Being a hint, it is asked for once, without retries: a gateway that does not tell it fails no load.

        Raises:
            GatewayUnreachable, StoreError: no gateway, or no ledger; then nothing else would work either.
        """
        ask = describe_head(instrument)
        if ask.identity not in self._heads:
            try:
                head = self._paced(ask, lambda client, on_sent: client.head_timestamp(instrument, on_sent=on_sent))
            except (GatewayUnreachable, StoreError):
                raise
            except KtrdrError as error:
                log.warning("going on without the start of history of %s: %s", instrument.symbol, error)
                head = None
            self._heads[ask.identity] = head
        return self._heads[ask.identity]

    # -- connection -------------------------------------------------------------------------------------------------

    def connect(self) -> GatewayClient:
        """The connection: kept, probed when it was idle, or made anew with the next free client id.

        Raises:
            GatewayUnreachable: see `GatewayClient.connect`.
        """
        if self._client is not None:
            try:
                if not self._client.is_connected:
                    raise GatewayUnreachable("the connection is gone")
                if self._is_suspect or time.monotonic() - self._used_at > PROBE_AFTER_S:
                    self._client.probe()
                    self._is_suspect = False
                return self._client
            except GatewayUnreachable:
                self._disconnect()
        taken: set[int] = set()
        while True:
            lease = lease_client_id(
                self.address.client_ids,
                self._state_dir("client_ids"),
                preferred=self.address.client_id,
                skip=taken,
            )
            client = GatewayClient(
                self.address.host,
                self.address.port,
                lease.client_id,
                connect_timeout_s=self.address.connect_timeout_s,
                request_timeout_s=self.address.request_timeout_s,
                probe_timeout_s=self.address.probe_timeout_s,
                now=self.now,
            )
            try:
                client.connect()
            except ClientIdInUse:
                # Some other program's, or a zombie the gateway has not noticed yet.
                taken.add(lease.client_id)
                lease.release()
                continue
            except BaseException:
                lease.release()
                raise
            self._client, self._lease, self._is_suspect = client, lease, False
            self._account = client.account
            self._used_at = time.monotonic()
            return client

    def _disconnect(self) -> None:
        client, lease = self._client, self._lease
        self._client = self._lease = None
        try:
            if client is not None:
                client.close()
        finally:
            if lease is not None:
                lease.release()

    def _state_dir(self, name: str) -> Path:
        key = "".join(c if c.isalnum() else "_" for c in self.address.login)
        return self.address.state_dir / "ib" / f"{name}_{key}"

    # -- pacing and retries -----------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The budget of this login, shared with every other process."""
        if self._ledger_opened is None:
            where = self.address.ledger_url or self.address.state_dir / "ib"
            self._ledger_opened = open_ledger(where, self.address.login, self.clock)
        return self._ledger_opened

    def _details(self, instrument: Instrument, doing: str) -> list[ContractInfo]:
        def ask() -> list[ContractInfo]:
            client = self.connect()
            self._ride_out(client, frozenset((Hold.LINK, Hold.DEFINITIONS)))
            with self._watch():
                # Not a history request: not counted against the budget.
                return client.contract_details(instrument)

        return self._retry(doing, ask)

    def _paced(self, ask: Ask, send: Callable[[GatewayClient, Callable[[], None]], T]) -> T:
        """Send one history request once the ledger agrees; connected before, so that nothing lies between grant and send."""
        client = self.connect()
        self._ride_out(client, frozenset((Hold.LINK, Hold.HISTORY)))
        told: dict[str, float] = {}

        def waiting(seconds: float, rule: Rule, until_s: float) -> None:
            until = datetime.fromtimestamp(until_s, UTC)
            if seconds >= 1 and until_s - told.get("until", 0.0) >= 1:
                told["until"] = until_s
                self.on_wait(Waiting(f"pacing: {rule}", seconds, until))

        with self.ledger.acquire(ask, sleep=self.sleep, on_wait=waiting) as grant, self._watch():
            self.pacing_wait_s += grant.waited_s
            if grant.waited_s > PROBE_AFTER_S:
                client.probe()

            def on_sent() -> None:
                grant.sent()
                self.requests_made += 1

            return send(client, on_sent)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """After the block: what its failure means for the next request on this connection, and for other processes."""
        self._used_at = time.monotonic()
        try:
            yield
        except KtrdrError as error:
            if error.pauses_login:
                self.ledger.penalise(error.observed)
            # A request without an answer is how a dead connection shows itself: ask before the next one waits as long.
            self._is_suspect = error.retry_helps and not error.pauses_login
            raise
        finally:
            self._used_at = time.monotonic()

    def _ride_out(self, client: GatewayClient, needed: frozenset[Hold]) -> None:
        """Wait while the gateway says that something ``needed`` is down, at most as long as patience lasts."""
        is_told = False
        while down := client.holds & needed:
            if self._patience_s <= 0 or not client.is_connected:
                return
            if not is_told:
                is_told = True
                until = datetime.fromtimestamp(self.now().timestamp() + self._patience_s, UTC)
                self.on_wait(
                    Waiting(f"the gateway says it is down: {', '.join(sorted(down))}", self._patience_s, until)
                )
            self.sleep(1.0)
            self._patience_s -= 1.0
        self._patience_s = HOLD_PATIENCE_S

    def _retry(self, doing: str, attempt: Callable[[], T]) -> T:
        waits = self.address.retry_waits_s
        had_connection = self._client is not None

        def should_retry(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, KtrdrError) or not error.retry_helps:
                return False
            # Nobody home at the very start: say so at once instead of after two minutes.
            nobody_home = isinstance(error, GatewayUnreachable) and not had_connection and self._client is None
            return not (nobody_home and state.attempt_number == 1)

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            wait_s = state.next_action.sleep if state.next_action else 0.0
            self.retries += 1
            log.warning("%s: %s; try %d of %d in %g s", doing, error, state.attempt_number + 1, len(waits) + 1, wait_s)
            tried.append(getattr(error, "observed", str(error)))
            until = datetime.fromtimestamp(self.now().timestamp() + wait_s, UTC)
            self.on_wait(Waiting(f"retry {state.attempt_number} of {len(waits)} after: {tried[-1]}", wait_s, until))

        tried: list[str] = []
        retrying = tenacity.Retrying(
            retry=should_retry,
            wait=lambda state: waits[min(state.attempt_number, len(waits)) - 1] if waits else 0.0,
            stop=tenacity.stop_after_attempt(len(waits) + 1),
            sleep=self.sleep,
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except KtrdrError as error:
            if tried:
                error.observed += f" (given up after {len(tried) + 1} tries: {'; '.join(_shorten(tried))})"
            raise error.while_doing(doing) from None


def _shorten(reasons: list[str]) -> list[str]:
    """The different reasons, in order, each once."""
    return list(dict.fromkeys(reasons))


def describe_bars(series: Series, request: Request) -> Ask:
    """A request for bars as the pacing rules see it."""
    instrument = series.instrument
    return bars_ask(
        contract=_contract_text(instrument),
        exchange=instrument.exchange,
        what_to_show=instrument.what_to_show,
        bar_size=series.timeframe.ib_bar_size,
        duration=str(request.duration),
        end=format_instant(request.end),
        use_rth=instrument.use_rth,
    )


def describe_head(instrument: Instrument) -> Ask:
    """A request for the start of history as the pacing rules see it."""
    return head_ask(
        contract=_contract_text(instrument),
        exchange=instrument.exchange,
        what_to_show=instrument.what_to_show,
        use_rth=instrument.use_rth,
    )


def _contract_text(instrument: Instrument) -> str:
    return contract_text(
        sec_type=instrument.sec_type,
        ib_symbol=instrument.ib_symbol,
        currency=instrument.currency,
        expiry=instrument.expiry,
    )
