"""History from IB by its rules: what can be asked, and what all questions of one process share.

Between `loading/` and the wire (`client.py`). Pacing, outages and retries of one question: `asking.py`; the connection:
`connection.py`; the budget: `ib/pacing/ledger.py`; the meaning of codes: `codes.py`. Which bars are missing is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from ktrdr_pipelines.calendars import Session
from ktrdr_pipelines.domain.calls import Call, Costs, Interrupted, Waiting
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import BugError, GatewayUnreachable, KtrdrError, PermanentError, StoreError
from ktrdr_pipelines.ib.asking import Asking
from ktrdr_pipelines.ib.client import GatewayClient, Sending
from ktrdr_pipelines.ib.codes import Outage
from ktrdr_pipelines.ib.connection import Connection
from ktrdr_pipelines.ib.contracts import ContractInfo, choose_contract, pin_contract
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.pacing.clock import Clock, SystemClock
from ktrdr_pipelines.ib.pacing.ledger import Ledger, open_ledger
from ktrdr_pipelines.ib.pacing.rules import Ask, bars_ask, contract_text, head_ask, schedule_ask
from ktrdr_pipelines.ib.wire.decoding import RawBars
from ktrdr_pipelines.planning.requests import Request

log = logging.getLogger(__name__)


class Patience:
    """How long outages are waited for, in seconds, by all calls together; calls that wait at the same time spend it once."""

    def __init__(self, whole_s: float) -> None:
        self._whole_s = self.left_s = whole_s
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def spending(self, seconds: float) -> Iterator[None]:
        """A block that waits ``seconds``."""
        with self._one_at_a_time:
            self.left_s -= seconds
            yield

    def renew(self) -> None:
        """There is no outage any more."""
        self.left_s = self._whole_s


@dataclass
class IBHistory:
    """Bars, contracts and the start of history from one gateway. Use as a context manager. Every method that asks may be called
    from several threads at once; the answers come over one connection."""

    address: GatewayAddress
    on_wait: Callable[[Waiting], None] = lambda _: None
    """Of calls that bring none of their own."""
    sleep: Callable[[float], None] | None = None
    """For tests: instead of waiting in real time."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    clock: Clock | None = None
    """The ledger's clock; None is the machine's (or the database server's)."""

    def __post_init__(self) -> None:
        self.connection = Connection(self.address, now=lambda: self.now(), clock=self.clock or SystemClock())
        self.outage_patience = Patience(self.address.outage_patience_s)
        self.costs = Costs()
        """Of all calls that have returned."""
        self._mutex = threading.Lock()
        self._interrupted = threading.Event()
        self._ledger_opened: Ledger | None = None
        self._heads: dict[str, datetime | None] = {}  # asked once per object: each counts as a history request
        self._pinned: dict[tuple[Instrument, int], Instrument] = {}

    def __enter__(self) -> IBHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, release the client id, close the ledger. Harmless when repeated."""
        self.connection.close()
        if self._ledger_opened is not None:
            self._ledger_opened.close()
            self._ledger_opened = None

    @property
    def source(self) -> Literal["simulator", "paper", "live"]:
        """``simulator``, ``paper`` or ``live``, by the account id of the last connection: IB's paper accounts begin with D
        (DU, DF for advisors), no live one does."""
        if self.connection.account.startswith("SIM"):
            return "simulator"
        return "paper" if self.connection.account.startswith("D") else "live"

    @property
    def account(self) -> str:
        """The account behind the gateway; connects if needed.

        Raises:
            GatewayUnreachable: no gateway.
        """
        self.connect()
        return self.connection.account

    @property
    def clock_lag_s(self) -> float:
        """How many seconds the gateway's time is behind this machine's; 0 if it is not, or before the first connection."""
        return self.connection.clock_lag_s

    # -- life cycle of calls ------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """End all calls that are under way, in other threads: waits end, open requests are cancelled on the wire. Each raises
        `Interrupted`, as later ones do, until `resume`."""
        self._interrupted.set()
        self.connection.cancel_requests()

    def resume(self) -> None:
        """Calls are possible again."""
        self._interrupted.clear()

    @property
    def is_interrupted(self) -> bool:
        """True between `interrupt` and `resume`."""
        return self._interrupted.is_set()

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Interrupted: the program ends.
        """
        if self.sleep is not None:
            self.sleep(seconds)
        else:
            self._interrupted.wait(seconds)
        if self.is_interrupted:
            raise Interrupted

    @contextmanager
    def _asking(self, call: Call | None) -> Iterator[Asking]:
        """A block for one call; without ``call`` one whose waits are shown where those of the history are."""
        if self.is_interrupted:
            raise Interrupted
        call = call or Call(on_wait=self.on_wait)
        before = Costs()
        before.add(call.costs)
        try:
            yield Asking(self, call)
        except KtrdrError:
            if self.is_interrupted:  # the cancelled request shows as a lost one
                raise Interrupted from None
            raise
        finally:
            with self._mutex:
                self.costs.add(call.costs.minus(before))

    # -- requests ---------------------------------------------------------------------------------------------------

    def pin(self, instrument: Instrument, call: Call | None = None) -> Instrument:
        """``instrument`` with IB's conId for it.

        Raises:
            PermanentError: IB has no such contract.
            InputError: it has several.
        """
        key = (instrument, instrument.con_id)  # a conId is not part of the instrument's equality, but it decides
        if key not in self._pinned:
            doing = f"looking up {instrument.symbol} ({instrument.sec_type} {instrument.currency})"
            details = self.describe(instrument, doing, call)
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

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> RawBars:
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

        with self._asking(call) as asking:
            return asking.retry(doing, lambda: asking.paced(ask, send))

    def find_head(self, instrument: Instrument, call: Call | None = None) -> datetime | None:
        """IB's head timestamp: a hint of where history starts, or None. Counts as a history request.

        It is asked for once, without retries: a gateway without an answer fails no load.

        Raises:
            GatewayUnreachable, StoreError: no gateway, or no ledger; no other request would work either.
        """
        ask = describe_head(instrument)
        if ask.identity not in self._heads:
            try:
                with self._asking(call) as asking:
                    head = asking.paced(ask, lambda client, sending: client.head_timestamp(instrument, sending=sending))
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
            with self._asking(None) as asking:
                return asking.retry(doing, lambda: asking.paced(ask, send))
        except BugError as error:
            # An older gateway refuses SCHEDULE as malformed; for bars that would be our mistake.
            raise PermanentError(
                error.observed,
                doing=doing,
                advice="This gateway may be too old to serve schedules; the installed calendar stays in use.",
                code=error.code,
            ) from None

    def connect(self) -> GatewayClient:
        """The connection, checked; see `Connection.get`."""
        with self._asking(None) as asking:
            return asking.connect()

    @property
    def ledger(self) -> Ledger:
        """The budget of this login, shared with every other process."""
        with self._mutex:
            if self._ledger_opened is None:
                where = self.address.ledger_url or self.address.state_dir / "ib"
                self._ledger_opened = open_ledger(where, self.address.login, self.clock)
            return self._ledger_opened

    def describe(self, instrument: Instrument, doing: str, call: Call | None = None) -> list[ContractInfo]:
        """Every contract that fits ``instrument``; an empty list when IB has none. Not a history request.

        Raises:
            KtrdrError: no answer; during the nightly reset "none" is no answer either.
        """

        with self._asking(call) as asking:

            def ask() -> list[ContractInfo]:
                client = asking.connect()
                asking.wait_for_outages(client, frozenset((Outage.LINK, Outage.DEFINITIONS)))
                with asking.watch(client):
                    return client.contract_details(instrument)

            return asking.retry(doing, ask)

    def wait_for_history(self, client: GatewayClient) -> None:
        """Wait for the end of outages that concern history requests.

        Raises:
            TransientError: there is one, and the address has no patience.
        """
        with self._asking(None) as asking:
            asking.wait_for_outages(client, frozenset((Outage.LINK, Outage.HISTORY)))


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
