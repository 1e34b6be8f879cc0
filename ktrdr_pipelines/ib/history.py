"""History from IB by its rules: what can be asked, and what all questions of one process share.

Between `loading/` and the wire (`client.py`). Pacing, outages and retries of one question: `asking.py`; the connection:
`connection.py`; the budget: `ib/pacing/ledger.py`; the meaning of codes: `codes.py`. Which bars are missing is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from ktrdr_pipelines.calendars import Session
from ktrdr_pipelines.domain.calls import Call, Costs, Interrupted, OnWait, show_nothing
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
from ktrdr_pipelines.ib.step_timer import StepTimer
from ktrdr_pipelines.ib.wire.decoding import RawBars
from ktrdr_pipelines.planning.requests import Request

log = logging.getLogger(__name__)


class Patience:
    """How long outages are waited for, in seconds, by all calls together; calls that wait at the same time spend it once."""

    def __init__(self, whole_s: float) -> None:
        self._whole_s = self.left_s = whole_s
        self._spender = threading.Lock()

    @contextmanager
    def spending(self, seconds: float) -> Iterator[None]:
        """A block that waits ``seconds``. None waits for another: each has to notice the end of the outage."""
        is_spender = self._spender.acquire(blocking=False)
        try:
            if is_spender:
                self.left_s -= seconds
            yield
        finally:
            if is_spender:
                self._spender.release()

    def renew(self) -> None:
        """There is no outage any more."""
        self.left_s = self._whole_s


@dataclass
class IBHistory:
    """Bars, contracts and the start of history from one gateway. Use as a context manager. Every method that asks may be called
    from several threads at once; the answers come over one connection."""

    address: GatewayAddress
    on_wait: OnWait = show_nothing
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
        self._asking_head: dict[str, threading.Lock] = {}
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

    @property
    def outage(self) -> str:
        """What the gateway reports as out now; empty when it reports nothing, or is not connected."""
        return self.connection.outage

    # -- life cycle of calls ------------------------------------------------------------------------------------------

    def clock_now_s(self) -> float:
        """The time by the clock of the ledger, or of this machine: seconds since 1970."""
        return (self.clock or SystemClock()).now_s()

    def interrupt(self) -> None:
        """End all calls that are under way, in other threads: waits end, open requests are cancelled on the wire. Each raises
        `Interrupted`, as later ones do, until `resume`. May be repeated, for a call that was between two waits."""
        self._interrupted.set()
        if self._ledger_opened is not None:
            self._ledger_opened.interrupt()
        self.connection.cancel_requests()

    def resume(self) -> None:
        """Calls are possible again; those that were interrupted stay so, however late they notice."""
        self._interrupted = threading.Event()

    @contextmanager
    def _asking(self, call: Call | None) -> Iterator[Asking]:
        """A block for one call; without ``call`` one whose waits are shown where those of the history are."""
        interrupted = self._interrupted
        if interrupted.is_set():
            raise Interrupted
        before = Costs()
        with ExitStack() as shown:
            if call is None:
                call = Call(on_wait=self.on_wait, on_step=shown.enter_context(closing(StepTimer(self.on_wait))).begin)
            before.add(call.costs)
            try:
                yield Asking(self, call, interrupted)
            except KtrdrError:
                if interrupted.is_set():  # the cancelled request shows as a lost one
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
        with self._mutex:
            one_at_a_time = self._asking_head.setdefault(ask.identity, threading.Lock())
        with one_at_a_time:
            if ask.identity not in self._heads:
                self._heads[ask.identity] = self._ask_head(instrument, ask, call)
        return self._heads[ask.identity]

    def _ask_head(self, instrument: Instrument, ask: Ask, call: Call | None) -> datetime | None:
        try:
            with self._asking(call) as asking:
                return asking.paced(ask, lambda client, sending: client.head_timestamp(instrument, sending=sending))
        except (GatewayUnreachable, StoreError):
            raise
        except KtrdrError as error:
            log.warning("going on without the start of history of %s: %s", instrument.symbol, error)
            return None

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
                    asking.expect_answer(f"IB's answer about the contract of {instrument.symbol}", 30.0)
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
