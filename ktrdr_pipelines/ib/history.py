"""Ask IB for history as it wants to be asked: paced, held while a farm is down, retried.

Between the use case (`loading/series_load.py`) and the wire (`client.py`). The connection is `connection.py`'s, the budget
`ib/pacing/ledger.py`'s, the meaning of codes `codes.py`'s.
Retries are tenacity's, with the specification's schedule: 3 after the first try, after 15, 30 and 60 s, for transient
errors only. Nothing is decided here about which bars are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

import tenacity

from ktrdr_pipelines.calendars import Session
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import BugError, GatewayUnreachable, KtrdrError, PermanentError, StoreError, TransientError
from ktrdr_pipelines.ib.client import GatewayClient, Sending
from ktrdr_pipelines.ib.codes import Outage, RequestLost
from ktrdr_pipelines.ib.connection import Connection
from ktrdr_pipelines.ib.contracts import ContractInfo, choose_contract, pin_contract
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.pacing.clock import Clock, SystemClock
from ktrdr_pipelines.ib.pacing.ledger import GrantExpired, Ledger, open_ledger
from ktrdr_pipelines.ib.pacing.rules import Ask, Rule, bars_ask, contract_text, head_ask, schedule_ask
from ktrdr_pipelines.ib.wire.decoding import RawBars
from ktrdr_pipelines.planning.requests import Request

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Waiting:
    """What a person should know while nothing seems to happen: told to ``on_wait``."""

    reason: str
    seconds: float
    until: datetime | None
    """At the latest; None: nobody knows."""


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
        self._connection = Connection(
            self.address, self._tell, self._wait, now=lambda: self.now(), clock=self.clock or SystemClock()
        )
        self._ledger_opened: Ledger | None = None
        self._heads: dict[str, datetime | None] = {}  # asked once per connection: each counts as a history request
        self._pinned: dict[tuple[Instrument, int], Instrument] = {}
        self._patience_s = self.address.hold_patience_s
        self.requests_made = 0
        self.retries = 0
        self.pacing_wait_s = 0.0
        self.retry_wait_s = 0.0
        """Seconds waited before retries, and for the gateway, its link or a farm to come back."""

    def __enter__(self) -> IBHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, give the client id back, close the ledger. Harmless when repeated."""
        self._connection.close()
        if self._ledger_opened is not None:
            self._ledger_opened.close()
            self._ledger_opened = None

    @property
    def source(self) -> Literal["simulator", "paper", "live"]:
        """``simulator``, ``paper`` or ``live``, by the account id of the last connection: IB's paper accounts begin with D
        (DU, DF for advisors), no live one does."""
        if self._connection.account.startswith("SIM"):
            return "simulator"
        return "paper" if self._connection.account.startswith("D") else "live"

    @property
    def account(self) -> str:
        """The account behind the gateway, which is connected to for it.

        Raises:
            GatewayUnreachable: no gateway.
        """
        self.connect()
        return self._connection.account

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or nobody asked yet."""
        return self._connection.clock_lag_s

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
            details = self.describe(instrument, doing)
            try:
                self._pinned[key] = pin_contract(instrument, choose_contract(instrument, details))
            except KtrdrError as error:
                raise error.while_doing(doing) from None
        return self._pinned[key]

    def find_matching(self, pattern: str) -> list[ContractInfo]:
        """IB's guesses at a symbol that may be misspelt. Only an offer: asked once, and none when IB does not answer.

        Raises:
            GatewayUnreachable: no gateway.
        """
        try:
            return self.connect().matching_symbols(pattern)
        except GatewayUnreachable:
            raise
        except KtrdrError as error:
            log.info("no symbols like %s: %s", pattern, error)
            return []

    def fetch(self, series: Series, request: Request) -> RawBars:
        """The bars of one request, uncut. No bars only if IB said so; every failure is raised."""
        instrument, timeframe = series.instrument, series.timeframe
        doing = f"loading {series} {request.window}"
        ask = describe_bars(series, request)

        def send(client: GatewayClient, sending: Sending) -> RawBars:
            return client.historical_bars(
                instrument,
                end=None if instrument.ends_now else request.end,
                duration=str(request.duration),
                bar_size=timeframe.ib_bar_size,
                intraday=timeframe.is_intraday,
                doing=doing,
                sending=sending,
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
                head = self._paced(ask, lambda client, sending: client.head_timestamp(instrument, sending=sending))
            except (GatewayUnreachable, StoreError):
                raise
            except KtrdrError as error:
                log.warning("going on without the start of history of %s: %s", instrument.symbol, error)
                head = None
            self._heads[ask.identity] = head
        return self._heads[ask.identity]

    def fetch_schedule(self, instrument: Instrument, *, end: datetime, days: int) -> list[Session]:
        """IB's own sessions of ``instrument``: those of ``days`` days (IB counts sessions) up to ``end``. A history request like
        any other: paced, counted, retried. Whether all of them were sent cannot be seen from one answer.

        Raises:
            PermanentError: this gateway serves no schedules. KtrdrError: any other failure.
        """
        doing = f"asking for the schedule of {instrument.symbol} to {format_instant(end)}"
        duration = f"{days} D"
        ask = schedule_ask(
            contract=_contract_text(instrument),
            exchange=instrument.exchange,
            duration=duration,
            end=format_instant(end),
            use_rth=instrument.use_rth,
        )

        def send(client: GatewayClient, sending: Sending) -> list[Session]:
            return client.schedule(instrument, end=end, duration=duration, doing=doing, sending=sending)

        try:
            return self._retry(doing, lambda: self._paced(ask, send))
        except BugError as error:
            # An older gateway refuses what to show as malformed; for bars that would be our mistake.
            raise PermanentError(
                error.observed,
                doing=doing,
                advice="This gateway may be too old to serve schedules; the installed calendar stays in use.",
                code=error.code,
            ) from None

    # -- pacing and retries -----------------------------------------------------------------------------------------

    def connect(self) -> GatewayClient:
        """The connection, alive; see `Connection.get`."""
        return self._connection.get()

    @property
    def ledger(self) -> Ledger:
        """The budget of this login, shared with every other process."""
        if self._ledger_opened is None:
            where = self.address.ledger_url or self.address.state_dir / "ib"
            self._ledger_opened = open_ledger(where, self.address.login, self.clock)
        return self._ledger_opened

    def describe(self, instrument: Instrument, doing: str) -> list[ContractInfo]:
        """Every contract that IB knows of that description; an empty list when it knows none. Not a history request.

        Raises:
            KtrdrError: no answer; in the nightly reset "none" is no answer either.
        """

        def ask() -> list[ContractInfo]:
            client = self.connect()
            self.ride_out(client, frozenset((Outage.LINK, Outage.DEFINITIONS)))
            with self._watch():
                # Not a history request: not counted against the budget.
                return client.contract_details(instrument)

        return self._retry(doing, ask)

    def _paced(self, ask: Ask, send: Callable[[GatewayClient, Sending], T]) -> T:
        """Send one history request once the ledger agrees; connected before, so that nothing lies between grant and send."""
        client = self.connect()
        self.ride_out(client, frozenset((Outage.LINK, Outage.HISTORY)))
        told: dict[str, float] = {}

        def waiting(seconds: float, rule: Rule, until_s: float) -> None:
            if seconds >= 1 and until_s - told.get("until", 0.0) >= 1:
                told["until"] = until_s
                self._tell(f"pacing: {rule}{self._explain_pause(rule)}", seconds, datetime.fromtimestamp(until_s, UTC))

        with self.ledger.acquire(ask, sleep=self.sleep, on_wait=waiting) as grant, self._watch():
            self.pacing_wait_s += grant.waited_s
            try:
                self._connection.check()
            except GatewayUnreachable as error:
                raise RequestLost(
                    f"the connection was lost while the request waited for its turn ({error.observed})",
                    advice="It is made again; nothing was sent.",
                ) from None

            @contextmanager
            def sending() -> Iterator[None]:
                with grant.sending():
                    self.requests_made += 1
                    yield

            return send(client, sending)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """After the block: what its failure means for the next request on this connection, and for other processes."""
        self._connection.note_use()
        try:
            yield
        except KtrdrError as error:
            if error.pauses_login:
                self.ledger.penalise(error.observed)
            self._connection.note_use(error)
            raise
        self._connection.note_use()

    def _explain_pause(self, rule: Rule) -> str:
        """Why everything pauses: pacing, or the same login in use elsewhere, which a person can end."""
        holds = self.ledger.snapshot().holds if rule is Rule.HOLD else ()
        return f" ({holds[-1].reason})" if holds else ""

    def _tell(self, reason: str, seconds: float, until: datetime | None = None) -> None:
        """Why nothing will happen for ``seconds``, for whoever watches and for the log."""
        log.info("waiting up to %.0f s: %s", seconds, reason)
        self.on_wait(Waiting(reason, seconds, until or self.now() + timedelta(seconds=seconds)))

    def _wait(self, seconds: float) -> None:
        self.retry_wait_s += seconds
        self.sleep(seconds)

    def ride_out(self, client: GatewayClient, needed: frozenset[Outage]) -> None:
        """Wait while the gateway says that something ``needed`` is down, at most as long as patience lasts.

        Raises:
            TransientError: it is down, and the address has no patience at all.
        """
        is_told = False
        while client.outages.kinds & needed:
            if self.address.hold_patience_s <= 0:
                raise TransientError(
                    f"the {client.outages.describe(needed)} is down, says the gateway",
                    advice="Ask again later: IB mends it; loads wait for it.",
                )
            if self._patience_s <= 0 or not client.is_connected:
                return
            if not is_told:
                is_told = True
                self._tell(f"the gateway says it is down: {client.outages.describe(needed)}", self._patience_s)
            self._wait(1.0)
            self._patience_s -= 1.0
        self._patience_s = self.address.hold_patience_s

    def _retry(self, doing: str, attempt: Callable[[], T]) -> T:
        waits = self.address.retry_waits_s
        asked_at_once: list[KtrdrError] = []

        def should_retry(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, KtrdrError) or not error.retry_helps:
                return False
            # Nobody home at the very start, or for longer than any restart: say so at once instead of after two minutes.
            return not (isinstance(error, GatewayUnreachable) and self._connection.has_given_up)

        def choose_wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, RequestLost | GrantExpired) and not asked_at_once:
                asked_at_once.append(error)
                return 0.0
            return waits[min(state.attempt_number, len(waits)) - 1] if waits else 0.0

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            wait_s = state.next_action.sleep if state.next_action else 0.0
            self.retries += 1
            tried.append(getattr(error, "observed", str(error)))
            log.warning(
                "%s: %s; try %d of %d in %g s", doing, tried[-1], state.attempt_number + 1, len(waits) + 1, wait_s
            )
            # What only a person can end (the same login elsewhere) is worth more words.
            advice = f". {error.advice}" if isinstance(error, KtrdrError) and error.pauses_login else ""
            self._tell(f"retry {state.attempt_number} of {len(waits)} after: {tried[-1]}{advice}", wait_s)

        tried: list[str] = []
        retrying = tenacity.Retrying(
            retry=should_retry,
            wait=choose_wait,
            stop=tenacity.stop_after_attempt(len(waits) + 1),
            sleep=self._wait,
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
        end="" if instrument.ends_now else format_instant(request.end),
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
