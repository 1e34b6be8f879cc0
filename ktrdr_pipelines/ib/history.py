"""History from IB by its rules: requests are paced, wait for the end of an outage, and are retried.

Between `loading/` and the wire (`client.py`). The connection: `connection.py`; the budget: `ib/pacing/ledger.py`; the
meaning of codes: `codes.py`. Retries are tenacity's, for transient errors only, after the waits of the address (the setting
IB_RETRY_WAITS). Which bars are missing is not decided here.
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
    """A wait, as reported to ``on_wait``: why, how many seconds at most, and until when."""

    reason: str
    seconds: float
    until: datetime | None
    """At the latest; None: unknown."""


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
            self.address, self._report_wait, self._wait, now=lambda: self.now(), clock=self.clock or SystemClock()
        )
        self._ledger_opened: Ledger | None = None
        self._heads: dict[str, datetime | None] = {}  # asked once per object: each counts as a history request
        self._pinned: dict[tuple[Instrument, int], Instrument] = {}
        self._patience_s = self.address.outage_patience_s
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
        """Disconnect, release the client id, close the ledger. Harmless when repeated."""
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
        """The account behind the gateway; connects if needed.

        Raises:
            GatewayUnreachable: no gateway.
        """
        self.connect()
        return self._connection.account

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or before the first connection."""
        return self._connection.clock_lag_s

    # -- requests ---------------------------------------------------------------------------------------------------

    def pin(self, instrument: Instrument) -> Instrument:
        """``instrument`` with IB's conId for it.

        Raises:
            PermanentError: IB has no such contract.
            InputError: it has several.
        """
        key = (instrument, instrument.con_id)  # a conId is not part of the instrument's equality, but it decides
        if key not in self._pinned:
            doing = f"looking up {instrument.symbol} ({instrument.sec_type} {instrument.currency})"
            details = self.describe(instrument, doing)
            try:
                self._pinned[key] = pin_contract(instrument, choose_contract(instrument, details))
            except KtrdrError as error:
                raise error.while_doing(doing) from None
        return self._pinned[key]

    def find_matching(self, pattern: str) -> list[ContractInfo]:
        """IB's guesses at a symbol that may be misspelt. Asked once, without retries; empty when IB does not answer.

        Raises:
            GatewayUnreachable: no gateway.
        """
        try:
            return self.connect().matching_symbols(pattern)
        except GatewayUnreachable:
            raise
        except KtrdrError as error:
            log.info("no answer about symbols like %s: %s", pattern, error)
            return []

    def fetch(self, series: Series, request: Request) -> RawBars:
        """The bars of one request, uncut. No bars only if IB answered so; every failure is raised."""
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

        It is asked for once, without retries: a gateway without an answer fails no load.

        Raises:
            GatewayUnreachable, StoreError: no gateway, or no ledger; no other request would work either.
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
        any other: paced, counted, retried. One answer does not show whether it is complete.

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
            # An older gateway refuses SCHEDULE as malformed; for bars that would be our mistake.
            raise PermanentError(
                error.observed,
                doing=doing,
                advice="This gateway may be too old to serve schedules; the installed calendar stays in use.",
                code=error.code,
            ) from None

    # -- pacing and retries -----------------------------------------------------------------------------------------

    def connect(self) -> GatewayClient:
        """The connection, checked; see `Connection.get`."""
        return self._connection.get()

    @property
    def ledger(self) -> Ledger:
        """The budget of this login, shared with every other process."""
        if self._ledger_opened is None:
            where = self.address.ledger_url or self.address.state_dir / "ib"
            self._ledger_opened = open_ledger(where, self.address.login, self.clock)
        return self._ledger_opened

    def describe(self, instrument: Instrument, doing: str) -> list[ContractInfo]:
        """Every contract that fits ``instrument``; an empty list when IB has none. Not a history request.

        Raises:
            KtrdrError: no answer; during the nightly reset "none" is no answer either.
        """

        def ask() -> list[ContractInfo]:
            client = self.connect()
            self.wait_for_outages(client, frozenset((Outage.LINK, Outage.DEFINITIONS)))
            with self._watch():
                return client.contract_details(instrument)

        return self._retry(doing, ask)

    def _paced(self, ask: Ask, send: Callable[[GatewayClient, Sending], T]) -> T:
        """Send one history request once the ledger grants it; connected before, so that nothing comes between grant and send."""
        client = self.connect()
        self.wait_for_outages(client, frozenset((Outage.LINK, Outage.HISTORY)))
        reported_until_s = 0.0

        def waiting(seconds: float, rule: Rule, until_s: float) -> None:
            nonlocal reported_until_s
            if seconds >= 1 and until_s - reported_until_s >= 1:
                reported_until_s = until_s
                self._report_wait(
                    f"pacing: {rule}{self._explain_pause(rule)}", seconds, datetime.fromtimestamp(until_s, UTC)
                )

        with self.ledger.acquire(ask, sleep=self.sleep, on_wait=waiting) as grant, self._watch():
            self.pacing_wait_s += grant.waited_s
            try:
                self._connection.check()
            except GatewayUnreachable as error:
                raise RequestLost(
                    f"the connection was lost during the pacing wait ({error.observed})",
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
        """A block around one request: what its failure means for the next one on this connection, and for other processes."""
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
        """Why all processes pause: pacing, or the same login in use elsewhere, which the user can end."""
        pauses = self.ledger.snapshot().pauses if rule is Rule.PAUSE else ()
        return f" ({pauses[-1].reason})" if pauses else ""

    def _report_wait(self, reason: str, seconds: float, until: datetime | None = None) -> None:
        """Report a wait of ``seconds`` at most, to ``on_wait`` and to the log."""
        log.info("waiting up to %.0f s: %s", seconds, reason)
        self.on_wait(Waiting(reason, seconds, until or self.now() + timedelta(seconds=seconds)))

    def _wait(self, seconds: float) -> None:
        self.retry_wait_s += seconds
        self.sleep(seconds)

    def wait_for_outages(self, client: GatewayClient, needed: frozenset[Outage]) -> None:
        """Wait for the end of outages of what is ``needed``, at most as long as patience lasts.

        Raises:
            TransientError: there is an outage, and the address has no patience at all.
        """
        is_reported = False
        while client.outages.kinds & needed:
            if self.address.outage_patience_s <= 0:
                raise TransientError(
                    f"the gateway reports an outage: {client.outages.describe(needed)}",
                    advice="Ask again later. It is IB's to end; loads wait for it.",
                )
            if self._patience_s <= 0 or not client.is_connected:
                return
            if not is_reported:
                is_reported = True
                self._report_wait(f"the gateway reports an outage: {client.outages.describe(needed)}", self._patience_s)
            self._wait(1.0)
            self._patience_s -= 1.0
        self._patience_s = self.address.outage_patience_s

    def _retry(self, doing: str, attempt: Callable[[], T]) -> T:
        waits = self.address.retry_waits_s
        asked_at_once: list[KtrdrError] = []

        def should_retry(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, KtrdrError) or not error.is_transient:
                return False
            # No gateway at the start, or for longer than any restart: raised at once instead of after two minutes.
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
            # Only the user can end some of these (the same login elsewhere): show how.
            advice = f". {error.advice}" if isinstance(error, KtrdrError) and error.pauses_login else ""
            self._report_wait(f"retry {state.attempt_number} of {len(waits)} after: {tried[-1]}{advice}", wait_s)

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
